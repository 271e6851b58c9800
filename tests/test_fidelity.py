"""Per-layer fidelity on a user's own activations, and the mode map made from it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import flux_kernels as fk


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
        assert errors[layer, "exact"] < 1e-6  # float32 activations and weights
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
