"""Test whole steps: no time for a wrong output, counted memory, models that do not fit, resuming."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flux_kernels.benchmark import whole_step
from flux_kernels.benchmark.providers import PROVIDERS, Unavailable
from flux_kernels.benchmark.record import read_csv
from flux_kernels.benchmark.step import jobs as step_jobs
from flux_kernels.benchmark.step import timing as step_timing
from flux_kernels.benchmark.step.inputs import StepConfig, step_inputs
from flux_kernels.benchmark.step.jobs import Job, true_size
from flux_kernels.benchmark.step.timing import COLUMNS, StepCase, measure_format, relative, run
from flux_kernels.benchmark.step.weights import build, build_reference, linear_shapes, make_weights
from flux_kernels.benchmark.whole_step import main, measure_steps, row_key
from flux_kernels.errors import FormatError
from flux_kernels.formats import FORMATS, Packed
from flux_kernels.generation.base_pipeline import one_thread
from flux_kernels.generation.embedded import PIPELINE_KWARGS
from flux_kernels.layers.linear import GGUFLinear

CPU = torch.device("cpu")
MODES = ("ours exact", "ours fp16_accumulate", "ours int8")
SMALL = StepConfig(
    num_layers=2,
    num_single_layers=2,
    num_attention_heads=4,
    attention_head_dim=64,
    joint_attention_dim=64,
    pooled_projection_dim=64,
    axes_dims_rope=(8, 28, 28),
)
CASE = StepCase("step", "64x64", SMALL, 64, 64, 1, 20)


@pytest.fixture(autouse=True)
def threads():
    """Run on one thread: further ones would wait for each other in models as small as these."""
    with one_thread():
        yield


def measure(providers, name="Q8_0", case=CASE, dtype=torch.float32):
    rows = list(measure_format(case, name, list(providers), CPU, dtype, 2, lambda _: None))
    assert all(tuple(row) == COLUMNS for row in rows)
    return {row["provider"]: row for row in rows}


def small_weights(name="Q8_0", dtype=torch.float32):
    return make_weights(SMALL, FORMATS[name], CPU, dtype)


@pytest.fixture
def planes(monkeypatch):
    """Hold the rows as a GPU does: as field planes, which diffusers cannot read."""

    def rearranged(*arguments):
        weights = make_weights(*arguments)
        for name, one in weights.packed.items():
            weights.packed[name] = replace(
                one, weight=Packed(one.weight.fmt.layout.to_planes(one.weight.data), one.weight.fmt, True)
            )
        return weights

    monkeypatch.setattr(step_timing, "make_weights", rearranged)


def test_random_weights_differ_between_blocks_and_have_bytes_of_their_own():
    weights = small_weights("Q4_K")
    first, second = (weights.packed[f"transformer_blocks.{i}.ff.net.2"].weight.data for i in (0, 1))
    assert not torch.equal(first, second) and torch.equal(first.roll(1, 0), second)
    assert len({one.weight.data.data_ptr() for one in weights.packed.values()}) == len(weights.packed)
    outside = {name for name in linear_shapes(SMALL) if "blocks." not in name}
    assert set(weights.plain) == outside and len(outside) == 10
    held = sum(parameter.nbytes for parameter in build(weights, "ours exact").parameters())
    assert held == weights.nbytes()
    whole = sum(parameter.nbytes for parameter in build(weights, "torch").parameters())
    assert whole == weights.nbytes(unquantized=True)


def test_every_mode_is_timed_and_its_price_is_told():
    rows = measure(("torch", "dequantize", *MODES))
    assert all(row["p50_ms"] and int(row["peak_bytes"]) > int(row["weight_bytes"]) for row in rows.values())
    assert float(rows["ours exact"]["error"]) < 1e-5 < float(rows["ours int8"]["error"]) < 0.05
    assert rows["torch"]["weight_bytes"] > 3 * rows["ours exact"]["weight_bytes"]


def test_modes_spare_the_layers_that_swap_linear_spares():
    model = build(small_weights(), "ours int8")
    modes = {name: layer.compute for name, layer in model.named_modules() if isinstance(layer, GGUFLinear)}
    assert modes["transformer_blocks.1.norm1_context.linear"] == "exact"
    assert modes["single_transformer_blocks.0.proj_out"] == "int8"


def test_a_wrong_output_has_no_time(monkeypatch):
    """One matrix of 56 times 1.5 is far beyond noise of 1 % a layer, in every 16-bit mode."""
    made = step_timing.build

    def wrong(weights, provider, first_blocks_only=False):
        model = made(weights, provider, first_blocks_only)
        if provider == "ours exact":
            model.single_transformer_blocks[1].proj_out.register_forward_hook(lambda _m, _x, y: 1.5 * y)
        return model

    monkeypatch.setattr(step_timing, "build", wrong)
    rows = measure(("torch", "ours exact"), dtype=torch.bfloat16)
    assert rows["torch"]["p50_ms"] and rows["ours exact"]["p50_ms"] == "" and rows["ours exact"]["peak_bytes"] == ""
    assert rows["ours exact"]["note"].startswith("wrong result: relative error")


def test_the_gate_is_what_noise_of_each_layer_adds_up_to():
    """Noise of no size gives float32's own error, none; ten times the noise about ten times the error."""
    weights = small_weights()
    oracle = step_timing.Oracle(weights, step_inputs(SMALL, 64, 64, 1, CPU, torch.float32, text=20))
    small, large = oracle.gate(0.001), oracle.gate(0.01)
    assert oracle.gate(0.0) == 0.0 and 0.0005 < small < 0.01 and large == pytest.approx(10 * small, rel=0.3)
    assert oracle.gate(1000.0) == step_timing.LARGEST_GATE


