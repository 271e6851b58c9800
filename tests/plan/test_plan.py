"""Plans: true bytes, budgets, constraints, and never worse than the greedy on the published costs."""

from __future__ import annotations

from functools import cache

import pytest

from flux_kernels import FormatError, GGUFError
from flux_kernels.formats import FORMATS
from flux_kernels.generation.embedded import embedded_model_path
from flux_kernels.gguf.write import planned_size
from flux_kernels.mixed.cost import CostRow, CostTable
from flux_kernels.mixed.file_layout import (
    KEY_VALUE_BYTES,
    embedded_shapes,
    layout_of_shapes,
    shapes_of_model,
    shapes_of_variant,
)
from flux_kernels.mixed.option import Option
from flux_kernels.mixed.plan_file import Plan
from flux_kernels.models.low_rank_tensors import low_rank_shapes
from flux_kernels.models.names import block_of
from flux_kernels.plan.apply import for_diffusers
from flux_kernels.plan.constraints import Constraints, parse_pair
from flux_kernels.plan.greedy import greedy
from flux_kernels.plan.problem import (
    NO_CONSTRAINTS,
    Problem,
    as_plan,
    curve,
    find_layout,
    make_problem,
    plan_within,
)
from tools.plan_against_greedy import PUBLISHED as PUBLISHED_FILES
from tools.plan_against_greedy import compare, problem_of

from ..mixed.made_costs import made_table

USUAL = {
    "general.architecture": ("STRING", "flux"),
    "general.quantization_version": ("UINT32", 2),
    "general.file_type": ("UINT32", 0),
}


@cache
def embedded():
    return layout_of_shapes(embedded_shapes(), "embedded")


def problem(constraints: Constraints = NO_CONSTRAINTS, table: CostTable | None = None, **options):
    return make_problem(table or made_table(), embedded(), constraints, **options)


@cache
def published():
    return problem_of()


@pytest.mark.parametrize("name", PUBLISHED_FILES)
@pytest.mark.parametrize("size", ["named", "published"])
def test_no_plan_is_worse_than_the_greedy_or_over_the_budget(name, size):
    """At the size in the file's name, at the one it came to, and at those that the greedy came to."""
    bits = float(name.replace("_", ".")) if size == "named" else PUBLISHED_FILES[name]
    row = compare(published(), name, bits)
    assert row.gap == 0
    assert row.plan_bytes <= row.budget
    assert row.held_bytes <= row.budget and row.plan_cost <= row.held_cost
    assert row.at_as_is_bytes <= row.as_is_bytes and row.at_as_is_cost <= row.as_is_cost
    if row.as_is_bytes <= row.budget:
        assert row.plan_cost <= row.as_is_cost


def test_the_greedy_as_it_counts_overshoots():
    """At the nominal size it would be unfair to a plan, which keeps to it: so the greedy is held to bytes."""
    assert compare(published(), "3_0", 3.0).as_is_over > 100e6


def test_the_bytes_of_a_plan_are_those_of_the_writer():
    """Counted by gguf_write over the whole list of tensors, with low-rank corrections among them."""
    table = made_table()
    ranked = [
        CostRow(row.tensor, Option(row.option.type, 8), row.cost * 0.2, row.mfq_cost, row.bytes, 0.1)
        for row in table.rows
        if row.option == Option("Q3_K")
    ]
    table.rows += ranked
    found = problem(table=table)
    plan = plan_within(found, 3_500_000)
    assert plan.low_rank and set(plan.low_rank.values()) == {8}
    tensors = [(name, plan.types[name], shape) for name, shape in embedded().shapes.items()]
    for name, rank in plan.low_rank.items():
        tensors += [(extra, "BF16", shape) for extra, shape in low_rank_shapes(name, embedded().shapes[name], rank).items()]
    assert plan.bytes == planned_size(tensors, USUAL)
    assert plan.bytes + KEY_VALUE_BYTES <= 3_500_000


def test_a_plain_plan_has_exactly_the_bytes_of_the_writer():
    plan = plan_within(problem(), 4_000_000)
    tensors = [(name, plan.types[name], shape) for name, shape in embedded().shapes.items()]
    assert plan.bytes == planned_size(tensors, USUAL)
    assert plan.options["budget"] == 4_000_000 and plan.bytes + KEY_VALUE_BYTES <= 4_000_000


def test_published_sizes_come_out_of_the_layout():
    """krea-dev in the new layout, but for img_in, which is F32 for diffusers: 2 bytes a weight more."""
    layout = layout_of_shapes(shapes_of_variant("flux1-dev"), "flux1-dev")
    blocks = [name for name, shape in layout.shapes.items() if block_of(name) and len(shape) == 2]
    more = 2 * 3072 * 64
    assert layout.file_bytes(dict.fromkeys(blocks, Option("Q8_0"))) == 12_714_452_256 + more
    assert layout.file_bytes(dict.fromkeys(blocks, Option("Q6_K"))) == 9_848_349_984 + more
    assert layout.file_bytes(dict.fromkeys(blocks, Option("Q4_1"))) == 7_536_977_184 + more


