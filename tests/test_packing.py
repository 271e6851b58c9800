"""quantize: shapes, importance and refusals (the quality of quantizers is tested with their formats)."""

from __future__ import annotations

import pytest
import torch

import flux_kernels as fk
from flux_kernels.torch_backend import libggml


def test_any_leading_shape_and_dtype():
    weight = torch.randn(2, 3, 64)
    packed = fk.quantize(weight, "Q8_0")
    assert packed.shape == (2, 3, 68) and packed.dtype == torch.uint8
    assert torch.equal(packed[1, 2], fk.quantize(weight[1, 2], "Q8_0"))
    assert torch.equal(fk.quantize(weight.bfloat16(), "Q8_0"), fk.quantize(weight.bfloat16().float(), "Q8_0"))


@pytest.mark.parametrize(
    ("weight", "importance", "message"),
    [
        (torch.zeros(2, 33), None, "Q8_0 needs K % 32 == 0, got K=33"),
        (torch.zeros(2, 32, dtype=torch.int32), None, "floating dtype, got torch.int32"),
        (torch.full((2, 32), torch.nan), None, "NaN or infinity"),
        (torch.zeros(()), None, "got a scalar"),
        (torch.zeros(2, 32), torch.ones(31), r"shape \[32\] or \[2, 32\], got \[31\]"),
        (torch.zeros(2, 32), -torch.ones(32), "non-negative"),
    ],
)
def test_what_does_not_fit_is_refused(weight, importance, message):
    with pytest.raises(fk.FormatError, match=message):
        fk.quantize(weight, "Q8_0", importance)


def test_a_format_without_a_quantizer_says_what_to_install(monkeypatch):
    formats = [name for name, fmt in fk.FORMATS.items() if fmt.quantize is None]
    if not formats:
        pytest.skip("every format has a quantizer of its own")
    monkeypatch.setattr(libggml, "_file", lambda: None)
    with pytest.raises(fk.FormatError, match="pip install libggml-python"):
        fk.quantize(torch.zeros(2, 512), formats[0])
