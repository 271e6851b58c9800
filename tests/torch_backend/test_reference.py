"""The torch backend against libggml's golden vectors.

The result must not depend on chunks, batches or planes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flux_kernels import FORMATS, FormatError
from flux_kernels.formats import Packed
from flux_kernels.torch_backend import reference

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(format: str) -> tuple[torch.Tensor, torch.Tensor]:
    numpy = pytest.importorskip("numpy")
    file = numpy.load(GOLDEN / f"{format}.npz")
    return torch.from_numpy(file["q"]), torch.from_numpy(file["y"])


@pytest.mark.parametrize("format", FORMATS)
def test_float32_is_libggmls_and_16_bit_is_rounded_once(format):
    data, want = golden(format)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        got = reference.dequantize(Packed(data, FORMATS[format]), dtype)
        assert got.dtype == dtype and torch.equal(got, want.to(dtype))


@pytest.mark.parametrize("format", ["Q4_K", "Q8_0"])
@pytest.mark.parametrize("chunk", [1, 512, 3 * 512 + 1])
def test_chunks_do_not_change_the_result(monkeypatch, format, chunk):
    monkeypatch.setattr(reference, "CHUNK_WEIGHTS", chunk)
    data, want = golden(format)
    assert torch.equal(reference.dequantize(Packed(data, FORMATS[format])), want)
    assert torch.equal(reference.dequantize(Packed(data.view(3, 4, -1), FORMATS[format])), want.view(3, 4, -1))


@pytest.mark.parametrize("format", [name for name, fmt in FORMATS.items() if fmt.planes])
def test_planes_decode_to_the_same_weights(format):
    data, want = golden(format)
    fmt = FORMATS[format]
    planes = fmt.layout.to_planes(data)
    assert not torch.equal(planes, data)
    assert torch.equal(reference.dequantize(Packed(planes, fmt, True)), want)


def test_no_rows_and_a_single_row():
    data, want = golden("Q4_K")
    assert reference.dequantize(Packed(data[:0], FORMATS["Q4_K"])).shape == (0, 512)
    assert torch.equal(reference.dequantize(Packed(data[3], FORMATS["Q4_K"])), want[3])


def test_identity_activations_give_the_decoded_weight():
    data, want = golden("Q4_K")
    for dtype in (torch.float32, torch.bfloat16):
        weight = reference.dequantize(Packed(data, FORMATS["Q4_K"]), dtype)
        got = reference.multiply(torch.eye(512, dtype=dtype), weight, None, None)
        assert torch.equal(got, want.to(dtype).T)


def test_part_of_a_block_is_refused():
    with pytest.raises(FormatError, match="whole blocks of 144 bytes, got 143"):
        reference.dequantize(Packed(torch.zeros(2, 143, dtype=torch.uint8), FORMATS["Q4_K"]))