def test_the_name_says_the_bits_per_weight():
    layout = layout_of_shapes(shapes_of_variant("flux1-dev"), "flux1-dev")
    blocks = [name for name, shape in layout.shapes.items() if block_of(name) and len(shape) == 2]
    assert layout.file_name(dict.fromkeys(blocks, Option("Q8_0"))) == "flux1-dev_mx8_5.gguf"


def test_a_plan_names_every_tensor_and_its_cost_is_the_sum():
    table = made_table()
    plan = plan_within(problem(), 3_600_000)
    assert list(plan.types) == list(embedded().shapes)
    costs = {(row.tensor, str(row.option)): row.cost for row in table.rows}
    assert plan.cost == pytest.approx(sum(costs.get(item, 0.0) for item in plan.types.items()), rel=1e-12)
    assert plan.types["img_in.weight"] == plan.types["img_in.bias"] == "F32"
    # As the table's 16-bit rows: the source is not rounded.
    assert plan.types["txt_in.weight"] == "F16"


def test_more_bytes_never_cost_more():
    sizes = range(2_800_000, 6_000_000, 400_000)
    costs = [plan_within(problem(), size).cost for size in sizes]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]


def test_the_curve_starts_at_16_bit_and_ends_at_the_smallest():
    points = curve(problem())
    assert points[0][1] == 0
    assert points[-1][0] == embedded().file_bytes(dict.fromkeys(problem().costs, Option("Q2_K")))


def test_what_does_not_fit_is_refused_with_numbers():
    least = r"the smallest file .* has 2,7.* bytes \(\d\.\d\d bits per weight\)"
    with pytest.raises(FormatError, match=f"No plan fits 1,000,000 bytes: {least}"):
        plan_within(problem(), 1_000_000)


def test_keep_and_at_least_and_only_types():
    asked = Constraints(
        keep=(
            ("*.img_mod.*", Option("Q8_0")),
            ("txt_in", Option("F32")),
            ("double_blocks.0.txt_mod.lin", Option("BF16")),
        ),
        at_least=(("single_blocks.1.*", Option("Q5_K")),),
        only_types=(Option("Q2_K"), Option("Q5_K"), Option("Q6_K")),
    )
    plan = plan_within(problem(asked), 5_000_000)
    assert plan.types["double_blocks.0.img_mod.lin.weight"] == "Q8_0"
    assert plan.types["double_blocks.0.txt_mod.lin.weight"] == "BF16"
    assert plan.types["txt_in.weight"] == "F32"
    chosen = {name: kind for name, kind in plan.types.items() if name in problem().costs and "_mod" not in name}
    assert set(chosen.values()) <= {"Q2_K", "Q5_K", "Q6_K"}
    assert all(FORMATS[kind].bits_per_weight >= 5.5 for name, kind in chosen.items() if name.startswith("single_blocks.1."))
    assert plan.options["keep"] == ["*.img_mod.*=Q8_0", "txt_in=F32", "double_blocks.0.txt_mod.lin=BF16"]


def test_same_and_per_block_tie_tensors():
    tied = plan_within(problem(Constraints(same=("*.img_attn.*", "*.img_attn.proj*", "*mlp.0*"))), 3_600_000)
    assert len({kind for name, kind in tied.types.items() if "img_attn" in name and name in problem().costs}) == 1
    assert len({kind for name, kind in tied.types.items() if "mlp.0" in name and name.endswith("weight")}) == 1
    block = plan_within(problem(Constraints(per_block=True)), 3_600_000)
    for wanted in {block_of(name) for name in problem().costs}:
        assert len({kind for name, kind in block.types.items() if block_of(name) == wanted and name in problem().costs}) == 1
    free = plan_within(problem(), 3_600_000)
    assert free.cost < tied.cost and free.cost < block.cost


def greedy_within(problem: Problem, budget: int) -> Plan:
    """Return what MixedQuantFlux's optimiser chooses from the same costs; it may stay below the budget."""
    solution = greedy(problem.groups(), budget - problem.fixed_bytes)
    return as_plan(problem, problem.chosen(solution), {"budget": budget, "optimiser": "greedy"})


def test_the_greedy_is_offered_as_a_plan_too():
    asked = problem(Constraints(per_block=True))
    baseline = greedy_within(asked, 3_600_000)
    assert baseline.options["optimiser"] == "greedy" and baseline.bytes <= 3_600_000
    assert plan_within(asked, 3_600_000).cost <= baseline.cost


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (Constraints(keep=(("*.nothing", Option("Q8_0")),)), "No tensor matches '\\*.nothing'. Tensors are called"),
        (Constraints(keep=(("*.img_mod.*", Option("Q4_0")),)), "was not measured. Measured: F16, Q8_0"),
        (Constraints(only_types=(Option("IQ4_XS"),)), "no measured type is left with only IQ4_XS"),
        (Constraints(at_least=(("*", Option("Q9")),)), "Unknown ggml type 'Q9'"),
        (Constraints(same=("*.nothing",)), "No tensor matches"),
    ],
)
def test_constraints_that_cannot_be_met_say_why(asked, error):
    with pytest.raises(FormatError, match=error):
        plan_within(problem(asked), 4_000_000)


