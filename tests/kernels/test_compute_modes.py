"""The int8 and fp16_accumulate kernels against their torch twins and against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flux_kernels import kernels, torch_backend
from flux_kernels._triton import interpreting
from flux_kernels.compute import group_width
from flux_kernels.formats import FORMATS, Packed
from flux_kernels.kernels import int8
from flux_kernels.kernels.choice import choose, default_choice
from flux_kernels.torch_backend import low_precision

from .samples import finite_rows


def relative(got: torch.Tensor, oracle: torch.Tensor) -> float:
    """Return the relative Frobenius norm of the difference."""
    return ((got.double() - oracle).norm() / oracle.norm()).item()


def assert_codes(codes: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, twin: torch.Tensor) -> None:
    """Compiled codes are the twin's; interpreted ones differ at ties.

    Triton's interpreter rounds the product before the sum, by at most half a unit of 127 * 2^-24.

    There a code may be the twin's neighbour where the exact product is that near to a tie.
    """
    twin = twin.flatten(1)
    if not interpreting():
        assert torch.equal(codes.float(), twin)
        return
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    exact = (values.double().unflatten(1, (-1, values.shape[1] // scale.shape[1])) * inverse.double()[..., None]).flatten(1)
    near_tie = (exact.abs() % 1 - 0.5).abs() <= 127 * 2.0**-24
    apart = (codes.float() - twin).abs()
    assert (apart <= near_tie.float()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [64, 384, 1024])
def test_activation_quantizer_equals_its_twin(dtype, k, device):
    """Nearest codes and the twin's scales, zero rows included; a row with NaN or Inf gets scale NaN."""
    torch.manual_seed(k)
    x = (torch.randn(21, k) * torch.logspace(-3, 3, 21)[:, None]).to(dtype)
    x[3] = 0
    x[5, 7], x[6, 9] = float("nan"), float("inf")
    group = group_width(k)
    codes, scale = int8.quantize_activation(x.to(device), group)
    twin, twin_scale = low_precision.quantize_groups(x, group)
    rows = torch.tensor([i for i in range(21) if i not in (5, 6)])
    assert_codes(codes.cpu()[rows], x[rows], twin_scale[rows, :, 0], twin[rows])
    torch.testing.assert_close(scale.cpu().T, twin_scale[..., 0], rtol=0, atol=0, equal_nan=True)
    assert scale.cpu()[0, [5, 6]].isnan().all()


@pytest.mark.parametrize("name", FORMATS)
def test_weight_unpack_equals_its_twin(name, device):
    """Nearest codes of the decoded weight, and the twin's scales."""
    fmt = FORMATS[name]
    data, weight = finite_rows(name, 9)
    packed = fmt.layout.to_planes(data) if fmt.planes else data
    codes, scale = int8.unpack_weight(Packed(packed.to(device), fmt, fmt.planes), 128)
    twin, twin_scale = low_precision.quantize_groups(weight, 128)
    assert_codes(codes.cpu(), weight, twin_scale[..., 0], twin)
    assert torch.equal(scale.cpu().T, twin_scale[..., 0])


@pytest.mark.parametrize("name", FORMATS)
def test_weight_unpack_with_row_scales_equals_its_twin(name, device):
    """One scale for a row: nearest codes of the decoded weight, and the twin's scales."""
    fmt = FORMATS[name]
    data, weight = finite_rows(name, 9)
    packed = fmt.layout.to_planes(data) if fmt.planes else data
    codes, scale = int8.unpack_weight(Packed(packed.to(device), fmt, fmt.planes), 128, True)
    twin, twin_scale = low_precision.quantize_groups(weight, weight.shape[1])
    assert_codes(codes.cpu(), weight, twin_scale[..., 0], twin)
    assert torch.equal(scale.cpu().T, twin_scale[..., 0])


@pytest.mark.parametrize("name", ["Q4_K", "Q5_0", "IQ2_XS"])
def test_row_scales_are_as_accurate_as_their_twin(name, device, monkeypatch):
    """The error against float64 is the twin's, up to ties (2 %).

    Ragged M and N, bias, branch, several weight chunks.
    """
    torch.manual_seed(0)
    fmt = FORMATS[name]
    data, weight = finite_rows(name, 150)
    x, bias, branch = torch.randn(37, 512), torch.randn(150), (torch.randn(37, 16), torch.randn(150, 16))
    packed = fmt.layout.to_planes(data) if fmt.planes else data
    y = torch.empty(37, 150, device=device)
    on_device = [part.to(device) for part in branch]
    choice = replace(default_choice("int8", fmt, 37, 150, 512, (9, 0)), rows=128)
    int8.linear(x.to(device), Packed(packed.to(device), fmt, fmt.planes), bias.to(device), y, on_device, choice=choice)
    twin = low_precision.linear_int8(x, Packed(data, fmt), bias, branch, True)
    oracle = x.double() @ weight.double().T + bias.double() + branch[0].double() @ branch[1].double().T
    assert choice.algorithm == "row_scales"
    assert relative(y.cpu(), oracle) <= 1.02 * relative(twin, oracle)


