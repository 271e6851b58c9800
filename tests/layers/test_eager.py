"""The way past torch's dispatcher: the op's results and errors.

It is not taken where anything could see the op.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import flux_kernels as fk
from flux_kernels import kernels
from flux_kernels.formats import FORMATS
from flux_kernels.kernels import choice
from flux_kernels.layers import eager
from flux_kernels.machine.random_rows import random_rows

OP = torch.ops.flux_kernels.linear


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Collect which way each call of a layer takes."""
    ways: list[str] = []

    dispatched = eager.dispatched

    def op(*arguments):
        ways.append("op")
        return dispatched(*arguments)

    monkeypatch.setattr(eager, "dispatched", op)
    prepare = kernels.prepare

    def spying(problem, compute):
        run = prepare(problem, compute)

        def count(*tensors):
            ways.append("direct")
            run(*tensors)

        return count

    monkeypatch.setattr(kernels, "prepare", spying)
    eager.prepared.cache_clear()
    yield ways
    eager.prepared.cache_clear()


def layer(format: str = "Q4_K", n: int = 24, k: int = 512, bias: bool = True, compute: str = "exact") -> fk.GGUFLinear:
    fmt = FORMATS[format]
    made = torch.randn(n) if bias else None
    data = random_rows(fmt, n, k, fmt.planes)
    return fk.GGUFLinear.from_packed(data, format, made, planes=fmt.planes, backend="triton", compute=compute)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((1, 512), torch.float16), ((20, 512), torch.float32), ((2, 10, 512), torch.float16)]
)
@pytest.mark.parametrize("compute", ["exact", "fp16_accumulate", "int8"])
@pytest.mark.parametrize("format", ["Q4_K", "Q6_K", "IQ4_NL"])
def test_the_result_is_the_ops_bit_for_bit(format, compute, dtype, shape, calls):
    """The first call, which compiles, and the second, which launches, give the op's result.

    1 to 3 dimensions, with bias.
    """
    made, x = layer(format, compute=compute), torch.randn(shape).to(dtype)
    with torch.no_grad():
        first, second = made(x), made(x)
    packed = (made.qweight, made.bias, made.format, made.backend, made.compute, made.planes)
    assert calls == ["direct", "direct"]
    assert torch.equal(first, OP(x, *packed))
    assert torch.equal(second, first)
    assert first.shape == (*shape[:-1], 24)


def test_a_single_vector_takes_it_too(calls):
    made, x = layer(), torch.randn(512)
    with torch.no_grad():
        got = made(x)
    assert calls == ["direct"] and torch.equal(got, OP(x, made.qweight, made.bias, "Q4_K", "triton", "exact", False))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Passing(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_modes_see_the_op(calls):
    made, x = layer(), torch.randn(3, 512)
    with torch.no_grad(), Seen() as seen:
        made(x)
    assert "flux_kernels.linear.default" in seen.names
    with torch.no_grad(), Passing():
        made(x)
    assert calls == ["op", "op"]


def test_gradients_autocast_transforms_and_profilers_take_the_op(calls):
    made, x = layer(), torch.randn(3, 512)
    made(x.clone().requires_grad_()).sum().backward()
    trained = layer()
    trained.bias.requires_grad_(True)
    trained(x).sum().backward()
    assert trained.bias.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == torch.bfloat16
    with torch.no_grad():
        with torch.profiler.profile() as profile:
            made(x)
        assert any(event.key == "flux_kernels::linear" for event in profile.key_averages())
        make_fx(made)(x)
        torch.func.functional_call(made, {}, (x,))  # no transform: nothing watches
    assert calls[:-1] == ["op"] * 5
    assert calls[-1] == "direct"


def test_subclasses_take_the_op(calls):
    """A parameter as x, and a fake tensor of a trace, are no plain tensors."""
    made = layer()
    with torch.no_grad():
        made(nn.Parameter(torch.randn(3, 512), requires_grad=False))
    assert calls == ["op"]


@pytest.mark.parametrize("x", [torch.randn(512, 3).T, torch.randn(3, 1024)[:, :512], torch.empty(0, 512)])
def test_what_is_not_contiguous_or_empty_takes_the_op(x, calls):
    made = layer()
    with torch.no_grad():
        got = made(x)
    assert calls == ["op"]
    assert got.shape == (x.shape[0], 24)


def test_rows_at_an_odd_address_take_the_op(calls):
    """Decoders read words: an unaligned first row is copied there, as a GPU would fault."""
    made = layer()
    moved = torch.empty(made.qweight.numel() + 1, dtype=torch.uint8)[1:].view_as(made.qweight).copy_(made.qweight)
    x = torch.randn(3, 512)
    with torch.no_grad():
        wanted = made(x)
        made.qweight = nn.Parameter(moved, requires_grad=False)
        assert torch.equal(made(x), wanted)
    assert calls == ["direct", "op"]


def test_an_unaligned_x_is_right(calls):
    """The kernel that was compiled for aligned tensors is not launched on it."""
    made, wide = layer(), torch.randn(3 * 512 + 1).half()
    with torch.no_grad():
        x = wide[1:].view(3, 512)
        assert torch.equal(made(x), made(x.clone()))


@pytest.mark.parametrize("bad", [torch.randn(3, 511), torch.randn(3, 512, dtype=torch.float64), torch.tensor(1.0)])
def test_errors_are_the_ops(bad, calls):
    """Also after a good call of the same layer, and every time."""
    made = layer()
    with torch.no_grad():
        made(torch.randn(3, 512))
        for _ in range(2):
            with pytest.raises(fk.FormatError):
                made(bad)


def test_what_a_layer_becomes_is_what_is_computed(calls):
    """Another compute mode, other bytes, another bias: nothing remembered is stale."""
    made, other, x = layer(), layer(), torch.randn(20, 512)
    with torch.no_grad():
        made(x)
        made.qweight.data.copy_(other.qweight.data)
        made.bias.data.copy_(other.bias.data)
        assert torch.equal(made(x), other(x))
        made.compute = other.compute = "int8"
        assert torch.equal(made(x), other(x))
        made.bias = None
        assert torch.equal(made(x), fk.linear(x, other.qweight, "Q4_K", backend="triton", compute="int8"))


def test_a_new_tuning_record_is_heard(calls):
    made, x = layer(), torch.randn(20, 512)
    with torch.no_grad():
        made(x)
        assert len(eager.prepared._calls) == 1
        choice.forget()
        assert not eager.prepared._calls


def test_it_is_left_to_the_op_on_the_cpu(calls):
    """`backend="auto"` takes the torch backend there."""
    made = layer()
    made.backend = "auto"
    made.planes = False
    with torch.no_grad():
        made(torch.randn(3, 512))
    assert calls == ["op"]
