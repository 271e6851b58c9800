"""Costs: equal to a plain run of the whole model with the weights quantized, however they were come by."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import flux_kernels as fk
from flux_kernels.cli import app
from flux_kernels.errors import FormatError, GGUFError
from flux_kernels.generation.base_pipeline import one_thread
from flux_kernels.measure import run as measure_run
from flux_kernels.measure.log import log_path
from flux_kernels.measure.measured_model import find_source, open_transformer
from flux_kernels.measure.measurer import Measurer, bootstrap, measure_joint
from flux_kernels.measure.stages import Stages
from flux_kernels.measure.states import States
from flux_kernels.mixed.cost import COLUMNS, CostRow, CostTable, JointRow, sidecar
from flux_kernels.mixed.imatrix import load_imatrix

from ..mixed.captured import COUNT, embedded_pipeline, states

QKV, LINEAR1 = "double_blocks.0.img_attn.qkv.weight", "single_blocks.1.linear1.weight"
PARTS = {
    QKV: [f"transformer_blocks.0.attn.to_{part}" for part in "qkv"],
    LINEAR1: [f"single_transformer_blocks.1.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")],
}
# The same float32 arithmetic on batches of other sizes: sums of 24 tokens or of 1280 products differ in the last bits,
# relative to an error of 1e-2 of the velocity that is 1e-4, squared twice that.
CLOSE = 1e-3


@cache
def measurer() -> Measurer:
    return Measurer(embedded_pipeline().transformer, states())


def plain_run(types: dict[str, str]) -> tuple[float, float]:
    """Return (cost, MixedQuantFlux's metric) by the definition: the whole model, state by state, no stages, no caches."""
    model = embedded_pipeline().transformer
    last = []
    hook = model.single_transformer_blocks[-1].register_forward_hook(lambda _m, _i, out: last.append(torch.cat(out, 1)))
    own = {part: model.get_submodule(part).weight.data for tensor in types for part in PARTS[tensor]}
    try:
        with torch.no_grad():
            expected = [model(**state.inputs).sample for state in states()]
            for tensor, kind in types.items():
                whole = torch.cat([own[part] for part in PARTS[tensor]])
                packed = fk.quantize(whole, kind, measurer().channel_weights(tensor))
                rows = fk.dequantize(packed, kind).split([own[part].shape[0] for part in PARTS[tensor]])
                for part, weight in zip(PARTS[tensor], rows, strict=True):
                    model.get_submodule(part).weight.data = weight
            got = [model(**state.inputs).sample for state in states()]
    finally:
        hook.remove()
        for part, weight in own.items():
            model.get_submodule(part).weight.data = weight
    weights = [state.dsigma**2 for state in states()]
    error = sum(w * (a - b).double().square().mean() for w, a, b in zip(weights, got, expected, strict=True))
    signal = sum(w * b.double().square().mean() for w, b in zip(weights, expected, strict=True))
    half = len(expected)
    stack = sum((a - b).double().square().mean() for a, b in zip(last[half:], last[:half], strict=True)) / half
    return (error / signal).item(), stack.item()


@pytest.mark.parametrize(("tensor", "kind"), [(QKV, "Q4_K"), (QKV, "Q8_0"), (LINEAR1, "Q2_K")])
def test_a_cost_is_that_of_a_plain_run(tensor, kind):
    row = measurer().measure_one(tensor, kind)
    cost, mfq_cost = plain_run({tensor: kind})
    assert row.cost == pytest.approx(cost, rel=CLOSE) and row.mfq_cost == pytest.approx(mfq_cost, rel=CLOSE)
    assert row.bytes == measurer().tensors[tensor].shape[0] * fk.FORMATS[kind].row_bytes(256)
    weight = torch.cat([embedded_pipeline().transformer.get_submodule(part).weight for part in PARTS[tensor]]).detach()
    packed = fk.quantize(weight, kind, measurer().channel_weights(tensor))
    rms = (fk.dequantize(packed, kind) - weight).norm() / weight.norm()
    assert row.error_weight_rms == pytest.approx(rms.item(), rel=1e-5)


def test_a_plan_is_measured_as_a_whole():
    types = {QKV: "Q3_K", LINEAR1: "Q4_K"}
    row = measurer().measure_joint(types)
    cost, mfq_cost = plain_run(types)
    assert row.cost == pytest.approx(cost, rel=CLOSE) and row.mfq_cost == pytest.approx(mfq_cost, rel=CLOSE)
    assert row.cost_low <= row.cost <= row.cost_high
    alone = measurer().measure_one(QKV, "Q3_K")
    assert measurer().measure_joint({QKV: "Q3_K"}).cost == alone.cost
    assert measure_joint(embedded_pipeline().transformer, states(), types) == row.cost
    assert measurer().measure_joint({**types, "single_blocks.0.linear2.weight": "BF16"}).cost == row.cost


def test_order_does_not_matter():
    """Kept hidden states are those of the unquantized model, wherever the measurement before began."""
    fresh = Measurer(embedded_pipeline().transformer, states())
    late = fresh.measure_one(LINEAR1, "Q4_K")
    early = fresh.measure_one(QKV, "Q4_K")
    assert (early, late) == (measurer().measure_one(QKV, "Q4_K"), measurer().measure_one(LINEAR1, "Q4_K"))


def test_stages_are_the_forward_pass():
    model = embedded_pipeline().transformer
    stages = Stages(model)
    assert stages.last == 4
    assert [stages.stage_of(name) for name in ("x_embedder", "transformer_blocks.0.ff.net.2", "proj_out")] == [0, 1, 4]
    assert stages.stage_of("single_transformer_blocks.1.proj_mlp.weight") == 3
    with torch.no_grad():
        for state in states()[:2]:
            hidden = stages.embed(state.inputs)
            for stage in range(1, stages.last):
                hidden = stages.block(stage, hidden)
            assert torch.equal(stages.velocity(hidden), model(**state.inputs).sample)


def test_stages_of_a_model_without_guidance():
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    sizes = dict(in_channels=16, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=48, pooled_projection_dim=24)
    model = FluxTransformer2DModel(num_layers=2, num_single_layers=1, axes_dims_rope=(8, 12, 12), **sizes).eval()
    inputs = dict(
        hidden_states=torch.randn(2, 6, 16),
        encoder_hidden_states=torch.randn(2, 5, 48),
        pooled_projections=torch.randn(2, 24),
        timestep=torch.tensor([0.3, 0.9]),
        img_ids=torch.tensor([[0, row, column] for row in range(2) for column in range(3)]).float(),
        txt_ids=torch.zeros(5, 3),
    )
    stages = Stages(model)
    with torch.no_grad():
        hidden = stages.embed(inputs)
        for stage in range(1, stages.last):
            hidden = stages.block(stage, hidden)
        assert stages.last == 4 and torch.equal(stages.velocity(hidden), model(**inputs).sample)


def test_importance_is_the_sum_of_squares_of_the_inputs():
    model = embedded_pipeline().transformer
    seen = []
    hook = model.get_submodule(PARTS[QKV][2]).register_forward_pre_hook(lambda _m, given: seen.append(given[0].flatten(0, 1)))
    try:
        with torch.no_grad():
            for state in states():
                model(**state.inputs)
    finally:
        hook.remove()
    sums, count = measurer().importance[QKV]
    x = torch.cat(seen).double()
    assert count == x.shape[0] == sum(state.inputs["hidden_states"].shape[1] for state in states())
    torch.testing.assert_close(sums.double(), x.square().sum(0), rtol=1e-5, atol=0)
    assert measurer().importance.keys() == measurer().tensors.keys()
    assert Measurer(model, states()[:1], importance=None).channel_weights(QKV) is None


def test_the_model_stays_as_it_was():
    model = embedded_pipeline().transformer
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fresh = Measurer(model, states())
    fresh.measure_joint({QKV: "Q2_K", LINEAR1: "Q2_K"})
    with pytest.raises(RuntimeError):
        fresh.changed({f"{PARTS[QKV][0]}.weight": torch.ones(3, 3)})
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_what_cannot_be_measured_is_refused():
    packed = open_transformer(find_source(), torch.device("cpu"), torch.float32)[0]
    fk.swap_linear(packed, "torch", format="Q8_0", include="*transformer_blocks.*")
    with pytest.raises(FormatError, match="quantized already"):
        Measurer(packed, states())
    other = open_transformer(find_source(), torch.device("cpu"), torch.float32)[0]
    other.proj_out.weight.data *= 1.5
    with pytest.raises(FormatError, match="captured with another model: its velocities differ by"):
        Measurer(other, states())
    with pytest.raises(FormatError, match="no matrix 'nothing' to measure"):
        measurer().measure_one("nothing", "Q4_K")


def test_bootstrap_covers_the_mean_of_equal_states_and_widens():
    ones = torch.ones(64, dtype=torch.float64)
    assert bootstrap(ones, ones, ones) == (1.0, 1.0)
    spread = torch.linspace(0, 2, 64, dtype=torch.float64)
    low, high = bootstrap(spread, ones, ones)
    # 1 +- 1.96 * 0.586 / 8, within the noise of 2000 resamples
    assert low == pytest.approx(0.856, abs=0.02) and high == pytest.approx(1.144, abs=0.02)


# The table


def test_tables_are_given_back(tmp_path):
    rows = [CostRow("a", "F16", 0.0, 0.0, 10, 0.0), CostRow("a", "Q4_K", 1e-3, 2.5, 3, 0.1)]
    table = CostTable(rows, model="m", states=dict(count=2), joint=[JointRow({"a": "Q4_K"}, 1.0, 2.0, 0.5, 1.5, "abc")])
    path = tmp_path / "costs.csv"
    table.save(path)
    assert CostTable.load(path) == table and table.by_tensor()["a"]["Q4_K"].bytes == 3
    assert path.read_text().splitlines()[0] == "tensor,type,cost,mfq_cost,bytes,error_weight_rms" == ",".join(COLUMNS)
    assert json.loads(sidecar(path).read_text())["schema"] == "flux_kernels.costs/1"
    sidecar(path).unlink()
    assert CostTable.load(path).rows == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor,type,cost\n", "lacks the columns mfq_cost, bytes, error_weight_rms"),
        (f"{','.join(COLUMNS)}\na,Q4_K,much,0,1,0\n", "line 2: could not convert"),
        (f"{','.join(COLUMNS)}\na,Q4_K,nan,0,1,0\n", "line 2: costs, bytes and errors are finite"),
        (f"{','.join(COLUMNS)}\na,Q4_K,0,0,-1,0\n", "line 2: costs, bytes and errors are finite"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, text, message):
    path = tmp_path / "costs.csv"
    path.write_text(text)
    with pytest.raises(FormatError, match=message):
        CostTable.load(path)


def test_a_sidecar_of_another_schema_is_refused(tmp_path):
    path = tmp_path / "costs.csv"
    CostTable([]).save(path)
    sidecar(path).write_text('{"schema": "other"}')
    with pytest.raises(FormatError, match="does not have the schema"):
        CostTable.load(path)


# Whole measurements: logs, processes, resuming

TYPES = ("Q8_0", "Q4_K")


@pytest.fixture
def request_in(tmp_path):
    """Return what makes a request into a folder of its own, with the states that are captured already."""

    def make(name: str, **more) -> measure_run.Request:
        folder = tmp_path / name
        source = find_source()
        States(states(), source.name, source.sha256()).save(folder / "costs.states.safetensors")
        return measure_run.Request(out=folder / "costs.csv", source=source, **{"types": TYPES, **more})

    return make


@pytest.fixture(scope="module", autouse=True)
def same_thread_count():
    """Compute on one thread here as `in_process` does in a fork: the last bits of costs depend on the number."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the table that one process measures."""
    folder, source = tmp_path_factory.mktemp("whole"), find_source()
    States(states(), source.name, source.sha256()).save(folder / "costs.states.safetensors")
    request = measure_run.Request(out=folder / "costs.csv", source=source, types=TYPES)
    table = measure_run.measure(measure_run.open_measurement(request))
    return SimpleNamespace(table=table, request=request)


def in_process(request, rank: int, size: int, die_at: int | None = None) -> int:
    """Measure a share in a process of its own, which kills itself at an item; return its exit code."""

    def work():
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
        seen = []

        def progress(what, _done, _total):
            seen.extend([what] if " Q" in what else [])
            if die_at is not None and len(seen) > die_at:
                os.kill(os.getpid(), signal.SIGKILL)

        world = measure_run.World.from_environment()
        measure_run.measure(measure_run.open_measurement(request, world, progress), world, progress)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(120)
    return process.exitcode


def test_a_table_has_every_tensor_and_type(whole):
    table = whole.table
    by_tensor = table.by_tensor()
    assert list(by_tensor) == list(measurer().tensors) and len(by_tensor) == 16
    for rows in by_tensor.values():
        assert list(rows) == ["F16", *TYPES]
        assert rows["F16"].cost == 0 < rows["Q8_0"].cost < rows["Q4_K"].cost
        assert rows["F16"].bytes > rows["Q8_0"].bytes > rows["Q4_K"].bytes
    assert by_tensor[QKV]["Q4_K"] == measurer().measure_one(QKV, "Q4_K")
    assert table.states["count"] == len(states()) and table.importance == "collected"
    assert CostTable.load(whole.request.out) == table
    found = load_imatrix(whole.request.imatrix_path)
    torch.testing.assert_close(found[QKV], measurer().channel_weights(QKV))


def test_plans_are_measured_as_their_table_was(whole, tmp_path):
    """The importance beside the table is that of its rows, so that a plan of one tensor costs what its row says."""
    folder = shutil.copytree(whole.request.out.parent, tmp_path / "copy")
    request = replace(whole.request, out=folder / "costs.csv").as_table()
    row = measure_run.measure_plan(measure_run.open_measurement(request), {LINEAR1: "Q4_K"})
    # The file holds sums and counts in float32 and gives their ratio: channels on a rounding edge may fall otherwise
    assert row.cost == pytest.approx(whole.table.by_tensor()[LINEAR1]["Q4_K"].cost, rel=1e-3)


def test_a_plan_that_only_partly_names_this_model_is_refused(request_in, tmp_path):
    """Before anything is measured: skipping what is not there would give the cost of another plan."""
    from flux_kernels.mixed.plan_file import Plan

    types = {QKV: "Q4_K", "double_blocks.7.img_attn.qkv.weight": "Q4_K", "final_layer.linear.weight": "F16"}
    Plan(types, bytes=1, cost=0.0).save(tmp_path / "plan.json")
    request = request_in("foreign plan")
    done = CliRunner().invoke(app, ["measure", "--out", str(request.out), "--plan", str(tmp_path / "plan.json")])
    assert done.exit_code == 1
    assert "names double_blocks.7.img_attn.qkv.weight, which the model does not hold" in " ".join(done.output.split())
    with pytest.raises(FormatError, match="which the model does not hold"):
        measure_run.measure_plan(measure_run.open_measurement(request), types)


def test_killed_and_resumed_gives_the_same_table(whole, request_in):
    request = request_in("killed")
    assert in_process(request, 0, 1, die_at=10) == -signal.SIGKILL
    log = log_path(request.out, 0)
    assert not request.out.exists() and len(log.read_bytes().splitlines()) == 11
    with log.open("ab") as file:
        file.write(b'{"tensor": "double_bl')  # the line that was being written
    measured = []
    opened = measure_run.open_measurement(request)
    table = measure_run.measure(opened, progress=lambda what, *_: measured.append(what))
    assert table == whole.table and len([what for what in measured if " Q" in what]) == 32 - 10
    assert request.out.read_bytes() == whole.request.out.read_bytes()


def test_two_processes_give_the_table_of_one(whole, request_in):
    request = request_in("two")
    assert in_process(request, 1, 2) == 0
    assert not request.out.exists()  # half is missing
    assert in_process(request, 0, 2) == 0
    assert request.out.read_bytes() == whole.request.out.read_bytes()
    assert all(len(log_path(request.out, rank).read_bytes().splitlines()) == 17 for rank in (0, 1))


def test_logs_of_something_else_are_refused(whole, request_in):
    request = request_in("other")
    log_path(request.out, 0).write_bytes(log_path(whole.request.out, 0).read_bytes())
    assert measure_run.measure(measure_run.open_measurement(request)) == whole.table  # of the same, it is taken as it is
    unweighted = request_in("other", weighted=False)
    with pytest.raises(FormatError, match="was begun with another importance"):
        measure_run.measure(measure_run.open_measurement(unweighted))
    log = log_path(request.out, 0)
    log.write_bytes(b"something else\n")
    with pytest.raises(FormatError, match="is no log of this version"):
        measure_run.measure(measure_run.open_measurement(request))


def test_states_of_another_model_are_refused(request_in):
    request = request_in("foreign")
    States(states(), "another", "0" * 64).save(request.states_path)
    with pytest.raises(FormatError, match=r"was captured with another model \(another"):
        measure_run.open_measurement(request)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(count=1), f"{COUNT} states, not 1"),
        (dict(steps=99), "runs of 4 steps, not 99"),
        (dict(seed=12345), "not 12345"),
        (dict(prompts=["none of them"]), "of another prompt"),
        (dict(sizes=[(512, 512)]), "states of .* pixels"),
    ],
)
def test_states_that_were_not_asked_for_are_refused(request_in, asked, message):
    """They lie there from an earlier run; taking them in silence would answer another question."""
    with pytest.raises(FormatError, match=f"is there already and holds .*{message}"):
        measure_run.open_measurement(request_in("unlike", **asked))


