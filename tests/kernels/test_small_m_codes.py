"""Small M on tensor cores: integer codes multiplied exactly, scales on the sums.

For every format that has code tiles.
"""

from __future__ import annotations

import pytest
import torch

from flux_kernels import kernels
from flux_kernels._triton import triton
from flux_kernels.formats import FORMATS, Packed
from flux_kernels.kernels import exact
from flux_kernels.kernels.choice import candidates, default_choice
from flux_kernels.kernels.problem import Call, Problem
from flux_kernels.kernels.small_m_codes import code_constants, small_m_codes_kernel
from flux_kernels.kernels.tiles import CODES_M, small_m_tile

from .samples import finite_rows

NAMES = [name for name, fmt in FORMATS.items() if fmt.code_tile is not None]
HALVES = [torch.float16, torch.bfloat16]


def product(x, data, fmt, bias=None, planes=None):
    """Run exact mode and make sure that it took the kernel under test."""
    planes = fmt.planes if planes is None else planes
    choice = default_choice("exact", fmt, x.shape[0], data.shape[0], x.shape[1], None, x.dtype)
    assert (choice.algorithm, choice.tile.block_m) == ("small_m", CODES_M)
    packed = fmt.layout.to_planes(data) if planes else data
    y = torch.full((x.shape[0], data.shape[0]), float("nan"), dtype=x.dtype, device=x.device)
    exact.linear(x, Packed(packed.to(x.device), fmt, planes), bias, y, choice=choice)
    return y.cpu()


def test_which_formats_have_code_tiles():
    assert set(NAMES) == {"Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}


@pytest.mark.parametrize("planes", [False, True], ids=["file order", "planes"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_only_the_result_is_rounded(name, dtype, planes, device):
    """The error against float64 is half a unit in the last place of y, and float32 sums below it.

    The weights are as decoded, unrounded.

    Those are off by some 2^-24 for each of K/16 products and K/16 scales, times what the excess of a code (128 + 32 at most) is
    larger than a code: under a hundredth of fp16's 2^-11.
    """
    fmt = FORMATS[name]
    data, weight = finite_rows(name, 37, repeats=2)
    torch.manual_seed(0)
    x, bias = torch.randn(5, 1024).to(dtype), torch.randn(37).to(dtype)
    got = product(x.to(device), data, fmt, bias.to(device), planes).double()
    oracle = x.double() @ weight.double().T + bias.double()
    assert (got - oracle).norm() <= 1.01 * torch.finfo(dtype).eps / 2 * oracle.norm()
    torch_error = (torch.nn.functional.linear(x, weight.to(dtype), bias).double() - oracle).norm()
    assert (got - oracle).norm() <= torch_error


@pytest.mark.parametrize("mean", [0.0, 8.0])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NAMES)
def test_sums_are_those_of_float32(name, dtype, mean, device):
    """Written as float32 the result keeps sixteen bits at least.

    Also where x has a mean that the codes' excess multiplies.
    """
    fmt = FORMATS[name]
    data, weight = finite_rows(name, 37, repeats=2)
    torch.manual_seed(0)
    x = (torch.randn(3, 1024) + mean).to(dtype)
    tile = small_m_tile(fmt, 1024, codes=True)
    problem = Problem.of(x, Packed(data, fmt), None)
    constants = code_constants(fmt, problem.format_constants, tile, packed=device.type != "cpu")
    y = torch.empty(3, 37, device=device)
    grid = (triton.cdiv(37, tile.block_n), 1)
    operands = (x.to(device), data.to(device), None, None, None, y, 3, 37, 0, 1024)
    small_m_codes_kernel[grid](*operands, **constants, num_warps=tile.num_warps)
    oracle = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    assert ((y.cpu().double() - oracle).abs() / magnitude).max() < 2.0**-16


@pytest.mark.parametrize("dtype", HALVES)
def test_rows_do_not_depend_on_each_other(dtype, device):
    """One kernel serves 1 to 8 rows: each row has the bits that it has alone.

    Whatever stands in the other columns.
    """
    fmt = FORMATS["Q4_K"]
    data, _ = finite_rows("Q4_K", 40)
    x = torch.randn(CODES_M, 512, device=device).to(dtype)
    whole = product(x, data, fmt)
    assert torch.equal(whole, product(x, data, fmt))
    for m in range(1, CODES_M):
        assert torch.equal(product(x[:m], data, fmt), whole[:m])


@pytest.mark.parametrize("dtype", HALVES)
def test_rows_of_x_that_are_not_aligned_for_pairs_are_copied(dtype, device):
    fmt = FORMATS["Q6_K"]
    data, _ = finite_rows("Q6_K", 16)
    wide = torch.randn(3, 1025, device=device).to(dtype)
    for x in (wide[:, 1:513], wide[:, :512], wide[:, 2:514], wide[:1].expand(3, 1025)[:, 1:513]):
        assert torch.equal(product(x, data, fmt), product(x.contiguous(), data, fmt))


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00], ids=["NaN", "Inf"])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q6_K", "Q3_K"])
def test_a_nan_or_inf_scale_stays_in_its_row(name, bits, device):
    fmt = FORMATS[name]
    data, _ = finite_rows(name, 34)
    data = data.clone()
    field = next(field for field in fmt.layout.fields if field.dtype == "f16")
    at = fmt.layout.offsets[field.name]
    data[33, at : at + 2] = torch.tensor([bits & 0xFF, bits >> 8], dtype=torch.uint8)
    got = product(torch.randn(2, 512, device=device).half(), data, fmt)
    assert not got[:, 33].isfinite().any()
    assert got[:, :33].isfinite().all()


