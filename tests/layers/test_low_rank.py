"""The low-rank branch of a packed layer and its outlier channels: numbers, state, gradients, refusals."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flux_kernels as fk

N, K, RANK = 40, 512, 5
MODES = ("exact", "fp16_accumulate", "int8")
TOKENS = 24  # more than WEIGHT_ONLY_M, so that every mode runs its own kernel


def factors(rank: int = RANK, dtype=torch.float32, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, K, generator=generator) * 0.1, torch.randn(N, rank, generator=generator) * 0.1
    return down.to(dtype), up.to(dtype)


@pytest.fixture
def layer(packed):
    return fk.GGUFLinear.from_packed(packed("Q4_K", N, K), "Q4_K", torch.randn(N), compute_dtype=torch.float32)


def with_branch(layer, *, compute: str = "exact", trainable: bool = False, **options) -> fk.GGUFLinear:
    layer = copy.deepcopy(layer)
    layer.compute = compute
    layer.set_low_rank(*factors(**options), trainable=trainable)
    return layer


def oracle(layer, x: torch.Tensor) -> torch.Tensor:
    """Return x @ (W + up @ down).T + bias in float64."""
    weight = fk.dequantize(layer.file_bytes(), layer.format).double()
    if layer.rank:
        weight = weight + layer.low_rank_up.detach().double() @ layer.low_rank_down.detach().double()
    return x.double() @ weight.T + layer.bias.detach().double()


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compute", MODES)
def test_the_branch_is_added_in_every_mode(layer, compute, dtype, tokens):
    """The branch costs no accuracy: the error is at most 1.1 times the layer's own without it.

    Both against float64.

    The branch is as large as the packed product here, and its own errors (two roundings to x's dtype) are independent of it.
    """
    x = torch.randn(2, tokens, K).to(dtype)
    layer.compute = compute
    branched = with_branch(layer, compute=compute)
    alone = error(layer(x), oracle(layer, x))
    assert branched(x).dtype == dtype
    assert error(branched(x), oracle(branched, x)) <= 1.1 * alone + torch.finfo(dtype).eps
    assert error(layer(x), oracle(branched, x)) > 0.1, "the branch must be visible for this test to mean anything"


def test_sixteen_bit_results_are_rounded_once(layer):
    """bf16 has at most 1.25 times the RMS of one rounding, not sqrt(2) times.

    One rounding: 2^-8 / sqrt(12) of values spread over a binade.
    """
    x = torch.randn(64, K).bfloat16()
    branched = with_branch(layer, dtype=torch.bfloat16)
    branched.low_rank_up.data *= 0.1
    hidden = F.linear(x, branched.low_rank_down).double()
    weight = fk.dequantize(layer.file_bytes(), "Q4_K", torch.bfloat16).double()
    want = x.double() @ weight.T + layer.bias.bfloat16().double() + hidden @ branched.low_rank_up.double().T
    once = error(want.bfloat16(), want)
    assert error(branched(x), want) <= 1.25 * once


def test_the_weight_and_the_decoded_layer_include_the_branch(layer):
    branched, x = with_branch(layer), torch.randn(3, K)
    down, up = factors()
    want = fk.dequantize(layer.file_bytes(), "Q4_K") + up @ down
    torch.testing.assert_close(branched.weight + 0, want)
    torch.testing.assert_close(branched.weight.detach() + 0, want)
    torch.testing.assert_close(branched.dequantize().weight.data, want)
    torch.testing.assert_close(branched.dequantize()(x), branched(x), rtol=1e-4, atol=1e-4)
    compiled = torch.compile(lambda: branched.weight * 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), want)


def test_removing_the_branch_gives_the_layer_back_bit_for_bit(layer):
    branched, x = with_branch(layer), torch.randn(3, K)
    branched.set_low_rank(None, None)
    assert branched.rank == 0 and torch.equal(branched(x), layer(x))
    assert set(branched.state_dict()) == set(layer.state_dict()) == {"weight", "qweight", "bias"}


# gradients


@pytest.mark.parametrize("compute", MODES)
def test_gradients_reach_x_and_a_trainable_branch(layer, compute):
    """Backward is exact in every mode: the gradients of a plain linear with weight W + up @ down."""
    branched = with_branch(layer, compute=compute, trainable=True)
    weight = fk.dequantize(layer.file_bytes(), "Q4_K")
    down, up = (value.clone().requires_grad_(True) for value in factors())
    x = torch.randn(2, TOKENS, K)
    outer = torch.randn(2, TOKENS, N)
    gradients = []
    for call, parameters in (
        (branched, (branched.low_rank_down, branched.low_rank_up)),
        (lambda x: F.linear(x, weight + up @ down, layer.bias), (down, up)),
    ):
        leaf = x.clone().requires_grad_(True)
        (call(leaf) * outer).sum().backward()
        gradients.append([leaf.grad, *(parameter.grad for parameter in parameters)])
    for got, want in zip(*gradients):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_training_a_branch_lowers_the_loss_under_checkpointing(layer):
    branched = with_branch(layer, trainable=True)
    x, target = torch.randn(16, K), torch.randn(16, N)
    optimizer = torch.optim.AdamW([branched.low_rank_down, branched.low_rank_up], lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        y = torch.utils.checkpoint.checkpoint(branched, x, use_reentrant=False)
        loss = (y - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_autocast_and_compile(layer):
    branched, x = with_branch(layer), torch.randn(2, TOKENS, K)
    with torch.autocast("cpu", torch.bfloat16):
        got = branched(x)
    assert got.dtype == torch.bfloat16 and error(got, oracle(branched, x)) < 0.02
    compiled = torch.compile(branched, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), branched(x))
    torch.testing.assert_close(torch.export.export(branched, (x,)).module()(x), branched(x))


@pytest.mark.plain_memory
def test_opcheck_with_branch_and_outliers(layer):
    down, up = factors()
    index = torch.tensor([3, 77], dtype=torch.int32)
    weight = fk.dequantize(layer.file_bytes(), "Q4_K")[:, [3, 77]]
    x = torch.randn(2, TOKENS, K, requires_grad=True)
    hidden = (x.detach() @ down.T).requires_grad_(True)
    call = (x, layer.qweight, layer.bias, "Q4_K", "torch", "int8", False, hidden, up.requires_grad_(True), index, weight)
    torch.library.opcheck(torch.ops.flux_kernels.linear.default, call)


# state


def test_the_branch_travels_with_the_layer(layer):
    branched, x = with_branch(layer), torch.randn(3, K)
    branched.keep_outliers(torch.tensor([1, 5]))
    for copied in (copy.deepcopy(branched), pickle.loads(pickle.dumps(branched))):
        assert torch.equal(copied(x), branched(x)) and copied.outlier_index.tolist() == [1, 5]
    moved = copy.deepcopy(branched).to(torch.bfloat16)
    assert moved.low_rank_down.dtype == moved.low_rank_up.dtype == moved.outlier_weight.dtype == torch.bfloat16
    assert moved.outlier_index.dtype == torch.int32
    assert all(parameter.is_meta for parameter in branched.to("meta").parameters())
    assert branched(x.to("meta")).shape == (3, N)
    assert "rank=5" in repr(branched) and "outliers=2" in repr(branched)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_dict_brings_its_branch_along(layer, device):
    branched, x = with_branch(layer), torch.randn(3, K)
    branched.keep_outliers(torch.tensor([1, 5]))
    empty = copy.deepcopy(layer).to(device)
    empty.load_state_dict(branched.state_dict(), assign=device == "meta")
    assert torch.equal(empty(x), branched(x)) and torch.equal(empty.outlier_weight, branched.outlier_weight)
    with pytest.raises(RuntimeError, match='Missing key.*"low_rank_down"'):  # never silently kept or lost
        branched.load_state_dict(layer.state_dict())


def test_a_branch_of_another_layer_in_a_state_dict_is_refused(layer):
    state = with_branch(layer).state_dict()
    state["low_rank_up"] = torch.zeros(N + 1, RANK)
    with pytest.raises(RuntimeError, match=r"low_rank_down \[r, 512\] and low_rank_up \[40, r\]"):
        layer.load_state_dict(state)
    assert layer.rank == 0


BAD_BRANCHES = {
    "one of two": ((torch.zeros(2, K), None), "needs both down"),
    "another K": ((torch.zeros(2, K + 1), torch.zeros(N, 2)), r"got \[2, 513\] and \[40, 2\]"),
    "ranks differ": ((torch.zeros(2, K), torch.zeros(N, 3)), r"got \[2, 512\] and \[40, 3\]"),
    "integers": ((torch.zeros(2, K, dtype=torch.int32), torch.zeros(N, 2, dtype=torch.int32)), "floating dtype"),
    "dtypes differ": ((torch.zeros(2, K), torch.zeros(N, 2).half()), "share a floating dtype"),
    "other device": ((torch.zeros(2, K, device="meta"), torch.zeros(N, 2, device="meta")), "is on meta"),
}


@pytest.mark.parametrize("case", BAD_BRANCHES)
def test_a_branch_that_does_not_fit_is_refused(layer, case):
    branch, message = BAD_BRANCHES[case]
    branched = with_branch(layer)
    with pytest.raises(fk.FormatError, match=message):
        branched.set_low_rank(*branch)
    assert branched.rank == RANK


# outlier channels


@pytest.mark.parametrize("index", [torch.tensor([1, 1]), torch.tensor([-1]), torch.tensor([K]), torch.tensor([0.5])])
def test_outliers_that_are_no_channels_are_refused(layer, index):
    with pytest.raises(fk.FormatError, match="distinct integers from 0 to 511"):
        layer.keep_outliers(index)
    assert layer.outlier_index is None


def outlying(pattern: str, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return activations [64, k] with outlier channels, and the channels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, k, generator=generator)
    share, factor = {"1 % x 30": (0.01, 30), "0.1 % x 100": (0.001, 100), "1 % x 300": (0.01, 300)}[pattern]
    channels = torch.randperm(k, generator=generator)[: max(1, round(share * k))]
    x[:, channels] *= factor
    return x, channels


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("pattern", "bound"), [("1 % x 30", 0.003), ("0.1 % x 100", 0.003), ("1 % x 300", 0.00035)])
def test_outlier_channels_leave_a_tenth_of_the_error(pattern, bound, seed):
    """The error is under 0.3 % of the whole output where plain int8 has about 2 %.

    The outliers carry most of that output.

    The other channels are quantized with an error of 0.65 % (activations) and 0.64 % (Q8_0 to int8), together 0.91 % of their own
    share of the output, which is 1 / sqrt(1 + share * factor^2) of the whole: 0.32 for the first two patterns, 0.033 for the last.
    """
    weight = torch.randn(96, 3072, generator=torch.Generator().manual_seed(seed)) * 0.02
    layer = fk.GGUFLinear.from_linear(_linear(weight), "Q8_0", compute="int8")
    x, channels = outlying(pattern, 3072, seed + 100)
    want = x.double() @ fk.dequantize(layer.file_bytes(), "Q8_0").double().T
    without = error(layer(x), want)
    layer.keep_outliers(channels)
    assert without > 0.018
    assert error(layer(x), want) <= bound


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def test_outliers_concern_int8_only(layer):
    x = torch.randn(TOKENS, K)
    for compute in ("exact", "fp16_accumulate"):
        layer.compute = compute
        kept = copy.deepcopy(layer)
        kept.keep_outliers(torch.tensor([4, 100]))
        assert torch.equal(kept(x), layer(x))
    layer.compute = "int8"
    kept.compute = "int8"
    assert torch.equal(kept(x[:4]), layer(x[:4])), "few rows are exact, with all of W"
    kept.keep_outliers(None)
    assert torch.equal(kept(x), layer(x))


def test_an_outlier_channel_carries_nan_and_inf(layer):
    """What is left out of the int8 product is not lost."""
    layer.compute = "int8"
    layer.keep_outliers(torch.tensor([4]))
    x = torch.randn(TOKENS, K)
    x[3, 4], x[5, 4] = float("nan"), float("inf")
    y = layer(x)
    assert y[3].isnan().all() and not y[5].isfinite().any() and y[[0, 1, 2, 4, 6]].isfinite().all()
