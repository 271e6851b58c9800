"""The low-rank branch in the Triton kernels: every mode against its torch twin and against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flux_kernels import kernels, torch_backend
from flux_kernels.formats import FORMATS, Packed
from flux_kernels.kernels.choice import choose, default_choice

from .samples import finite_rows
from .test_compute_modes import relative

N, K = 70, 512


def operands(tokens: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return x, bias, hidden and up; the branch is about as large as the product."""
    generator = torch.Generator().manual_seed(rank)
    shapes = (tokens, K), (N,), (tokens, rank), (N, rank)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@pytest.mark.parametrize("rank", [1, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("compute", "tokens"), [("int8", 37), ("fp16_accumulate", 37), ("exact", 37), ("exact", 2)])
def test_the_branch_is_added_before_the_result_is_rounded(compute, tokens, dtype, rank, device, monkeypatch):
    """The branch is as accurate as its twin, which rounds once.

    Ragged M, N and r, several weight chunks; test_compute_modes has the factors.
    """
    groups = replace(default_choice("int8", FORMATS["Q4_K"], 37, N, K, (8, 9)), rows=48)  # scales of groups, as the twin
    monkeypatch.setattr(kernels, "choose", lambda mode, *call: groups if mode == "int8" else choose(mode, *call))
    fmt = FORMATS["Q4_K"]
    data, weight = finite_rows("Q4_K", N)
    x, bias, hidden, up = operands(tokens, rank, dtype)
    branch = (hidden.to(device), up.to(device))
    got = kernels.linear(x.to(device), Packed(data.to(device), fmt), bias.to(device), compute, branch).cpu()
    twin = torch_backend.linear(x, Packed(data, fmt), bias, compute, (hidden, up))
    oracle = x.double() @ weight.double().T + bias.double() + hidden.double() @ up.double().T
    factor = {"int8": 1.02, "fp16_accumulate": 4.0, "exact": 1.1}[compute]
    assert got.dtype == dtype
    assert relative(got, oracle) <= factor * relative(twin, oracle) + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("with_branch", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_outliers_equal_the_twin(dtype, with_branch, device):
    """Three channels 100 times larger, left out of the int8 product, leave the twin's error.

    It is far below the error with them.
    """
    fmt = FORMATS["Q8_0"]
    data, weight = finite_rows("Q8_0", N)
    x, bias, hidden, up = operands(37, 5, dtype)
    index = torch.tensor([0, 130, 511], dtype=torch.int32)
    x[:, index] *= 100
    x = x.to(dtype)
    branch = (hidden.to(device), up.to(device)) if with_branch else None
    outliers = (index, weight[:, index])
    moved = tuple(part.to(device) for part in outliers)
    packed = fmt.layout.to_planes(data)
    got = kernels.linear(x.to(device), Packed(packed.to(device), fmt, True), bias.to(device), "int8", branch, moved).cpu()
    oracle = x.double() @ weight.double().T + bias.double()
    if with_branch:
        oracle += hidden.double() @ up.double().T
    twin = torch_backend.linear(x, Packed(data, fmt), bias, "int8", (hidden, up) if with_branch else None, outliers)
    without = torch_backend.linear(x, Packed(data, fmt), bias, "int8", (hidden, up) if with_branch else None)
    assert relative(got, oracle) <= 1.02 * relative(twin, oracle) < 0.4 * relative(without, oracle)
