"""Call the Triton kernels past torch's dispatcher where nothing watches it.

Plain tensors, eager mode, no gradients.

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
from ..formats import Packed

_DEVICES = frozenset({"cpu", "cuda", "xpu"})
_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_MOST = 4096  # kinds of calls that are remembered

Call = Callable[[Tensor, Packed, "Tensor | None"], Tensor]  # x, weight, bias


def linear(x: Tensor, weight: Packed, bias: Tensor | None, backend: str, compute: str) -> Tensor:
    """Compute what `torch.ops.flux_kernels.linear` computes, with the same errors."""
    data = weight.data
    if not torch.compiler.is_compiling() and not watched(x, bias, data) and data.data_ptr() % WIDEST_LOAD == 0:
        call = prepared(x, weight, bias, backend, compute)
        if call is not None:
            return call(x, weight, bias)
    return dispatched(x, weight, bias, backend, compute)


def dispatched(
    x: Tensor,
    weight: Packed,
    bias: Tensor | None,
    backend: str,
    compute: str,
    branch: tuple[Tensor | None, Tensor | None] = (None, None),
    outliers: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Call the op: the only place that takes a weight apart for it."""
    data, fmt, planes, row_scale = weight
    names = (fmt.name, backend, compute, planes)
    return torch.ops.flux_kernels.linear(x, data, bias, *names, *branch, *outliers, row_scale)


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

    def __call__(self, x: Tensor, weight: Packed, bias: Tensor | None, backend: str, compute: str) -> Call | None:
        """Return what computes calls like this."""
        data = weight.data
        about_bias = None if bias is None else (bias.shape, bias.stride(), bias.dtype, bias.device)
        about_data = (data.shape, data.stride(), data.dtype, data.device, weight.fmt, weight.planes)
        key = (x.shape, x.stride(), x.dtype, x.device, about_data, about_bias, backend, compute)
        try:
            return self._calls[key]
        except KeyError:
            call = _prepare(x, weight, bias, backend, compute)
            if len(self._calls) >= _MOST:
                self.cache_clear()
            self._calls[key] = call
            return call


prepared = Prepared()


def _prepare(x: Tensor, weight: Packed, bias: Tensor | None, backend: str, compute: str) -> Call | None:
    ops.check_linear(x, weight.data, bias, weight.fmt.name, backend, compute)
    n, k = weight.n, weight.k
    m = x.numel() // k
    plain = x.is_contiguous() and weight.data.is_contiguous() and (bias is None or bias.is_contiguous())
    if not m * n or not plain or resolve(backend, compute, x.device, weight.fmt).name != "triton":
        return None
    from .. import kernels
    from ..kernels.choice import on_forget
    from ..kernels.launching import device_of
    from ..kernels.problem import Problem

    on_forget(prepared.cache_clear)
    with device_of(weight.data):
        run = kernels.prepare(Problem.of(x.view(m, k), weight, bias), compute)
    shape, dtype, device, flat = (*x.shape[:-1], n), x.dtype, x.device, x.dim() == 2

    def call(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
        y = torch.empty((m, n), dtype=dtype, device=device)
        with device_of(weight.data):
            run(x if flat else x.view(m, k), weight, bias, y, None)
        return y if flat else y.view(shape)

    return call
