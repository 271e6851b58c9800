"""Per-layer fidelity on a user's own activations, and the mode map made from it."""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch
from torch import nn

import flux_kernels as fk
from flux_kernels.calibration.fidelity_report import SHOWN, FidelityReport, LayerError


@pytest.fixture
def model() -> nn.Module:
    """Two layers, the first of which sees activations with strong outlier channels."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("first", nn.Linear(512, 256))
    model.add_module("second", nn.Linear(256, 128))
    fk.swap_linear(model, "torch", format="Q8_0")
    return model


def activations() -> torch.Tensor:
    x = torch.randn(40, 512)
    x[:, ::100] *= 100
    return x


def test_errors_are_ordered_and_layers_told_apart(model):
    report = fk.fidelity(model, {"input": activations()})
    errors = {(row.layer, row.compute): row.relative_error for row in report.rows}
    assert len(errors) == 6
    for layer in ("first", "second"):
        # float32 activations and weights.
        assert errors[layer, "exact"] < 1e-6
        assert errors[layer, "exact"] < errors[layer, "fp16_accumulate"] < errors[layer, "int8"]
    assert errors["first", "int8"] > 2 * errors["second", "int8"]
    assert len(json.loads(report.to_json())) == 6
    assert "fp16_accumulate" in str(report)


def test_a_threshold_becomes_a_mode_map_that_swap_accepts(model):
    report = fk.fidelity(model, [{"input": activations()}, {"input": activations()}])
    errors = {(row.layer, row.compute): row.relative_error for row in report.rows}
    assert all(row.calls == 2 for row in report.rows)
    threshold = (errors["first", "int8"] + errors["second", "int8"]) / 2
    modes = report.modes(threshold)
    assert modes == {"first": "fp16_accumulate", "second": "int8"}
    fk.swap_linear(model, "torch", modes)
    assert (model.first.compute, model.second.compute) == ("fp16_accumulate", "int8")
    assert report.modes(0.0) == {"first": "exact", "second": "exact"}


def test_a_function_may_run_the_model(model):
    report = fk.fidelity(model, lambda: model(activations()), computes=["int8"])
    assert {row.compute for row in report.rows} == {"int8"}


def test_a_plain_model_is_refused():
    with pytest.raises(fk.FormatError, match="swap_linear"):
        fk.fidelity(nn.Linear(8, 8), {"input": torch.zeros(1, 8)})


def test_one_mode_for_a_model_spares_modulation_and_embedders():
    model = nn.ModuleDict({"norm1": nn.ModuleDict({"linear": nn.Linear(256, 256)}), "x_embedder": nn.Linear(64, 256)})
    model["attn"] = nn.Linear(256, 256)
    model["proj_out"] = nn.Linear(256, 64)
    fk.swap_linear(model, "torch", "int8", format="Q8_0")
    assert model["norm1"]["linear"].compute == model["x_embedder"].compute == model["proj_out"].compute == "exact"
    assert model["attn"].compute == "int8"


# outlier channels


def outlying_activations(factor: float = 30, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 512, generator=generator)
    x[:, [3, 200, 450, 451, 511]] *= factor
    return x


def test_outliers_are_found_measured_and_kept(model):
    inputs = {"input": outlying_activations()}
    report = fk.fidelity(model, inputs, outliers=0.01)
    rows = {(row.layer, row.compute, row.outliers): row.relative_error for row in report.rows}
    assert ("second", "int8", 0) in rows and len(rows) == 7, "the second layer's activations have no outliers"
    with_them, without = rows["first", "int8", 16], rows["first", "int8", 0]
    assert with_them < without / 4
    assert {3, 200, 450, 451, 511} <= set(report.outliers(0.005)["first"].tolist())
    assert "int8 + outliers" in str(report) and "(16 ch.)" in str(report)
    threshold = max(with_them, rows["second", "int8", 0]) * 1.01
    assert report.modes(threshold) == {"first": "int8", "second": "int8"}
    fk.swap_linear(model, "torch", report.modes(threshold))
    fk.keep_outliers(model, report.outliers(threshold))
    assert model.first.outlier_index.numel() == 16 and model.second.outlier_index is None
    x = inputs["input"]
    want = x.double() @ fk.dequantize(model.first.file_bytes(), "Q8_0").double().T
    got = model.first(x).double() - model.first.bias.double()
    assert ((got - want).norm() / want.norm()).item() == pytest.approx(with_them, rel=0.02)
    fk.keep_outliers(model, {})
    assert model.first.outlier_index is None


def test_outliers_are_off_by_default_and_never_kept_for_nothing(model):
    assert all(row.outliers == 0 for row in fk.fidelity(model, {"input": outlying_activations()}).rows)
    even = fk.fidelity(model, iter([{"input": torch.randn(40, 512)}]), ["int8"], outliers=0.01)
    assert all(row.outliers == 0 for row in even.rows) and even.outliers(0.0) == {}
    report = fk.fidelity(model, {"input": outlying_activations()}, outliers=0.01)
    assert report.outliers(0.5) == {}, "plain int8 is good enough there"


@pytest.mark.parametrize("pattern", ["one group", "spread", "one channel", "half a percent", "heavy tails", "ramp", "gaussian"])
@pytest.mark.parametrize("seed", range(2))
def test_outlier_channels_never_makes_int8_worse(pattern, seed):
    """Whatever the pattern: with the chosen channels, the error is at most 1.01 times that without.

    It is not exactly at most that, because codes fall otherwise.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 3072, generator=generator)
    shuffled = torch.randperm(3072, generator=generator)
    if pattern == "one group":
        x[:, 128:158] *= 40
    elif pattern == "spread":
        x[:, shuffled[:31]] *= 30
    elif pattern == "one channel":
        x[:, 77] *= 1000
    elif pattern == "half a percent":
        x[:, shuffled[:15]] *= 5
    elif pattern == "heavy tails":
        x *= torch.randn(3072, generator=generator).exp().square()
    elif pattern == "ramp":
        x *= torch.logspace(-2, 2, 3072)
    linear = nn.Linear(3072, 64, bias=False)
    model = nn.Sequential(fk.GGUFLinear.from_linear(linear, "Q8_0"))
    report = fk.fidelity(model, {"input": x}, ["int8"], outliers=0.01)
    errors = {bool(row.outliers): row.relative_error for row in report.rows}
    assert errors.get(True, 0.0) <= 1.01 * errors[False]
    assert (True in errors) == (pattern not in ("gaussian", "ramp"))
    if pattern in ("spread", "one channel", "one group"):
        assert errors[True] < errors[False] / 2


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"third": torch.tensor([1])}, "'third' is no packed layer"),
        (16, r"as report\.outliers\(0\.02\) of a FidelityReport gives it, got int"),
        ({"first": torch.tensor([1]), "second": torch.tensor([256])}, "from 0 to 255"),
    ],
)
def test_channels_that_do_not_fit_change_nothing(model, channels, message):
    with pytest.raises(fk.FormatError, match=message):
        fk.keep_outliers(model, channels)
    assert model.first.outlier_index is None
    with pytest.raises(fk.FormatError, match="share of the channels"):
        fk.fidelity(model, {"input": activations()}, outliers=16)


