"""The GEMM kernels against the decoded weight itself and against float64.

Fused, and small-M up to two rows.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flux_kernels import kernels
from flux_kernels.formats import FORMATS, Packed
from flux_kernels.kernels.choice import Choice
from flux_kernels.kernels.tiles import Tile, choose_algorithm

from ..poisoned_memory import poisoned
from .samples import finite_rows, golden

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def launch(x, data, fmt, bias=None, planes=False, device="cpu"):
    """Run the kernel on `device` from tensors on the CPU; the result comes back on the CPU."""
    packed = fmt.layout.to_planes(data) if planes else data
    bias = None if bias is None else bias.to(device)
    return kernels.linear(x.to(device), Packed(packed.to(device), fmt, planes), bias, "exact").cpu()


def relative(error: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the relative Frobenius norm of an error."""
    return (error.double().norm() / reference.double().norm()).item()


@pytest.mark.parametrize("planes", [False, True], ids=["file order", "planes"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_identity_activations_give_the_decoded_weight(name, dtype, planes, device):
    """With x = I the output is the weight rounded once, equal by value (a dot turns -0.0 into 0.0)."""
    fmt = FORMATS[name]
    data, weight = finite_rows(name, 5)
    got = launch(torch.eye(512, dtype=dtype), data, fmt, planes=planes, device=device)
    assert torch.equal(got, weight.to(dtype).T)


@pytest.mark.parametrize("m", [1, 2, 5, 16, 33, 130])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_error_is_at_most_twice_that_of_torch(name, dtype, m, device):
    """The error against float64 is at most 2x that of torch's matmul in the same dtype.

    Any M and a ragged N, with bias.

    Both round each output once to the dtype; the kernel adds its float32 accumulation, in another order than torch. The
    two error norms are random sums over M * N outputs, so for few outputs the bound gets one output rounding of slack.
    """
    torch.manual_seed(m)
    fmt = FORMATS[name]
    data, weight = finite_rows(name, 37, repeats=2)
    x = torch.randn(m, 1024).to(dtype)
    bias = torch.randn(37).to(dtype)
    oracle = x.double() @ weight.to(dtype).double().T + bias.double()
    torch_error = (torch.nn.functional.linear(x, weight.to(dtype), bias).double() - oracle).norm()
    got = launch(x, data, fmt, bias, fmt.planes, device)
    slack = torch.finfo(dtype).eps * oracle.norm() / 2
    assert (got.double() - oracle).norm() <= 2 * torch_error + slack
    nmse = relative(got.double() - oracle, oracle) ** 2
    assert nmse <= {torch.float32: 1e-12, torch.float16: 1e-6, torch.bfloat16: 1e-5}[dtype]


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
def test_strided_activations(name, device):
    """x may be a slice of a wider tensor, or have another order of strides."""
    if name not in FORMATS:
        pytest.fail(f"{name} is not registered")
    fmt = FORMATS[name]
    data, weight = finite_rows(name, 16)
    wide = torch.randn(6, 1536)
    for x in (wide[:, 512:1024], wide[::2, :512], wide[:, 1024:].T.contiguous().T):
        packed = data.to(device)
        got = kernels.linear(x.to(device), Packed(packed, fmt), None, "exact").cpu()
        assert relative(got - x.double() @ weight.double().T, got) < 1e-6


@pytest.mark.parametrize("compute", ["exact", "int8", "fp16_accumulate"])
@pytest.mark.parametrize("m", [1, 20])
def test_strided_bias(m, compute, device):
    """The bias may be a strided slice or an expanded scalar; kernels read it with unit stride."""
    fmt = FORMATS["Q8_0"]
    data, _ = finite_rows("Q8_0", 20)
    x = torch.randn(m, 512, device=device)
    wide = torch.randn(40, device=device)
    for bias in (wide[::2], wide[:1].expand(20)):
        got = kernels.linear(x, Packed(data.to(device), fmt), bias, compute)
        assert torch.equal(got, kernels.linear(x, Packed(data.to(device), fmt), bias.clone(), compute))


def test_no_rows_of_x(device):
    fmt = FORMATS["Q8_0"]
    data, _ = finite_rows("Q8_0", 19)
    assert launch(torch.empty(0, 512), data, fmt, device=device).shape == (0, 19)


def test_every_element_of_y_is_written(device):
    """A store that is missed leaves NaN, one too many breaks a guard.

    torch.empty is poisoned in these tests.
    """
    fmt = FORMATS["Q8_0"]
    data, _ = finite_rows("Q8_0", 19)
    assert torch.empty(1).isnan().all()
    x = torch.ones(3, 512, dtype=torch.float16, device=device)
    assert kernels.linear(x, Packed(data.to(device), fmt), None, "exact").isfinite().all()


@pytest.mark.parametrize("at", [-1, 6])
def test_a_write_beyond_a_tensor_is_seen(at, device):
    with (
        pytest.raises(AssertionError, match=r"bytes (before|after) a tensor \[2, 3\] of torch.float32 were written"),
        poisoned(),
    ):
        made = torch.empty(2, 3, device=device)
        made.as_strided((1,), (1,), made.storage_offset() + at).fill_(0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_one_row_selects_one_column_of_the_weight(name, dtype, device):
    """The small-M kernel with a unit vector as x gives a column of the rounded weight, for every format."""
    fmt = FORMATS[name]
    data, weight = finite_rows(name, 70)
    for at in (0, 37, 511):
        x = torch.zeros(1, 512, dtype=dtype)
        x[0, at] = 1
        got = launch(x, data, fmt, planes=fmt.planes, device=device)
        assert torch.equal(got[0], weight[:, at].to(dtype))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ3_S"])
def test_the_two_stage_algorithm_equals_torch(name, bias, device, monkeypatch):
    """Unpacking chunk by chunk and torch's matmul give what dequantize-then-linear gives.

    A ragged last chunk included.
    """
    monkeypatch.setattr(kernels, "choose", lambda *call: Choice("two_stage", None, "", rows=16))
    fmt = FORMATS[name]
    data, weight = finite_rows(name, 37)
    x, b = torch.randn(20, 512), torch.randn(37) if bias else None
    got = launch(x, data, fmt, b, fmt.planes, device)
    torch.testing.assert_close(got, torch.nn.functional.linear(x, weight, b), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "splits"), [("Q4_K", 2), ("Q8_0", 4), ("Q6_K", 4), ("IQ3_S", 2)])
def test_split_k_equals_one_program_per_tile(name, splits, dtype, device, monkeypatch):
    """The error of split K against float64 is at most twice the fused GEMM's.

    Several programs share K, and their parts are added in order.
    """
    fmt = FORMATS[name]
    data, weight = finite_rows(name, 37, repeats=2)
    x, bias = torch.randn(19, 1024).to(dtype), torch.randn(37).to(dtype)
    oracle = x.double() @ weight.to(dtype).double().T + bias.double()
    got = {}
    fused = Tile(16, 64, max(128, fmt.block_size), 4, 2)
    for algorithm, tile in {"fused": fused, "split_k": replace(fused, splits=splits)}.items():
        chosen = Choice(algorithm, tile, "")
        monkeypatch.setattr(kernels, "choose", lambda *call, chosen=chosen: chosen)
        got[algorithm] = launch(x, data, fmt, bias, fmt.planes, device).double()
    slack = torch.finfo(dtype).eps * oracle.norm() / 2
    assert (got["split_k"] - oracle).norm() <= 2 * (got["fused"] - oracle).norm() + slack
    assert not torch.equal(got["split_k"], got["fused"]) or dtype != torch.float32  # it did add in another order


def test_the_algorithm_is_chosen_by_rows_and_card():
    """Few rows take small-M, many take unpacking.

    Turing has no tensor-core code. From some rows, by card, unpacking costs less than a decode that is waited for.
    """
    choices = {(1, (8, 6)): "small_m", (64, (7, 5)): "two_stage", (4608, None): "fused", (4608, (11, 0)): "fused"}
    for card, rows in {(8, 0): 256, (8, 6): 512, (8, 9): 1024, (9, 0): 17, (10, 0): 512, (12, 0): 512}.items():
        choices |= {(rows - 1, card): "fused", (rows, card): "two_stage"}
    assert {key: choose_algorithm(*key)[0] for key in choices} == choices
    assert "measured" in choose_algorithm(512, (9, 0))[1] and "estimated" in choose_algorithm(4608, (8, 9))[1]


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_nan_and_inf_blocks_stay_in_their_rows(name, device):
    """A block whose scale is NaN or Inf poisons its own output column as in the reference, and no other."""
    fmt = FORMATS[name]
    data, _ = finite_rows(name, 4)
    data = data.clone()
    data[1, 0:2] = torch.tensor([0x00, 0x7E], dtype=torch.uint8)  # d = NaN
    got = launch(torch.randn(3, 512), data, fmt, device=device)
    assert got[:, 1].isnan().all()
    assert got[:, [0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
def test_the_narrowest_rows(name, device):
    """K of a single block works, as does K that is no multiple of 256 where the format allows it."""
    fmt, vectors = FORMATS[name], golden(name)
    k = fmt.block_size
    data = vectors["q"][:5, : fmt.type_size].contiguous()
    x = torch.randn(3, k)
    oracle = x.double() @ vectors["y"][:5, :k].double().T
    assert relative(launch(x, data, fmt, device=device) - oracle, oracle) < 1e-6


def test_rows_that_start_at_an_odd_address_are_copied_to_an_aligned_one(device):
    """A slice of 17-byte rows starts anywhere; word loads would fault there on a GPU."""
    from flux_kernels.kernels.launching import aligned

    vectors = golden("MXFP4")
    data = vectors["q"][:5, :17].contiguous().to(device)
    assert data[1:].data_ptr() % 16
    whole = Packed(data, FORMATS["MXFP4"])
    assert aligned(Packed(data[1:], FORMATS["MXFP4"])).data.data_ptr() % 16 == 0
    assert aligned(whole) is whole
    got = kernels.linear(torch.eye(32, device=device), Packed(data[1:], FORMATS["MXFP4"]), None, "exact").cpu()
    assert torch.equal(got, vectors["y"][1:5, :32].T)
