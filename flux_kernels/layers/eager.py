"""Call the Triton kernels past torch's dispatcher where nothing watches it: plain tensors, eager mode, no gradients.

A step of Flux has 504 linear calls. Dispatching a custom op with its autograd and autocast kernels, checking shapes and looking up
what runs costs some 15 us a call in Python, longer than a GPU takes for many of them. Where anything could see the op (compilers, modes,
transforms, profilers, autograd, autocast, tensor subclasses), the op is called.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import _len_torch_function_stack
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from .. import ops
from ..backends import resolve
from ..compute import WIDEST_LOAD

_DEVICES = frozenset({"cpu", "cuda", "xpu"})
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_MOST = 4096  # kinds of calls that are remembered

Packed = tuple[Tensor, Tensor | None, str, str, str, bool]  # data, bias, format, backend, compute, planes, as the op takes them
Call = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]  # x, data, bias, row_scale


def linear(x: Tensor, packed: Packed, row_scale: Tensor | None = None) -> Tensor:
    """Compute what `torch.ops.flux_kernels.linear` computes, with the same errors; row_scale is the layer's own."""
    data, bias, *_ = packed
    if not torch.compiler.is_compiling() and not watched(x, bias, data) and data.data_ptr() % WIDEST_LOAD == 0:
        call = prepared(x, packed)
        if call is not None:
            return call(x, data, bias, row_scale)
    return dispatched(x, packed, row_scale)


def dispatched(x: Tensor, packed: Packed, row_scale: Tensor | None) -> Tensor:
    """Call the op."""
    return torch.ops.flux_kernels.linear(x, *packed, None, None, None, None, row_scale)


def watched(x: Tensor, bias: Tensor | None, data: Tensor) -> bool:
    """Tell whether anything but the result could depend on the op being called."""
    return (
        type(x) is not Tensor
        or type(data) not in _PLAIN
        or (bias is not None and type(bias) not in _PLAIN)
        or x.device.type not in _DEVICES
        or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        or torch.is_autocast_enabled(x.device.type)
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


class Prepared:
    """Remember for every kind of call what computes it, None where only the op does."""

    def __init__(self) -> None:
        self._calls: dict[tuple, Call | None] = {}
        self.cache_clear = self._calls.clear

    def __call__(self, x: Tensor, packed: Packed) -> Call | None:
        """Return what computes calls like this one."""
        data, bias, *names = packed
        about_bias = None if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.device)
        key = (x.shape, x.stride(), x.dtype, x.device, data.shape, data.stride(), data.dtype, data.device, about_bias, *names)
        try:
            return self._calls[key]
        except KeyError:
            call = _prepare(x, packed)
            if len(self._calls) >= _MOST:
                self.cache_clear()
            self._calls[key] = call
            return call


prepared = Prepared()


def _prepare(x: Tensor, packed: Packed) -> Call | None:
    data, bias, format, backend, compute, planes = packed
    fmt, n = ops.check_linear(x, data, bias, format, backend, compute)
    k = x.shape[-1]
    m = x.numel() // k
    plain = x.is_contiguous() and data.is_contiguous() and (bias is None or bias.is_contiguous())
    if not m * n or not plain or resolve(backend, compute, x.device, fmt).name != "triton":
        return None
    from .. import kernels
    from ..kernels.choice import on_forget
    from ..kernels.launching import device_of
    from ..kernels.problem import Problem

    on_forget(prepared.cache_clear)
    bias_dtype = None if bias is None else bias.dtype
    problem = Problem(m, n, k, k, data.shape[1], fmt, planes, x.dtype, bias_dtype, 0, x.device)
    with device_of(data):
        run = kernels.prepare(problem, compute)
    shape, dtype, device, flat = (*x.shape[:-1], n), x.dtype, x.device, x.dim() == 2

    def call(x: Tensor, data: Tensor, bias: Tensor | None, row_scale: Tensor | None) -> Tensor:
        y = torch.empty((m, n), dtype=dtype, device=device)
        with device_of(data):
            run(x if flat else x.view(m, k), data, bias, y, None, row_scale)
        return y if flat else y.view(shape)

    return call
