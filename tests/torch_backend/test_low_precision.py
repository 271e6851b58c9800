"""Fidelity contract of the compute modes: errors against float64, with exact weights.

On the torch twins.
"""

from __future__ import annotations

import pytest
import torch

from flux_kernels.formats import FORMATS, Packed
from flux_kernels.torch_backend.low_precision import linear_fp16_accumulate, linear_int8, quantize_groups

from ..kernels.samples import finite_rows

Q8_0 = FORMATS["Q8_0"]


def largest_of(count: int) -> float:
    """Return the root mean square of the largest of `count` gaussian magnitudes.

    An int8 scale of a group follows it.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2000, count, generator=generator).abs().amax(1).square().mean().sqrt().item()


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
    """Where weights are re-quantized too, errors add in squares.

    0.7 % activations, Q8_0's own groups at most 0.9 %.
    """
    data, weight = gaussian_rows(192, 3072, 7)
    x = activations(64, 3072, 0.0, 107)
    oracle = x.double() @ weight.T
    error = (linear_int8(x, Packed(data, Q8_0), None).double() - oracle).norm() / oracle.norm()
    assert error <= (0.007**2 + 0.009**2) ** 0.5


@pytest.mark.parametrize("k", [3072, 12288])
@pytest.mark.parametrize("name", ["Q2_K", "Q4_0", "Q4_K", "Q5_1", "Q5_K"])
def test_row_scales_add_what_the_largest_of_a_row_implies(name, k):
    """Rounding errors are uniform within steps of amax / 127.

    amax / 127 / sqrt(12) of a row's RMS (5 % scatter).

    On gaussian weights that is 0.8 to 0.9 %, a quarter of what even Q5_K has of its own, and adds to that in squares.
    """
    import flux_kernels as fk

    original = torch.randn(64, k, generator=torch.Generator().manual_seed(k)) * 0.02
    weight = fk.dequantize(fk.quantize(original, name), name)
    codes, scale = quantize_groups(weight, k)
    again = (codes * scale).flatten(1)
    added = ((again - weight).norm() / weight.norm()).item()
    assert added <= 1.05 * largest_of(k) / 127 / 12**0.5
    assert (again - original).norm() <= 1.01 * torch.hypot((weight - original).norm(), (again - weight).norm())


def test_fp8_activations_break_the_contract_that_int8_keeps():
    """Hopper gets int8 because e4m3 with a scale per token has 3 bits after the point.

    torch._scaled_mm takes it so; every value has them.
    """
    _, weight = gaussian_rows(64, 3072, 0)
    x = activations(64, 3072, 0.0, 100)
    scale = x.abs().amax(1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    oracle = x.double() @ weight.T
    fp8 = (x / scale).to(torch.float8_e4m3fn).double() * scale.double()
    error = ((fp8 @ weight.T - oracle).norm() / oracle.norm()).item()
    assert int8_activation_error(3072, 0.0, 0) <= 0.007
    assert error > 3 * 0.007


@pytest.mark.parametrize("seed", range(3))
def test_fp16_accumulate_error(seed):
    """At most 0.06 % against float64 on gaussian data (activations are given in fp16; weights are Q8_0)."""
    data, weight = gaussian_rows(128, 3072, seed)
    x = activations(48, 3072, 0.0, seed + 100).half().float()
    oracle = x.double() @ weight.T
    error = (linear_fp16_accumulate(x, Packed(data, Q8_0), None).double() - oracle).norm() / oracle.norm()
    assert error <= 6e-4


@pytest.mark.parametrize("twin", [linear_int8, linear_fp16_accumulate])
def test_bad_and_empty_tokens_show(twin):
    """A token of zeros gives the bias; NaN and Inf give NaN or Inf in their own row only."""
    data, _ = finite_rows("Q8_0", 8)
    x = torch.randn(20, 512)
    x[0], x[1, 5], x[2, 6] = 0, float("nan"), float("inf")
    bias = torch.randn(8)
    y = twin(x, Packed(data, Q8_0), bias)
    assert torch.equal(y[0], bias)
    assert not y[1].isfinite().any() and not y[2].isfinite().any()
    assert y[3:].isfinite().all()


# ggml's own int8 products as a second opinion


@pytest.mark.parametrize("k", [3072, 12288])
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_int8_errors_are_those_of_ggml_but_for_the_group_width(name, k):
    """ggml's vec_dot quantizes gaussian activations in groups of 32 or 256, we in groups of 128.

    32: Q8_0, 256: Q8_K.

    The error is uniform within steps of amax / 127, so it goes with the largest of a group: 1.23 times ggml's error against
    groups of 32, 0.93 times against 256. ggml keeps the weights' own codes; ours are rounded to int8 in groups of 128 as well, an
    error like that of gaussian activations, independent of it: sqrt(2) times. Both within 5 %, the scatter over seeds.
    """
    oracle = pytest.importorskip("tests.libggml_oracle")
    pytest.importorskip("libggml", reason="libggml is the second opinion")
    import flux_kernels as fk

    generator = torch.Generator().manual_seed(k)
    data = fk.quantize(torch.randn(48, k, generator=generator) * 0.02, name)
    weight, x = fk.dequantize(data, name).double(), torch.randn(32, k, generator=generator)
    want = x.double() @ weight.T

    def error(y: torch.Tensor) -> float:
        return ((y.double() - want).norm() / want.norm()).item()

    theirs = error(torch.from_numpy(oracle.int8_dot(name, data.numpy(), x.numpy())))
    codes, scale = quantize_groups(x, 128)
    group = oracle.activation_block(name)
    assert group == (256 if name.endswith("_K") else 32)
    ratio = largest_of(128) / largest_of(group)
    assert error((codes * scale).flatten(1).double() @ weight.T) == pytest.approx(ratio * theirs, rel=0.05)
    assert error(linear_int8(x, Packed(data, FORMATS[name]), None)) <= 1.05 * 2**0.5 * ratio * theirs
