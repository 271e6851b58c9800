"""The custom ops: one schema, one function for all shape and dtype checks, autograd and autocast.

`torch.ops.flux_kernels.linear` and `torch.ops.flux_kernels.dequantize` are what torch.compile, torch.export and opcheck
see. The checks run in the fake (while tracing) and in eager mode alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import check_activation_dtype, check_names, resolve
from .compute import check_mode
from .errors import FormatError
from .formats import BlockFormat, Packed, get_format

_library = torch.library.Library("flux_kernels", "DEF")
_library.define(
    "linear(Tensor x, Tensor data, Tensor? bias, str format, str backend, str compute, bool planes, Tensor? hidden=None, "
    "Tensor? up=None, Tensor? outlier_index=None, Tensor? outlier_weight=None, Tensor? row_scale=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "dequantize(Tensor data, str format, ScalarType dtype, str backend, bool planes) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_data(data: Tensor, format: str, planes: bool = False) -> Packed:
    """Check packed rows of any number of dimensions and return them as a weight."""
    fmt = get_format(format)
    if data.dtype != torch.uint8:
        raise FormatError(f"Packed {fmt.name} data must be uint8, got {data.dtype}.")
    if data.dim() < 1:
        raise FormatError(f"Packed {fmt.name} data must be [..., N, row bytes], got a scalar.")
    fmt.row_weights(data.shape[-1])
    return Packed(data, fmt, planes)


def check_linear(
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    format: str,
    backend: str,
    compute: str,
    planes: bool = False,
    branch: tuple[Tensor | None, ...] = (None, None, None, None),
    row_scale: Tensor | None = None,
) -> Packed:
    """Check everything about a linear call, in eager mode and while tracing, and return the weight.

    `branch` is (hidden, up, outlier_index, outlier_weight); `row_scale` is what the function of that name returned.
    """
    check_names(backend, compute)
    weight = check_data(data, format, planes)
    if data.dim() != 2:
        raise FormatError(f"linear needs packed data of shape [N, row bytes], got {list(data.shape)}.")
    check_activation_dtype(x.dtype, "The activation dtype", " Cast it first.")
    if x.dim() < 1 or x.shape[-1] != weight.k:
        rows = f"{weight.fmt.name} data {list(data.shape)} holds rows of K={weight.k} weights"
        raise FormatError(f"{rows}, got x of shape {list(x.shape)}.")
    check_mode(compute, weight.k)
    if x.device != data.device:
        raise FormatError(f"x is on {x.device} and the packed data on {data.device}. Move them to one device.")
    if bias is not None:
        _check_bias(bias, weight.n, x.device)
    _check_branch(x, weight.n, *branch)
    if row_scale is not None:
        _check_row_scale(row_scale, weight.n, x.device)
    return weight._replace(row_scale=row_scale)


def _check_branch(x: Tensor, n: int, hidden, up, outlier_index, outlier_weight) -> None:
    """Check the low-rank branch and the outlier channels of a call.

    They are hidden [..., r] and up [N, r], index [k] and weight [N, k].
    """
    if (hidden is None) != (up is None) or (outlier_index is None) != (outlier_weight is None):
        raise FormatError("hidden and up, and outlier_index and outlier_weight, are given together or not at all.")
    if hidden is not None:
        if hidden.shape != (*x.shape[:-1], up.shape[-1]) or up.shape != (n, up.shape[-1]):
            wanted = f"{[*x.shape[:-1], 'r']} and [{n}, 'r']".replace("'", "")
            raise FormatError(f"hidden and up must be {wanted}, got {list(hidden.shape)} and {list(up.shape)}.")
        if {hidden.dtype, up.dtype} != {x.dtype}:
            raise FormatError(f"hidden and up must have x's dtype {x.dtype}, got {hidden.dtype} and {up.dtype}.")
    if outlier_index is not None:
        if outlier_index.dim() != 1 or outlier_weight.shape != (n, outlier_index.shape[0]):
            shapes = f"{list(outlier_index.shape)} and {list(outlier_weight.shape)}"
            raise FormatError(f"outlier_index and outlier_weight must be [k] and [{n}, k], got {shapes}.")
        if outlier_index.dtype != torch.int32 or not outlier_weight.dtype.is_floating_point:
            raise FormatError(
                f"outlier_index must be int32 and outlier_weight floating, got {outlier_index.dtype}, {outlier_weight.dtype}."
            )
    for part in (hidden, up, outlier_index, outlier_weight):
        if part is not None and part.device != x.device:
            raise FormatError(f"x is on {x.device} and the low-rank branch on {part.device}. Move them to one device.")


def _check_bias(bias: Tensor, n: int, device: torch.device) -> None:
    if bias.dim() != 1 or bias.shape[0] != n:
        raise FormatError(f"The bias must have shape [{n}], got {list(bias.shape)}.")
    if not bias.dtype.is_floating_point:
        raise FormatError(f"The bias must have a floating dtype, got {bias.dtype}.")
    if bias.device != device:
        raise FormatError(f"x is on {device} and the bias on {bias.device}. Move them to one device.")


def _check_row_scale(row_scale: Tensor, n: int, device: torch.device) -> None:
    if row_scale.shape != (n,) or row_scale.dtype != torch.float32 or row_scale.device != device:
        got = f"{row_scale.dtype} {list(row_scale.shape)} on {row_scale.device}"
        raise FormatError(f"The row scales must be float32 [{n}] on {device}, got {got}.")


def _linear(
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    format: str,
    backend: str,
    compute: str,
    planes: bool,
    hidden: Tensor | None = None,
    up: Tensor | None = None,
    outlier_index: Tensor | None = None,
    outlier_weight: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    extra = (hidden, up, outlier_index, outlier_weight)
    weight = check_linear(x, data, bias, format, backend, compute, planes, extra, row_scale).contiguous()
    branch = None if hidden is None or up is None else (hidden.reshape(-1, hidden.shape[-1]), up)
    outliers = None if outlier_index is None else (outlier_index, outlier_weight)
    module = resolve(backend, compute, x.device, weight.fmt).load()
    out = module.linear(x.reshape(-1, x.shape[-1]), weight, bias, compute, branch, outliers)
    return out.view(*x.shape[:-1], weight.n)


def _dequantize(data: Tensor, format: str, dtype: torch.dtype, backend: str, planes: bool) -> Tensor:
    weight = _check_dequantize(data, format, dtype, backend, planes)
    rows = weight._replace(data=data.reshape(-1, data.shape[-1])).contiguous()
    decoded = resolve(backend, "exact", data.device, weight.fmt).load().dequantize(rows, dtype)
    return decoded.view(*data.shape[:-1], weight.k)


def _check_dequantize(data: Tensor, format: str, dtype: torch.dtype, backend: str, planes: bool) -> Packed:
    check_names(backend)
    check_activation_dtype(dtype, "The dtype to decode to")
    return check_data(data, format, planes)


def _linear_fake(
    x,
    data,
    bias,
    format,
    backend,
    compute,
    planes,
    hidden=None,
    up=None,
    outlier_index=None,
    outlier_weight=None,
    row_scale=None,
):
    extra = (hidden, up, outlier_index, outlier_weight)
    weight = check_linear(x, data, bias, format, backend, compute, planes, extra, row_scale)
    return x.new_empty(*x.shape[:-1], weight.n)


def _dequantize_fake(data, format, dtype, backend, planes):
    weight = _check_dequantize(data, format, dtype, backend, planes)
    return data.new_empty(*data.shape[:-1], weight.k, dtype=dtype)


def _setup_context(ctx, inputs, output):
    x, data, bias, ctx.format, ctx.backend, _, ctx.planes, hidden, up, *_ = inputs
    ctx.x_dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(data, hidden, up)


def _backward(ctx, grad):
    """Return the gradients of x, bias, hidden and up; the packed bytes get none.

    The gradient of x is grad @ W, with W decoded in x's dtype.

    Outlier channels and row scales are part of W, so they need no gradient of their own.
    """
    data, hidden, up = ctx.saved_tensors
    grad_x = grad_bias = grad_hidden = grad_up = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ torch.ops.flux_kernels.dequantize(data, ctx.format, ctx.x_dtype, ctx.backend, ctx.planes)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
        grad_bias = grad.flatten(0, -2).sum(0).to(ctx.bias_dtype) if grad.dim() > 1 else grad.to(ctx.bias_dtype)
    if hidden is not None and ctx.needs_input_grad[7]:
        grad_hidden = grad @ up
    if hidden is not None and ctx.needs_input_grad[8]:
        grad_up = grad.reshape(-1, grad.shape[-1]).T @ hidden.reshape(-1, hidden.shape[-1])
    return grad_x, None, grad_bias, None, None, None, None, grad_hidden, grad_up, None, None, None


def _autocast(device_type: str, key: str):
    """Return the kernel of one autocast key.

    It casts x to the autocast dtype, as F.linear does, and redispatches.
    """

    def linear_autocast(x, data, bias, format, backend, compute, planes, hidden=None, up=None, *others):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            if x.dtype != torch.float64 and x.is_floating_point():
                x = x.to(torch.get_autocast_dtype(device_type))
            if hidden is not None and up is not None:
                hidden, up = hidden.to(x.dtype), up.to(x.dtype)
            return torch.ops.flux_kernels.linear(x, data, bias, format, backend, compute, planes, hidden, up, *others)

    return linear_autocast


_library.impl("linear", _linear, "CompositeExplicitAutograd")
_library.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
for _device_type, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA"), ("xpu", "AutocastXPU")):
    _library.impl("linear", _autocast(_device_type, _key), _key)
torch.library.register_fake("flux_kernels::linear", _linear_fake, lib=_library)
torch.library.register_fake("flux_kernels::dequantize", _dequantize_fake, lib=_library)
torch.library.register_autograd("flux_kernels::linear", _backward, setup_context=_setup_context, lib=_library)


def linear(
    x: Tensor,
    data: Tensor,
    format: str | BlockFormat,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
    compute: str = "exact",
    planes: bool = False,
) -> Tensor:
    """Compute x @ W.T + bias from packed weights.

    Args:
        x: [..., K], float16, bfloat16 or float32; the result has its dtype.
        data: uint8 [N, K // block_size * type_size], the bytes of a GGUF file.
        format: ggml type name, such as "Q4_K".
        bias: [N] of a floating dtype, or None.
        backend: "auto", "triton" or "torch".
        compute: "exact", "fp16_accumulate" or "int8".
        planes: whether the rows were rearranged with `Layout.to_planes`.

    Returns:
        [..., N]. Differentiable in x and bias; under autocast x is cast as F.linear would.

    Raises:
        FormatError: on shapes, dtypes or devices that do not fit.
        BackendUnavailable: where the named backend or compute mode cannot run on x's device.
    """
    return torch.ops.flux_kernels.linear(x, data, bias, get_format(format).name, backend, compute, planes)


def dequantize(
    data: Tensor,
    format: str | BlockFormat,
    dtype: torch.dtype = torch.float32,
    *,
    backend: str = "auto",
    planes: bool = False,
) -> Tensor:
    """Decode packed weights.

    Args:
        data: uint8 [..., N, K // block_size * type_size], the bytes of a GGUF file.
        format: ggml type name, such as "Q4_K".
        dtype: float32 (bit-equal to libggml), float16 or bfloat16 (the float32 value rounded once).
        backend: "auto", "triton" or "torch".
        planes: whether the rows were rearranged with `Layout.to_planes`.

    Returns:
        [..., N, K] of `dtype`.

    Raises:
        FormatError: on data that are not whole uint8 blocks, or a dtype that is none of the three.
        BackendUnavailable: where the named backend cannot run on the device of `data`.
    """
    return torch.ops.flux_kernels.dequantize(data, get_format(format).name, dtype, backend, planes)


def row_scale(weight: Packed, backend: str, compute: str) -> Tensor | None:
    """Return what a caller may keep of a weight: the scales of "int8", float32 [N].

    None where calls with these arguments on this device use none.

    Args:
        weight: [N, K].
        backend, compute: as in `linear`.

    Raises:
        BackendUnavailable: where the named backend or compute mode cannot run on the weight's device.
    """
    if compute != "int8":
        return None
    return resolve(backend, compute, weight.data.device, weight.fmt).load().row_scale(weight.contiguous(), compute)