def test_a_model_that_does_not_fit_reuses_one_block_of_each_kind(monkeypatch):
    """The row says so, its bytes are the whole model's; a reference that reuses blocks judges it."""
    weights = small_weights()
    reused = build(weights, "torch", first_blocks_only=True)
    assert sum(parameter.nbytes for parameter in reused.parameters()) < 0.6 * weights.nbytes(unquantized=True)
    inputs = step_inputs(SMALL, 64, 64, 1, CPU, torch.float32, text=20)
    own, other = run(build_reference(weights, first_blocks_only=True), inputs), run(build_reference(weights), inputs)
    assert relative(run(reused, inputs), own) < 1e-5 and relative(run(reused, inputs), other) > 0.1
    monkeypatch.setattr(step_timing, "free_bytes", lambda _: 0)
    rows = measure(("torch", "ours exact"))
    assert rows["torch"]["p50_ms"] and "does not fit: one double and one single block" in rows["torch"]["note"]
    assert rows["torch"]["weight_bytes"] == weights.nbytes(unquantized=True) and not rows["ours exact"]["note"]


@pytest.mark.parametrize(("free", "rounds"), [(None, 1), (0, 2)])
def test_two_arrangements_of_the_rows_go_in_rounds_where_they_do_not_fit(monkeypatch, planes, free, rounds):
    pytest.importorskip("diffusers")
    seen = []
    timed = step_timing.interleaved
    monkeypatch.setattr(step_timing, "interleaved", lambda work, *more: (seen.append(list(work)), timed(work, *more))[1])
    monkeypatch.setattr(step_timing, "free_bytes", lambda _: free)
    rows = measure(("torch", "diffusers", "ours exact", "ours int8"))
    whole = ["torch", "diffusers", "ours exact", "ours int8"]
    assert seen == ([whole] if rounds == 1 else [["torch", "ours exact", "ours int8"], ["torch", "diffusers"]])
    assert len(rows) == 4 and all(row["p50_ms"] for row in rows.values())
    assert ("in a round of its own" in rows["diffusers"]["note"]) == (rounds == 2)


def test_no_round_is_made_for_what_is_not_installed(monkeypatch, planes):
    def absent(problem):
        raise Unavailable("not installed: diffusers")

    monkeypatch.setitem(PROVIDERS, "diffusers", replace(PROVIDERS["diffusers"], make=absent))
    monkeypatch.setattr(step_timing, "free_bytes", lambda _: 0)
    words = []
    rows = list(measure_format(CASE, "Q8_0", ["torch", "diffusers", "ours exact"], CPU, torch.float32, 1, words.append))
    assert sum("timing" in text for text in words) == 1
    assert [row["note"] for row in rows if row["provider"] == "diffusers"] == ["not installed: diffusers"]


def test_a_failure_of_another_library_is_a_note_and_one_of_ours_an_error(monkeypatch):
    made = step_timing.build

    def failing(weights, provider, first_blocks_only=False):
        if provider == bad:
            raise ValueError("it broke")
        return made(weights, provider, first_blocks_only)

    monkeypatch.setattr(step_timing, "build", failing)
    bad = "dequantize"
    assert measure(("torch", "dequantize"))["dequantize"]["note"] == "ValueError: it broke"
    bad = "ours exact"
    with pytest.raises(ValueError, match="it broke"):
        measure(("torch", "ours exact"))


def test_a_row_is_there_as_soon_as_its_provider_is_timed(monkeypatch):
    """A run that stops at the second provider has the first one's row; first blocks are checked alone."""
    checked = []
    made = step_timing.build_reference

    def noted(weights, *more, **options):
        checked.append(weights.config)
        return made(weights, *more, **options)

    monkeypatch.setattr(step_timing, "build_reference", noted)
    rows = measure_format(replace(CASE, at_once=True), "Q8_0", ["torch", *MODES], CPU, torch.float32, 2, lambda _: None)
    first = next(rows)
    assert first["provider"] == "torch" and first["p50_ms"]
    assert {(config.num_layers, config.num_single_layers) for config in checked} == {(1, 1)}
    assert [row["provider"] for row in rows if row["p50_ms"]] == list(MODES)