def test_world(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FormatError, match="RANK is 3 of WORLD_SIZE 2"):
        measure_run.World.from_environment()
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(FormatError, match="are numbers"):
        measure_run.World.from_environment()


# Models of the user


def test_16_bit_files_of_every_kind_are_the_same_model(tmp_path):
    from safetensors.torch import save_file

    cpu = torch.device("cpu")
    expected, kind = open_transformer(find_source(), cpu, torch.float32)
    fk.save_gguf(expected.half(), tmp_path / "f16.gguf")
    tensors = {name: tensor.data for name, tensor in fk.read_gguf(tmp_path / "f16.gguf").tensors.items()}
    save_file(tensors, tmp_path / "bfl.safetensors")
    for source in (find_source(gguf=tmp_path / "f16.gguf"), find_source(model=tmp_path / "bfl.safetensors")):
        model, found = open_transformer(source, cpu, torch.float32)
        assert found == kind == "F16"
        got = dict(model.named_parameters())
        assert all(torch.equal(got[name], parameter.float()) for name, parameter in expected.named_parameters())
    del tensors["img_in.weight"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(GGUFError, match=r"short.safetensors: "):
        open_transformer(find_source(model=tmp_path / "short.safetensors"), cpu, torch.float32)
    fk.swap_linear(expected, "torch", format="Q8_0", include="*transformer_blocks.*")
    fk.save_gguf(expected, tmp_path / "q8.gguf")
    with pytest.raises(FormatError, match=r"is quantized \(Q8_0\)"):
        open_transformer(find_source(gguf=tmp_path / "q8.gguf"), cpu, torch.float32)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="was not found"):
        find_source(gguf=tmp_path / "no.gguf")
    with pytest.raises(FileNotFoundError, match="was not found"):
        find_source(model=tmp_path)
    with pytest.raises(FormatError, match="not both"):
        find_source(gguf=tmp_path / "a", model=tmp_path / "b")
    with pytest.raises(FormatError, match="without a transformer"):
        find_source(base=tmp_path)


