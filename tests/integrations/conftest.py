"""A tiny Flux on disk in 16 bit, and what is compared after loading."""

from __future__ import annotations

import pytest
import torch

from flux_kernels import GGUFLinear

from ..conftest import TINY_FLUX, flux_inputs


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory):
    """Save the tiny Flux in bfloat16, as save_pretrained writes it."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain") / "transformer"
    diffusers.FluxTransformer2DModel(**TINY_FLUX).to(torch.bfloat16).save_pretrained(folder)
    return folder


def packed(model) -> dict[str, tuple]:
    """Return layer name -> all that a round trip has to keep of a packed layer."""
    return {
        name: (layer.format, layer.compute, layer.backend, layer.compute_dtype, layer.file_bytes())
        for name, layer in model.named_modules()
        if isinstance(layer, GGUFLinear)
    }


def assert_same_model(left, right) -> None:
    """Compare packed layers byte for byte with their settings, and all other parameters bit for bit."""
    ours, theirs = packed(left), packed(right)
    assert ours.keys() == theirs.keys() and ours
    for name, (*settings, data) in ours.items():
        assert settings == [*theirs[name][:-1]], name
        assert torch.equal(data, theirs[name][-1]), name
    expected = dict(right.named_parameters())
    for name, value in left.named_parameters():
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name


def run(model, **inputs) -> torch.Tensor:
    """Run the tiny Flux once."""
    with torch.no_grad():
        return model(**(inputs or flux_inputs(dtype=model.dtype)))[0]