def test_row_scales_are_for_coarse_formats_on_hopper():
    """Row scales are for coarse formats on Hopper.

    Elsewhere, on A100 too, the scales of groups hide behind the tensor cores, and Q6_K and Q8_0 need them.
    """
    chosen = {
        (name, capability): default_choice("int8", FORMATS[name], 4608, 3072, 3072, capability).algorithm
        for name in ("Q4_K", "Q5_1", "Q6_K", "Q8_0")
        for capability in ((8, 0), (8, 9), (9, 0), None)
    }
    assert {key for key, algorithm in chosen.items() if algorithm == "row_scales"} == {
        (name, capability) for name in ("Q4_K", "Q5_1") for capability in ((9, 0),)
    }


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00], ids=["NaN", "Inf"])
def test_a_nan_or_inf_scale_reaches_the_output_through_row_scales(bits, device):
    """One block poisons its output column and no other."""
    fmt = FORMATS["Q4_0"]
    data, _ = finite_rows("Q4_0", 4)
    data = data.clone()
    data[1, 36:38] = torch.tensor([bits & 0xFF, bits >> 8], dtype=torch.uint8)
    y = torch.empty(20, 4, device=device)
    choice = default_choice("int8", fmt, 20, 4, 512, (9, 0))
    int8.linear(torch.randn(20, 512).to(device), Packed(data.to(device), fmt), None, y, choice=choice)
    assert y[:, 1].isnan().all()
    assert y[:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compute", ["int8", "fp16_accumulate"])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "IQ2_XS"])
def test_kernel_is_as_accurate_as_its_twin(name, compute, dtype, device, monkeypatch):
    """Ragged M and N, bias, several weight chunks: the error against float64 is the twin's.

    int8: ties may round the other way, so errors agree to 2 %. fp16: the interpreter rounds after every product where tensor
    cores round after 16, so up to 4 times the roundings, and sqrt(16) times the error of their random sum.
    """
    groups = replace(default_choice("int8", FORMATS[name], 37, 150, 512, (8, 9)), rows=128)  # scales of groups, as the twin
    monkeypatch.setattr(kernels, "choose", lambda mode, *call: groups if mode == "int8" else choose(mode, *call))
    torch.manual_seed(0)
    fmt = FORMATS[name]
    data, weight = finite_rows(name, 150)
    x, bias = torch.randn(37, 512).to(dtype), torch.randn(150).to(dtype)
    packed = fmt.layout.to_planes(data) if fmt.planes else data
    got = kernels.linear(x.to(device), Packed(packed.to(device), fmt, fmt.planes), bias.to(device), compute).cpu()
    twin = torch_backend.linear(x, Packed(data, fmt), bias, compute)
    oracle = x.double() @ weight.double().T + bias.double()
    factor = {"int8": 1.02, "fp16_accumulate": 4.0}[compute]
    assert relative(got, oracle) <= factor * relative(twin, oracle)


@pytest.mark.parametrize("bits", [0x7E00, 0x7C00], ids=["NaN", "Inf"])
@pytest.mark.parametrize("block", [0, 3])
def test_a_nan_or_inf_scale_reaches_the_int8_output(block, bits, device):
    """One block of a group of four poisons its output column and no other.

    A GPU's maximum drops NaN unless it is asked not to.
    """
    fmt = FORMATS["Q8_0"]
    data, _ = finite_rows("Q8_0", 4)
    data = data.clone()
    data[1, 34 * block : 34 * block + 2] = torch.tensor([bits & 0xFF, bits >> 8], dtype=torch.uint8)
    got = kernels.linear(torch.randn(20, 512).to(device), Packed(data.to(device), fmt), None, "int8").cpu()
    assert got[:, 1].isnan().all()
    assert got[:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("compute", ["int8", "fp16_accumulate"])
def test_few_rows_stay_weight_only(compute, device):
    """Modulation and embedding calls (up to 16 rows) are memory bound and run as exact."""
    fmt = FORMATS["Q8_0"]
    data, _ = finite_rows("Q8_0", 40)
    x = torch.randn(16, 512)
    exact = kernels.linear(x.to(device), Packed(data.to(device), fmt), None, "exact")
    assert torch.equal(kernels.linear(x.to(device), Packed(data.to(device), fmt), None, compute), exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fp16_accumulate_survives_the_largest_activations(dtype, device):
    """bf16 up to 1e30 and fp16 up to 65504: the token scale keeps every product in range."""
    fmt = FORMATS["Q8_0"]
    data, weight = finite_rows("Q8_0", 24)
    data, weight = data[:2], weight[:2]
    x = torch.randn(20, 512)
    x *= (6e4 if dtype == torch.float16 else 1e30) / x.abs().amax()
    x = x.to(dtype)
    bf16 = x.bfloat16() if dtype == torch.bfloat16 else x.float()
    got = kernels.linear(bf16.to(device), Packed(data.to(device), fmt), None, "fp16_accumulate").cpu()
    oracle = bf16.double() @ weight.double().T
    assert got.isfinite().all()
    assert relative(got, oracle) < 5e-3
