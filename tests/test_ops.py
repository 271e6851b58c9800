"""The custom ops: checks, gradients, autocast, tracing and the backend table."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.nn import functional as F

import flux_kernels as fk
from flux_kernels import backends

OPS = torch.ops.flux_kernels
N, K = 12, 512


@pytest.fixture
def data(packed):
    return packed("Q4_K", N, K)


@pytest.fixture
def weight(data):
    return fk.dequantize(data, "Q4_K")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(K,), (1, K), (0, K), (2, 3, K)])
def test_linear_is_f_linear_with_the_decoded_weight(data, weight, dtype, shape):
    x, bias = torch.randn(shape).to(dtype), torch.randn(N)
    got = fk.linear(x, data, "Q4_K", bias)
    assert got.dtype == dtype and torch.equal(got, F.linear(x, weight.to(dtype), bias.to(dtype)))


def test_strided_activations(data, weight):
    x = torch.randn(3, 2 * K)[:, ::2]
    torch.testing.assert_close(fk.linear(x, data, "Q4_K"), F.linear(x, weight))


def test_gradients_equal_those_of_f_linear(data, weight):
    gradients = []
    for call in (lambda x, b: fk.linear(x, data, "Q4_K", b), lambda x, b: F.linear(x, weight, b)):
        torch.manual_seed(0)
        x, bias = torch.randn(2, 3, K, requires_grad=True), torch.randn(N, requires_grad=True)
        call(x, bias).square().sum().backward()
        gradients.append((x.grad, bias.grad))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_gradient_has_the_dtype_of_x(data):
    x, bias = torch.randn(3, K, dtype=torch.bfloat16, requires_grad=True), torch.randn(N, requires_grad=True)
    fk.linear(x, data, "Q4_K", bias).sum().backward()
    assert x.grad.dtype == torch.bfloat16 and bias.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_f_linear_does(data, weight, dtype):
    x = torch.randn(3, K, requires_grad=True)
    with torch.autocast("cpu", dtype):
        got, want = fk.linear(x, data, "Q4_K"), F.linear(x, weight)
    assert got.dtype == want.dtype == dtype and torch.equal(got, want)
    got.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.plain_memory
@pytest.mark.parametrize("bias", [None, torch.zeros(N)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_linear(data, bias, requires_grad):
    x = torch.randn(2, 3, K, requires_grad=requires_grad)
    torch.library.opcheck(OPS.linear.default, (x, data, bias, "Q4_K", "auto", "exact", False))


@pytest.mark.plain_memory
def test_opcheck_dequantize(data):
    torch.library.opcheck(OPS.dequantize.default, (data, "Q4_K", torch.bfloat16, "auto", False))


BAD_CALLS = {
    "another K": ({"x": torch.zeros(2, 256)}, fk.FormatError, r"rows of K=512 weights, got x of shape \[2, 256\]"),
    "integer x": ({"x": torch.zeros(2, K, dtype=torch.int32)}, fk.FormatError, "float16, bfloat16, float32, got int32"),
    "float64 x": ({"x": torch.zeros(2, K, dtype=torch.float64)}, fk.FormatError, "got float64. Cast it first"),
    "scalar x": ({"x": torch.zeros(())}, fk.FormatError, r"got x of shape \[\]"),
    "data as int8": ({"data": torch.zeros(N, 288, dtype=torch.int8)}, fk.FormatError, "must be uint8, got torch.int8"),
    "part of a block": ({"data": torch.zeros(N, 287, dtype=torch.uint8)}, fk.FormatError, "whole blocks of 144 bytes"),
    "3-d data": ({"data": torch.zeros(1, N, 288, dtype=torch.uint8)}, fk.FormatError, r"shape \[N, row bytes\]"),
    "long bias": ({"bias": torch.zeros(N + 1)}, fk.FormatError, r"shape \[12\], got \[13\]"),
    "integer bias": ({"bias": torch.zeros(N, dtype=torch.int64)}, fk.FormatError, "bias must have a floating dtype"),
    "other device": ({"x": torch.zeros(2, K, device="meta")}, fk.FormatError, "x is on meta and the packed data on cpu"),
    "unknown format": ({"format": "Q4_X"}, fk.FormatError, "Unknown block format 'Q4_X'"),
    "unknown backend": ({"backend": "cuda"}, fk.BackendUnavailable, "Known: auto, triton, torch"),
    "unknown compute": ({"compute": "fp4"}, fk.BackendUnavailable, "Known: exact, fp16_accumulate, int8"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_say_what_is_wrong_in_eager_and_while_tracing(data, case):
    changes, error, message = BAD_CALLS[case]
    call = {
        "x": torch.zeros(2, K),
        "data": data,
        "bias": None,
        "format": "Q4_K",
        "backend": "auto",
        "compute": "exact",
        "planes": False,
    }
    call.update(changes)
    with pytest.raises(error, match=message):
        OPS.linear(**call)
    if case != "other device":
        fake = {key: value.to("meta") if torch.is_tensor(value) else value for key, value in call.items()}
        with pytest.raises(error, match=message):
            OPS.linear(**fake)


def test_decoding_to_an_integer_is_refused(data):
    with pytest.raises(fk.FormatError, match="got int32"):
        fk.dequantize(data, "Q4_K", torch.int32)


def test_a_named_backend_is_never_replaced(data, monkeypatch):
    monkeypatch.setattr(backends._triton, "interpreting", lambda: False)
    backends.resolve.cache_clear()
    with pytest.raises(fk.BackendUnavailable, match='backend="triton" cannot run: .*Use backend="auto"'):
        fk.linear(torch.zeros(1, K), data, "Q4_K", backend="triton")
    backends.resolve.cache_clear()


def test_a_mode_a_backend_lacks_is_refused(data, monkeypatch):
    def refusal(device, fmt, compute):
        return None if compute == "exact" else f'compute="{compute}" is not implemented there'

    exact_only = dataclasses.replace(backends.BACKENDS["torch"], refusal=refusal)
    monkeypatch.setitem(backends.BACKENDS, "torch", exact_only)
    backends.resolve.cache_clear()
    with pytest.raises(fk.BackendUnavailable, match='compute="int8" is not implemented there'):
        fk.linear(torch.zeros(1, K), data, "Q4_K", backend="torch", compute="int8")
    backends.resolve.cache_clear()


def test_a_k_that_a_mode_cannot_take_is_refused():
    data = torch.zeros(2, 34, dtype=torch.uint8)
    with pytest.raises(fk.FormatError, match="K % 64 == 0, got K=32"):
        fk.linear(torch.zeros(1, 32), data, "Q8_0", compute="fp16_accumulate")


def test_auto_is_torch_on_the_cpu_even_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(backends._triton, "interpreting", lambda: True)
    backends.resolve.cache_clear()
    assert backends.resolve("auto", "exact", torch.device("cpu"), fk.FORMATS["Q4_K"]).name == "torch"
    backends.resolve.cache_clear()


def test_old_cards_get_the_torch_backend_from_auto(monkeypatch):
    monkeypatch.setattr(backends, "capability_of", lambda device: (7, 0))
    card, fmt = torch.device("cuda", 0), fk.FORMATS["Q4_K"]
    backends.resolve.cache_clear()
    assert backends.resolve("auto", "exact", card, fmt).name == "torch"
    if backends._triton.TRITON_VERSION is not None:
        with pytest.raises(fk.BackendUnavailable, match="capability 7.0"):
            backends.resolve("triton", "exact", card, fmt)
        monkeypatch.setattr(backends, "capability_of", lambda device: (7, 5))  # Turing: unpack and cuBLAS, nothing faster
        backends.resolve.cache_clear()
        assert backends.resolve("auto", "exact", card, fmt).name == "triton"
        # Torch's twins of the faster modes are slower than exact: not what was asked for
        for backend in ("triton", "auto"):
            with pytest.raises(fk.BackendUnavailable, match='RTX 30 card or newer.*Use backend="auto" with compute="exact"'):
                backends.resolve(backend, "int8", card, fmt)
        monkeypatch.setattr(backends, "capability_of", lambda device: (8, 6))
        backends.resolve.cache_clear()
        assert backends.resolve("auto", "exact", card, fmt).name == "triton"
    backends.resolve.cache_clear()


def test_a_card_without_the_unit_is_told_of_when_layers_are_swapped(monkeypatch):
    """Also while the layers are still on the CPU: they are meant for the card."""
    pytest.importorskip("triton")
    card, fmt = torch.device("cuda", 0), fk.FORMATS["Q4_K"]
    monkeypatch.setattr(backends, "execution_devices", lambda device: [device, card])
    monkeypatch.setattr(backends, "capability_of", lambda device: (7, 5))
    backends.resolve.cache_clear()
    model = nn.Sequential(nn.Linear(256, 64))
    with pytest.raises(fk.BackendUnavailable, match="RTX 30 card or newer"):
        fk.swap_linear(model, compute="int8", format="Q4_K")
    assert type(model[0]) is nn.Linear
    fk.swap_linear(model, "torch", "int8", format="Q4_K")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    for architecture, runs in (("gfx942:sramecc+:xnack-", True), ("gfx1100", True), ("gfx1030", False), ("gfx906", False)):
        monkeypatch.setattr(backends, "_architecture", lambda device, name=architecture: name)
        backends.resolve.cache_clear()
        if runs:
            assert backends.resolve("auto", "int8", card, fmt).name == "triton"
        else:
            with pytest.raises(fk.BackendUnavailable, match="needs matrix cores"):
                backends.resolve("auto", "int8", card, fmt)
    backends.resolve.cache_clear()


def test_no_more_compilations_than_a_plain_linear(data):
    packed_layer = fk.GGUFLinear.from_packed(data, "Q4_K", torch.zeros(N), compute_dtype=torch.float32)
    counts = []
    for layer in (nn.Linear(K, N), packed_layer):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounter()
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        for tokens in (5, 9, 33, 64):
            with torch.no_grad():
                compiled(torch.randn(1, tokens, K))
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0]