@pytest.mark.parametrize(("k", "splits"), [(256, 1), (512, 2), (768, 1), (3072, 2)])
def test_the_warps_that_share_k_divide_its_steps(k, splits, device):
    fmt = FORMATS["Q5_K"]
    tile = small_m_tile(fmt, k, codes=True)
    assert (tile.splits, tile.num_warps) == (splits, splits)
    data, weight = (rows[:, : rows.shape[1] * k // 3072] for rows in finite_rows("Q5_K", 8, repeats=6))
    x = torch.randn(2, k, device=device).half()
    oracle = x.cpu().double() @ weight.double().T
    assert (product(x, data.contiguous(), fmt) - oracle).norm() < 1e-3 * oracle.norm()


def test_where_codes_are_multiplied():
    """It takes 16-bit x, tensor cores, a format of codes and at most eight rows.

    The kernel for one or two rows serves the others.
    """

    def chosen(name: str, m: int, capability, dtype=torch.bfloat16) -> tuple[str, int]:
        choice = default_choice("exact", FORMATS[name], m, 3072, 3072, capability, dtype)
        return choice.algorithm, choice.tile.block_m if choice.tile else 0

    assert {chosen("Q4_K", m, (9, 0)) for m in range(1, 9)} == {("small_m", 8)}
    assert chosen("Q4_K", 9, (9, 0)) == ("fused", 16)
    assert chosen("Q4_K", 1, (9, 0), torch.float32) == ("small_m", 1)
    assert chosen("Q4_K", 1, (7, 5)) == ("small_m", 1)
    assert chosen("IQ4_XS", 1, (9, 0)) == ("small_m", 1)
    assert chosen("IQ4_XS", 3, (9, 0))[0] == "fused"


def test_tuning_tries_both_kernels_and_codes_on_tensor_cores_only():
    def heights(capability) -> set[int]:
        tried = candidates("exact", Call(FORMATS["Q4_K"], 1, 18432, 3072, capability, 82))
        return {one.tile.block_m for one in tried if one.algorithm == "small_m"}

    assert heights((8, 6)) == {1, CODES_M}
    assert heights((7, 5)) == {1}


def test_float32_activations_with_a_tile_of_codes_take_the_other_kernel(device):
    """A tile that was measured in 16 bit may be named for any call."""
    fmt = FORMATS["Q8_0"]
    data, weight = finite_rows("Q8_0", 16)
    choice = default_choice("exact", fmt, 2, 16, 512, (8, 6))
    x, y = torch.randn(2, 512, device=device), torch.empty(2, 16, device=device)
    exact.linear(x, Packed(data.to(device), fmt), None, y, choice=choice)
    torch.testing.assert_close(y.cpu(), x.cpu() @ weight.T, rtol=1e-5, atol=1e-4)
    assert torch.equal(kernels.linear(x, Packed(data.to(device), fmt), None, "exact"), y)
