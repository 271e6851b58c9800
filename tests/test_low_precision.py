"""Fidelity contract of the compute modes: errors against float64, on the torch twins, with exact weights."""

from __future__ import annotations

import pytest
import torch

from flux_kernels.formats import FORMATS
from flux_kernels.low_precision import linear_fp16_accumulate, linear_int8, quantize_groups

from .kernels.samples import finite_rows

Q8_0 = FORMATS["Q8_0"]


def gaussian_rows(n: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Q8_0 rows of gaussian weights and the values they stand for."""
    import flux_kernels as fk

    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02
    data = fk.quantize(weight, "Q8_0")
    return data, fk.dequantize(data, "Q8_0").double()


def activations(m: int, k: int, outliers: float, seed: int) -> torch.Tensor:
    """Return gaussian activations, a share of whose channels is 30 times larger."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    channels = torch.randperm(k, generator=generator)[: round(outliers * k)]
    x[:, channels] *= 30
    return x


def int8_activation_error(k: int, outliers: float, seed: int) -> float:
    """Return the relative output error of quantizing activations alone."""
    _, weight = gaussian_rows(192, k, seed)
    x = activations(64, k, outliers, seed + 100)  # not the weights' own numbers
    codes, scale = quantize_groups(x, 128)
    oracle = x.double() @ weight.T
    return (((codes * scale).flatten(1).double() @ weight.T - oracle).norm() / oracle.norm()).item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [3072, 12288])
def test_int8_activations_cost_what_the_contract_allows(k, seed):
    """At most 0.7 % on gaussian activations, 2.5 % with 1 % of the channels 30 times larger."""
    assert int8_activation_error(k, 0.0, seed) <= 0.007
    assert int8_activation_error(k, 0.01, seed) <= 0.025


def test_whole_int8_linear():
    """Weights re-quantized too: errors add in squares (0.7 % activations, Q8_0's own groups at most 0.9 %)."""
    data, weight = gaussian_rows(192, 3072, 7)
    x = activations(64, 3072, 0.0, 107)
    oracle = x.double() @ weight.T
    error = (linear_int8(x, data, Q8_0, None, False).double() - oracle).norm() / oracle.norm()
    assert error <= (0.007**2 + 0.009**2) ** 0.5


@pytest.mark.parametrize("seed", range(3))
def test_fp16_accumulate_error(seed):
    """At most 0.06 % against float64 on gaussian data (activations are given in fp16; weights are Q8_0)."""
    data, weight = gaussian_rows(128, 3072, seed)
    x = activations(48, 3072, 0.0, seed + 100).half().float()
    oracle = x.double() @ weight.T
    error = (linear_fp16_accumulate(x, data, Q8_0, None, False).double() - oracle).norm() / oracle.norm()
    assert error <= 6e-4


@pytest.mark.parametrize("twin", [linear_int8, linear_fp16_accumulate])
def test_bad_and_empty_tokens_show(twin):
    """A token of zeros gives the bias; NaN and Inf give NaN or Inf in their own row only."""
    data, _ = finite_rows("Q8_0", 8)
    x = torch.randn(20, 512)
    x[0], x[1, 5], x[2, 6] = 0, float("nan"), float("inf")
    bias = torch.randn(8)
    y = twin(x, data, Q8_0, bias, False)
    assert torch.equal(y[0], bias)
    assert not y[1].isfinite().any() and not y[2].isfinite().any()
    assert y[3:].isfinite().all()
