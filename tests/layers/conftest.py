"""A tiny packed Flux, and the same with its projections fused, for the tests of fused layers."""

from __future__ import annotations

import copy

import pytest
import torch

import flux_kernels as fk

from ..conftest import TINY_FLUX, flux_inputs

KINDS = ("qkv", "linear1")


def run(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**(inputs or flux_inputs()))[0]


@pytest.fixture(scope="module")
def packed_model():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**TINY_FLUX).eval()
    fk.swap_linear(model, format={"*transformer_blocks*": "Q4_K"})
    return model


@pytest.fixture(scope="module")
def expected(packed_model):
    return run(packed_model)


@pytest.fixture
def model(packed_model):
    return copy.deepcopy(packed_model)


@pytest.fixture(params=KINDS)
def fused(model, request):
    fk.fuse_projections(model, request.param)
    return model
