"""Test what Triton's interpreter hides of compiled code: NaN, ties, alignment and odd ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench.aot.ptx import Fault
from bench.aot.ptx.driver import absent_card
from bench.aot.sweep.cases import Case
from bench.aot.sweep.checks import compare_codes
from bench.aot.sweep.inputs import make
from flux_kernels import kernels
from flux_kernels.formats import FORMATS, Packed
from flux_kernels.kernels import int8
from flux_kernels.kernels.tiles import CODES_M
from flux_kernels.machine.random_rows import random_rows
from flux_kernels.torch_backend import low_precision
from flux_kernels.torch_backend.reference import dequantize

from .planted import edit_launches

Q4_K = FORMATS["Q4_K"]
K = 512


def spoiled(value: float) -> torch.Tensor:
    """Return 20 packed rows of Q4_K; d of row 3's first superblock is `value`."""
    data = random_rows(Q4_K, 20, K)
    data[3, :2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
    return data


@pytest.mark.parametrize("capability", [89, 120])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("row_scales", [False, True])
def test_nan_and_inf_weights_spoil_their_own_scale_alone(capability, value, row_scales):
    """A maximum in PTX drops NaN unless it says .NaN; sm_120 takes three operands at once."""
    data = spoiled(value)
    with absent_card(capability) as card:
        codes, scale = int8.unpack_weight(Packed(data, Q4_K, Q4_K.planes), 128, row_scales)
        card.allocations.check(codes), card.allocations.check(scale)
    expected = torch.zeros_like(scale, dtype=torch.bool)
    # A superblock is two groups of 128.
    expected[: 1 if row_scales else 2, 3] = True
    assert torch.equal(scale.isnan(), expected)


def test_a_plain_maximum_would_drop_nan():
    """The check above can fail: with max for max.NaN one block of NaN among four is dropped."""
    fmt = FORMATS["Q4_0"]
    # The first two bytes are a block's d either way.
    data = random_rows(fmt, 20, K, fmt.planes)
    data[3, :2] = torch.tensor([float("nan")], dtype=torch.float16).view(torch.uint8)
    found = []
    for instead in ("max.NaN.f32", "max.f32"):
        with absent_card(89) as card:
            edit_launches(card, "unpack_int8_kernel", lambda text, instead=instead: text.replace("max.NaN.f32", instead))
            _, scale = int8.unpack_weight(Packed(data, fmt, fmt.planes), 128)
        found.append(int(scale.isnan().sum()))
    assert found == [1, 0]


@pytest.mark.parametrize("capability", [80, 120])
def test_nan_and_inf_activations_spoil_their_own_row_alone(capability):
    x = torch.randn(37, K, generator=torch.Generator().manual_seed(0))
    x[2, 5], x[7, 300], x[9] = float("nan"), float("inf"), 0.0
    data = random_rows(Q4_K, 20, K)
    with absent_card(capability) as card:
        codes, scale = int8.quantize_activation(x, 128)
        y = kernels.linear(x, Packed(data, Q4_K, Q4_K.planes), None, "int8")
        half = kernels.linear(x, Packed(data, Q4_K, Q4_K.planes), None, "fp16_accumulate")
        card.allocations.check(codes)
    assert scale[:, [2, 7]].isnan().sum() == 2
    assert (scale[:, 9] == 0).all() and (codes[9] == 0).all() and (y[9] == 0).all()
    bad = torch.zeros(37, dtype=torch.bool)
    bad[[2, 7]] = True
    assert torch.equal(y.isnan().all(1), bad) and not y[~bad].isnan().any()
    assert torch.equal(half.isfinite().logical_not().all(1), bad) and half[~bad].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("units", [-2, 0, 2])
def test_codes_are_the_twins_whatever_an_approximate_division_gives(units, dtype):
    """Compiled code multiplies and rounds in one fused step, as the twin does, and divides as IEEE says.

    Quotients of bfloat16 x often meet a tie, where any other order of rounding gives another code.
    """
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1)).to(dtype)
    with absent_card(89, division_error=units) as card:
        codes, scale = int8.quantize_activation(x, 128)
        counts = card.launches[0][1]
    assert counts.opcodes["fma.rn.f32"] and counts.opcodes["div.rn.f32"] and "div.full.f32" not in counts.opcodes
    twin_codes, twin_scale = low_precision.quantize_groups(x, 128)
    assert torch.equal(scale.T, twin_scale[..., 0])
    assert torch.equal(codes.float(), twin_codes.flatten(1))


