"""Adding a format is one row.

Decode, GEMM, ops, layers and the README table follow without an edit elsewhere.
"""

from __future__ import annotations

import pytest
import torch

import flux_kernels as fk
from flux_kernels.formats import FORMATS

from .made_up_format import FORMAT, pack


@pytest.fixture
def registered(monkeypatch):
    """Register the made-up row for one test."""
    monkeypatch.setitem(FORMATS, FORMAT.name, FORMAT)
    return FORMAT


def sample(n: int = 9, k: int = 192) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed rows and the weights they stand for."""
    codes = torch.randint(0, 256, (n, k), dtype=torch.uint8)
    d = (torch.rand(n, k // 64) + 0.5).half() / 64
    return pack(codes, d), d.float().repeat_interleave(64, dim=1) * (codes.float() - 100)


def test_geometry_is_derived(registered):
    assert (registered.type_size, registered.bits_per_weight) == (66, 8.25)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_decode_and_linear_follow(registered, backend):
    data, weight = sample()
    assert torch.equal(fk.dequantize(data, "MADE_UP", backend=backend), weight)
    x = torch.randn(3, 192)
    y = fk.linear(x, data, "MADE_UP", backend=backend)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-5, atol=1e-4)


def test_fake_and_checks_follow(registered):
    data, _ = sample()
    arguments = (torch.randn(3, 192), data, None, "MADE_UP", "torch", "exact", False)
    torch.library.opcheck(torch.ops.flux_kernels.linear.default, arguments)
    with pytest.raises(fk.FormatError, match="64"):
        registered.row_bytes(100, "x_embedder")


def test_a_layer_follows(registered):
    data, weight = sample()
    layer = fk.GGUFLinear.from_packed(data, "MADE_UP", None, backend="triton")
    assert torch.equal(layer.dequantize().weight, weight.bfloat16())  # a layer decodes to its compute_dtype
    torch.testing.assert_close(layer(torch.eye(192)), weight.T)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(fk.FormatError, match="Q4_K"):
        fk.dequantize(torch.zeros(1, 66, dtype=torch.uint8), "MADE_UP")
