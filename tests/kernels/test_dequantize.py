"""The unpack kernel gives libggml's float32 bits for every format, in file order and in field planes."""

from __future__ import annotations

import pytest
import torch

from flux_kernels import kernels
from flux_kernels.formats import FORMATS, Packed

from .samples import golden


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Compare bit patterns, NaN by NaN-ness only."""
    finite = ~expected.isnan()
    return torch.equal(got.isnan(), expected.isnan()) and torch.equal(
        got[finite].contiguous().view(torch.int32), expected[finite].contiguous().view(torch.int32)
    )


@pytest.mark.parametrize("planes", [False, True], ids=["file order", "planes"])
@pytest.mark.parametrize("name", FORMATS)
def test_float32_is_bit_equal_to_libggml_on_random_bytes(name, planes, device):
    fmt, vectors = FORMATS[name], golden(name)
    data = vectors["random_q"]
    packed = fmt.layout.to_planes(data) if planes else data
    got = kernels.dequantize(Packed(packed.to(device), fmt, planes), torch.float32).cpu()
    assert same_bits(got, vectors["random_y"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_16_bit_is_the_float32_value_rounded_once(name, dtype, device):
    vectors = golden(name)
    got = kernels.dequantize(Packed(vectors["q"].to(device), FORMATS[name]), dtype).cpu()
    assert torch.equal(got, vectors["y"].to(dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_whose_last_tile_is_short(name, device):
    """One block a row: the smallest K a format allows, odd numbers of blocks included."""
    fmt, vectors = FORMATS[name], golden(name)
    for blocks in (1, 3):
        k = blocks * fmt.block_size
        if k > vectors["y"].shape[1]:
            continue
        data = vectors["q"][:, : blocks * fmt.type_size].contiguous()
        for planes in (False, True):
            packed = fmt.layout.to_planes(data) if planes else data
            got = kernels.dequantize(Packed(packed.to(device), fmt, planes), torch.float32).cpu()
            assert same_bits(got, vectors["y"][:, :k].contiguous())


def test_no_rows_give_an_empty_result(device):
    fmt = FORMATS["Q8_0"]
    empty = torch.empty(0, 34, dtype=torch.uint8, device=device)
    assert kernels.dequantize(Packed(empty, fmt), torch.float32).shape == (0, 32)