def test_a_wrong_first_block_has_no_time_when_rows_are_made_at_once(monkeypatch):
    made = step_timing.build

    def wrong(weights, provider, first_blocks_only=False):
        model = made(weights, provider, first_blocks_only)
        if provider == "ours exact":
            model.single_transformer_blocks[0].proj_out.register_forward_hook(lambda _m, _x, y: 1.5 * y)
        return model

    monkeypatch.setattr(step_timing, "build", wrong)
    rows = measure(("torch", "ours exact"), case=replace(CASE, at_once=True), dtype=torch.bfloat16)
    assert rows["torch"]["p50_ms"] and rows["ours exact"]["note"].startswith("wrong result: relative error")


def test_the_first_blocks_are_the_same_tensors():
    weights = small_weights("Q4_K")
    first = weights.first_blocks()
    assert set(first.packed) == {name for name in weights.packed if "blocks.0." in name}
    assert all(one is weights.packed[name] for name, one in first.packed.items())
    assert set(linear_shapes(first.config)) == set(first.packed) | set(first.plain)


def test_sizes_are_read_and_wrong_ones_refused():
    case = true_size("1360x768 batch 2")
    assert (case.width, case.height, case.batch, case.config) == (1360, 768, 2, StepConfig())
    for size in ("1024", "1000x1024", "0x16", "16x16 batch 0", "1024x1024 batch"):
        with pytest.raises(FormatError, match="multiples of 16"):
            true_size(size)
    with pytest.raises(FormatError):
        next(measure_steps(["Q9_K"], CPU))


def test_the_true_size_runs_on_a_cpu_on_demand(monkeypatch):
    monkeypatch.setattr(step_jobs, "FLUX_DEV", SMALL)
    monkeypatch.setattr(step_jobs, "TEXT", 20)
    rows = list(measure_steps(["Q8_0"], CPU, size="32x48 batch 2", repeats=1, full=True, denoising=False))
    assert {(row["what"], row["size"], row["format"]) for row in rows} == {("step", "32x48 batch 2", "Q8_0")}
    assert all(row["p50_ms"] for row in rows if row["provider"] != "diffusers")


def test_rows_that_are_there_are_not_measured_again(tmp_path, monkeypatch, capsys):
    """The command writes every column of the embedded step; a second call measures what is missing."""
    monkeypatch.setattr(whole_step, "denoising_job", lambda *_: Job((), "", [], {}, lambda *_: []))
    # Others may commit
    monkeypatch.setattr(step_jobs, "origin", lambda _: dict(device="a CPU", commit="abc", date="2026-01-01"))
    path = tmp_path / "step.csv"
    command = ["--write", str(path), "--device", "cpu", "--formats", "Q8_0", "--repeats", "2"]
    assert main(command) == 0
    rows = read_csv(path)
    assert list(rows[0])[: len(COLUMNS)] == list(COLUMNS) and all(row["commit"] and row["date"] for row in rows)
    assert len(rows) == len({row_key(row) for row in rows}) and {"torch", *MODES} <= {row["provider"] for row in rows}
    assert all("off the unquantized model's output" in row["note"] for row in rows if row["p50_ms"])
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    capsys.readouterr()
    assert main(command) == 0
    assert read_csv(path)[:-1] == rows[:-1] and len(read_csv(path)) == len(rows)
    assert main(command) == 0
    assert "#" not in capsys.readouterr().out.split("timing")[-1]


def test_the_command_refuses_in_one_sentence(tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    for command, words in ((["--formats", "Q9_K"], "Unknown block format"), (["--write", str(other)], "other rows")):
        with pytest.raises(SystemExit) as refusal:
            main([*command, "--device", "cpu"])
        assert refusal.value.code == 2 and words in capsys.readouterr().err
    assert other.read_text() == "a,b\n1,2\n"


def test_out_of_time_begins_nothing():
    assert list(measure_steps(["Q8_0"], CPU, minutes=0.0)) == []


def test_a_denoising_run_is_timed_and_says_what_offload_needs(monkeypatch):
    """Three float32 sides of two steps of the embedded model: where layers agree, so do the steps."""
    pytest.importorskip("diffusers")
    monkeypatch.setitem(PIPELINE_KWARGS, "num_inference_steps", 2)
    from flux_kernels.benchmark.step.denoising import measure_denoising

    rows = measure_denoising("Q8_0", ["torch", "ours exact", "ours int8"], CPU, torch.float32, 1, lambda _: None)
    assert len(rows) == 6 and all(tuple(row) == COLUMNS for row in rows)
    run_, offloaded = rows[::2], rows[1::2]
    assert all(row["p50_ms"] and int(row["peak_bytes"]) > int(row["weight_bytes"]) for row in run_)
    assert float(run_[1]["error"]) < 1e-4 < float(run_[2]["error"]) < 0.1
    assert all(row["p50_ms"] == "" and "needs a GPU" in row["note"] for row in offloaded)