def test_weight_codes_against_the_twin_with_divisions_off():
    data = random_rows(Q4_K, 40, K)
    for units in (-2, 2):
        with absent_card(86, division_error=units):
            codes, _ = int8.unpack_weight(Packed(data, Q4_K, Q4_K.planes), 128)
        found = compare_codes("weight", codes, torch.ones(K // 128, 40), dequantize(Packed(data, Q4_K)), 128)
        assert found[1].ratio <= 1


@pytest.mark.parametrize("name, row_bytes, m", [("Q6_K", 2520, 2), ("Q6_K", 2520, 5), ("Q3_K", 1320, 33)])
def test_rows_that_start_at_8_byte_addresses(name, row_bytes, m):
    """Every second row starts between two 16-byte addresses, so no wide load may assume otherwise."""
    fmt, k = FORMATS[name], 3072
    assert fmt.row_bytes(k) == row_bytes and row_bytes % 16 == 8
    data = random_rows(fmt, 133, k, fmt.planes)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).bfloat16()
    with absent_card(86) as card:
        y = card.allocations.check(kernels.linear(x, Packed(data, fmt, fmt.planes), None, "exact"))
    weight = dequantize(Packed(data, fmt, fmt.planes), torch.float32 if m <= CODES_M else torch.bfloat16).double()
    expected, magnitude = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    assert ((y.double() - expected).abs() <= 2.0**-8 * expected.abs() + 2.0**-24 * (k / 16 + 8) * 1.01 * magnitude).all()


@pytest.mark.parametrize("rank", [1, 3, 16, 33])
@pytest.mark.parametrize("m", [2, 5])
def test_branches_of_any_rank(rank, m):
    """Triton compiles ranks of 1 and of multiples of 16 for themselves, and pads the others' last step."""
    inputs = make(Case("narrow_branch", "Q8_0", "fp16", 89), K)
    generator = torch.Generator().manual_seed(rank)
    n, x = inputs.data.shape[0], inputs.x[:m]
    branch = torch.randn(m, rank, generator=generator).half(), torch.randn(n, rank, generator=generator).half()
    with absent_card(89) as card:
        y = kernels.linear(x, Packed(inputs.data, inputs.fmt, inputs.fmt.planes), inputs.bias, "exact", branch)
        card.allocations.check(y)
    # Codes are multiplied before any rounding.
    weight = (inputs.weight if m <= CODES_M else inputs.weight.half()).double()
    expected = x.double() @ weight.T + inputs.bias.double() + branch[0].double() @ branch[1].double().T
    magnitude = x.double().abs() @ weight.abs().T + branch[0].double().abs() @ branch[1].double().abs().T + 10
    assert ((y.double() - expected).abs() <= 2.0**-11 * expected.abs() + 2.0**-24 * (K / 16 + 40) * 1.01 * magnitude).all()


def test_a_grid_that_is_too_long():
    """More than 65,535 rows on grid axis 1 are refused by a GPU's launch, and here."""
    from bench.aot.ptx import Buffer, Executable, launch, parse

    text = ".visible .entry nothing()\n.reqntid 32\n{\n\tret;\n}\n"
    launch(Executable(parse(text)), (1, 2), [Buffer(np.zeros(1))][:0], 0)
    with pytest.raises(Fault, match="65535"):
        launch(Executable(parse(text)), (1, 65536), [], 0)
