"""What the operations on a swapped model are compared with: its dequantized twin, in float32."""

from __future__ import annotations

import copy

import torch

import flux_kernels as fk

from ..conftest import flux_inputs

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def run(model, **inputs) -> torch.Tensor:
    """Run the tiny Flux once."""
    with torch.no_grad():
        return model(**(inputs or flux_inputs()))[0]


def packed_layers(model) -> list[fk.GGUFLinear]:
    """List the packed layers of a model."""
    return [module for module in model.modules() if isinstance(module, fk.GGUFLinear)]


def twin(model):
    """Return a deep copy with every packed layer decoded."""
    return copy.deepcopy(model).dequantize()


def assert_same(model, expected) -> None:
    """Compare a model's output with `expected`; it must have packed layers still."""
    assert packed_layers(model), "the operation lost the packed layers"
    torch.testing.assert_close(run(model), expected, **CLOSE)