def test_pairs_are_parsed():
    assert parse_pair("*.a=b.*=Q8_0", "--keep") == ("*.a=b.*", Option("Q8_0"))
    for text in ("Q8_0", "=Q8_0", "*.a="):
        with pytest.raises(FormatError, match="--keep takes PATTERN=TYPE|Unknown type ''"):
            parse_pair(text, "--keep")


def test_options_are_types_with_ranks():
    assert Option.parse("Q4_K+r16") == Option("Q4_K", 16) and Option.parse("BF16") == Option("BF16")
    assert str(Option("Q4_K", 16)) == "Q4_K+r16" and str(Option("BF16")) == "BF16"
    for text in ("Q4_K+r0", "Q4_K+r", "Q4_K+16", "q4_k", ""):
        with pytest.raises(FormatError, match="Unknown type"):
            Option.parse(text)


def test_the_model_is_found_or_asked_for(tmp_path):
    assert find_layout(made_table()).model == "embedded"
    assert find_layout(made_table(), "embedded", "old").types["txt_in.weight"] == Option("F16")
    matrix = CostRow("double_blocks.0.img_attn.qkv.weight", Option("Q8_0"), 1.0, 1.0, 9216 * 3072 // 32 * 34, 0.1)
    for file, tensors in (("FLUX.1-dev", 780), ("flux1-schnell.safetensors", 776), ("mine.gguf", 780), ("", 780)):
        found = find_layout(CostTable([matrix], model=file))
        assert len(found.shapes) == tensors
        assert found.model == (file.removesuffix(".safetensors").removesuffix(".gguf") or "flux1-dev")
    foreign = CostTable([CostRow("double_blocks.0.img_attn.qkv.weight", Option("Q4_K"), 1.0, 1.0, 144, 0.1)])
    with pytest.raises(FormatError, match="fits none of flux1-dev.*--model"):
        find_layout(foreign)
    with pytest.raises(FormatError, match="is 144 bytes in the cost table.*--model"):
        make_problem(foreign, embedded())
    with pytest.raises(FormatError, match="Unknown metric"):
        problem(metric="beauty")
    with pytest.raises(GGUFError, match="holds no model"):
        shapes_of_model(tmp_path)


def test_shapes_are_those_of_the_file_that_is_written(tmp_path):
    from flux_kernels.generation.demo import Variant, write_variant

    write_variant(Variant("16 bit", None), tmp_path / "model.gguf")
    assert shapes_of_model(tmp_path / "model.gguf") == embedded_shapes()


def test_the_metric_can_be_the_earlier_one():
    plan = plan_within(problem(metric="mfq_cost"), 4_000_000)
    assert plan.cost == pytest.approx(1000 * plan_within(problem(), 4_000_000).cost)
    assert plan.options["metric"] == "mfq_cost"


def test_a_plan_applied_on_the_fly_has_the_bytes_of_its_file(tmp_path):
    """A model swapped by the plan and saved has the tensors that `quantize` writes, byte for byte."""
    import torch

    import flux_kernels as fk
    from flux_kernels.convert.choose_types import Request
    from flux_kernels.convert.convert import prepare
    from flux_kernels.generation.embedded import embedded_transformer

    plan = plan_within(problem(), 3_600_000)
    plan.save(tmp_path / "plan.json")
    model = embedded_transformer()
    layers = for_diffusers(plan, model)
    fk.swap_linear(model, format=layers)
    fk.save_gguf(model, tmp_path / "swapped.gguf")
    prepare(embedded_model_path() / "transformer", Request(plan=plan)).write(tmp_path / "quantized.gguf")
    swapped, quantized = fk.read_gguf(tmp_path / "swapped.gguf"), fk.read_gguf(tmp_path / "quantized.gguf")
    chosen = {name: kind for name, kind in plan.types.items() if kind in FORMATS}
    assert len(chosen) == len(problem().costs)
    for name, kind in chosen.items():
        assert swapped.tensors[name].format == quantized.tensors[name].format == kind
        assert torch.equal(swapped.tensors[name].data, quantized.tensors[name].data)


def test_a_plan_of_another_model_or_with_ranks_is_not_applied():
    from flux_kernels.generation.embedded import embedded_transformer

    model = embedded_transformer()
    with pytest.raises(FormatError, match="names nothing.weight, which the model does not hold: it was made for another model"):
        for_diffusers(Plan({"nothing.weight": "Q4_K"}, 1, 0.0), model)
    name = "single_blocks.0.linear1.weight"
    with pytest.raises(FormatError, match="low-rank correction"):
        for_diffusers(Plan({name: "Q4_K"}, 1, 0.0, {name: 8}), model)
    assert Plan({name: "Q4_K"}, 1, 0.0, {name: 8}).by_tensor() == {name: Option("Q4_K", 8)}