# The command


def test_the_command_measures_and_evaluates_plans(whole, request_in, tmp_path):
    from flux_kernels.mixed.plan_file import Plan

    request = request_in("command", types=("Q8_0",))
    arguments = ["measure", "--out", str(request.out), "--types", "Q8_0", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert facts["complete"] and facts["rows"] == 32
    Plan({QKV: "Q4_K", "double_blocks.0.img_mod.lin.weight": "F16"}, bytes=1, cost=0.0).save(tmp_path / "plan.json")
    done = CliRunner().invoke(app, [*arguments, "--plan", str(tmp_path / "plan.json")])
    assert done.exit_code == 0, done.output
    expected = whole.table.by_tensor()[QKV]["Q4_K"].cost
    assert json.loads(done.stdout)["cost"] == pytest.approx(expected, rel=CLOSE)
    (kept,) = CostTable.load(request.out).joint
    assert kept.types == {QKV: "Q4_K"} and kept.cost == pytest.approx(expected, rel=CLOSE)
    # The importance is read back from its file here: sums and counts in float32, so a weight on an edge may fall otherwise


def test_a_written_file_costs_what_was_measured(whole, tmp_path):
    """Measure, quantize, load: the velocities of the file's packed layers have the error that the plan was measured with."""
    from flux_kernels.mixed.plan_file import Plan

    request = whole.request
    types = {name: ("Q8_0", "Q4_K")[index % 2] for index, name in enumerate(measurer().tensors)}
    Plan(types, bytes=1, cost=0.0).save(tmp_path / "plan.json")
    done = CliRunner().invoke(
        app,
        ["quantize", str(request.source.files[0].parent), str(tmp_path / "mixed.gguf"), "--plan", str(tmp_path / "plan.json")]
        + ["--imatrix", str(request.imatrix_path), "--json"],
    )
    assert done.exit_code == 0, done.output
    model = fk.load_flux(tmp_path / "mixed.gguf", dtype=torch.float32, backend="torch")
    error = magnitude = 0.0
    with torch.no_grad():
        for state in states():
            difference = (model(**state.inputs).sample - state.velocity).double()
            error += state.dsigma**2 * difference.square().mean().item()
            magnitude += state.dsigma**2 * state.velocity.double().square().mean().item()
    assert error / magnitude == pytest.approx(measurer().measure_joint(types).cost, rel=CLOSE)


def test_a_plan_with_corrections_is_measured_as_its_file_is_made(whole, tmp_path):
    """Corrections are fitted to the inputs' covariance, also where no table with such options lies beside it."""
    from flux_kernels.mixed.plan_file import Plan

    Plan({QKV: "Q2_K"}, bytes=1, cost=0.0, low_rank={QKV: 8}).save(tmp_path / "plan.json")
    arguments = ["measure", "--out", str(tmp_path / "joint.csv"), "--states-file", str(whole.request.states_path)]
    done = CliRunner().invoke(app, [*arguments, "--plan", str(tmp_path / "plan.json"), "--json"])
    assert done.exit_code == 0, done.output
    fitted = Measurer(embedded_pipeline().transformer, states(), covariance=True).measure_joint({QKV: "Q2_K+r8"})
    assert json.loads(done.stdout)["cost"] == pytest.approx(fitted.cost, rel=CLOSE)


@pytest.mark.parametrize(("count", "noted"), [(31, True), (32, False)])
def test_few_states_for_a_rank_are_noted(whole, tmp_path, count, noted):
    from rich.console import Console

    from flux_kernels.cli.measure import _report_table

    table = replace(whole.table, states={**whole.table.states, "count": count})
    console = Console(record=True, width=200)
    _report_table(console, table, replace(whole.request, types=("Q8_0", "Q4_K+r8")), False)
    assert ("Take --states 32 or more" in console.export_text()) == noted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--types", "Q9"], "Unknown type 'Q9'"),
        (["--sizes", "1000x1000"], "multiples of 16"),
        (["--device", "warp"], "'warp' cannot be used here"),
        (["--gguf", "no.gguf"], "was not found"),
        (["--out", "none/costs.csv"], "--out none/costs.csv: there is no folder none. Make it"),
        (["--states-file", "none/states"], "--states-file none/states: there is no folder none. Make it"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, arguments, message):
    done = CliRunner().invoke(app, ["measure", "--out", str(tmp_path / "costs.csv"), *arguments])
    assert done.exit_code == 1 and message in " ".join(done.output.split())