# inputs and names


def calls_of(model: nn.Module) -> list:
    x = activations()
    return [x, (x,), {"input": x}, [x, (x,), {"input": x}], lambda: model(x)]


@pytest.mark.parametrize("way", range(5))
def test_calls_may_be_given_in_any_way(model, way):
    assert {row.layer for row in fk.fidelity(model, calls_of(model)[way]).rows} == {"first", "second"}


def test_a_layer_called_by_keyword_is_measured(model):
    assert len(fk.fidelity(model.first, {"input": activations()}, "int8").rows) == 1


def test_few_tokens_show_what_the_mode_would_cost(model):
    """A small sample shows what int8 costs, although up to 16 rows run as exact.

    Measured as they run, every layer would look perfect.
    """
    x = activations()
    errors = [{row.compute: row.relative_error for row in fk.fidelity(model.first, tokens).rows} for tokens in (x[:8], x[:32])]
    assert errors[0]["int8"] == pytest.approx(errors[1]["int8"], rel=0.3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(inputs=None), "inputs are keyword arguments .* got NoneType"),
        (dict(inputs=[]), "empty list"),
        (dict(inputs=[1]), "one of the calls is a int"),
        (dict(inputs=lambda: None), "ran no packed layer"),
        (dict(inputs=torch.zeros(1, 512), outliers="0.01"), "outliers is a share"),
        (dict(inputs=torch.zeros(1, 512), outliers=1), "outliers is a share"),
    ],
)
def test_wrong_arguments_are_said(model, arguments, message):
    with pytest.raises(fk.FormatError, match=message):
        fk.fidelity(model, **arguments)
    assert not model.first._forward_pre_hooks


def test_wrong_modes_thresholds_and_maps_are_said(model):
    with pytest.raises(fk.BackendUnavailable, match="Unknown compute mode 'int4'"):
        fk.fidelity(model, activations(), "int4")
    report = fk.fidelity(model, activations())
    for threshold in (2, -1, float("nan"), "0.01", True):
        with pytest.raises(fk.FormatError, match="threshold is a fraction"):
            report.modes(threshold)
    with pytest.raises(fk.FormatError, match="channels is a map"):
        fk.keep_outliers(model, None)
    with pytest.raises(fk.FormatError, match="torch module"):
        fk.fidelity(None, activations())


def test_a_map_made_under_adapters_and_compilation_fits_the_bare_model(model):
    peft = pytest.importorskip("peft")
    plain = fk.fidelity(model, activations()).modes(0.01)
    compiled = torch.compile(model, backend="eager")
    assert fk.fidelity(compiled, activations()).modes(0.01) == plain
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["first", "second"], r=4), model)
    modes = fk.fidelity(model, activations()).modes(0.01)
    assert modes == plain
    assert "matched no" not in str(fk.swap_linear(model, "torch", modes))


def test_channels_that_are_kept_already_are_measured(model):
    x = outlying_activations()
    report = fk.fidelity(model.first, x, outliers=0.05)
    assert report.outliers(0.01)
    fk.keep_outliers(model.first, report.outliers(0.01))
    again = fk.fidelity(model.first, x)
    assert again.modes(0.01) == report.modes(0.01) and again.outliers(0.01).keys() == report.outliers(0.01).keys()


def test_an_offloaded_layer_is_refused(model):
    with pytest.raises(fk.FormatError, match="offloaded. Measure before"):
        fk.fidelity(model.to("meta"), activations())


# for people


def errors_of(layers: dict[str, float]) -> FidelityReport:
    """Make up int8 errors by layer; exact is a thousandth of them."""
    modes = (("exact", 1e-3), ("int8", 1.0))
    return FidelityReport(
        [LayerError(layer, "Q4_K", mode, share * error, 1) for layer, error in layers.items() for mode, share in modes]
    )


def test_the_printed_report_is_short_and_begins_with_the_worst():
    report = errors_of({f"blocks.{number}.attn": number / 1000 for number in range(1, 61)})
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["blocks.60.attn", "blocks.59.attn", "blocks.58.attn"]
    assert len(lines) == 1 + SHOWN + 1 + 2 and lines[SHOWN + 1].startswith(f"... and {60 - SHOWN} with smaller errors")
    assert lines[-1] == "int8: median 3 %, worst 6 % at blocks.60.attn; 40 of 60 layers above 2 %"
    assert lines[-2].startswith("exact: ") and lines[-2].endswith("no layer above 2 %")
    assert len(report.table(rows=None).splitlines()) == 1 + 60 + 2
    assert "10 of 60 layers above 5 %" in report.table(threshold=0.05)


def test_layers_that_run_as_exact_are_marked_and_do_not_count():
    report = str(errors_of({"blocks.0.attn": 0.01, "blocks.0.norm1.linear": 0.5}))
    assert re.search(r"norm1.linear .* 50 %\*", report) and "1 of 2 layers (modulation" in report
    assert "int8: median 1 %, worst 1 % at blocks.0.attn; no layer above 2 %" in report


def test_all_rows_go_into_a_csv_file(tmp_path):
    report = errors_of({"a": 0.25, "b": 0.5})
    report.to_csv(tmp_path / "errors.csv")
    with (tmp_path / "errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["layer"], row["compute"], float(row["relative_error"])) for row in rows if row["compute"] == "int8"] == [
        ("a", "int8", 0.25),
        ("b", "int8", 0.5),
    ]
    assert len(rows) == len(report.rows)
