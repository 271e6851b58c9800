"""Make a GGUFLinear of another linear layer, ready to take its place.

Take over packed bytes or quantize, arrange the rows, and carry hooks and flags across.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import FormatError
from ..formats import PLAIN_TYPES, BlockFormat, Packed, PlainType, get_format, types_by_number
from ..torch_backend import reference
from .linear import GGUFLinear

Layer = TypeVar("Layer", bound=nn.Module)
_LEFT_BEHIND = {"forward", "_old_forward", "_hf_hook", "device", "source_cls"}  # rebuilt, or diffusers' own bookkeeping


def is_diffusers_gguf(module: nn.Module) -> bool:
    """Tell whether a module is diffusers' GGUFLinear, without importing diffusers."""
    return type(module).__name__ == "GGUFLinear" and type(module).__module__.startswith("diffusers.")


def packed_type(parameter: Tensor, name: str) -> BlockFormat | PlainType:
    """Return the row (block format or plain type) of a diffusers GGUFParameter.

    Raises FormatError where its type is unknown.
    """
    number = int(parameter.quant_type)  # type: ignore[attr-defined]
    row = types_by_number().get(number)
    if row is None:
        raise FormatError(f'{name} has ggml type {number}, which is not known here. Leave it out with exclude="{name}".')
    return row


def plain_bytes(parameter: Tensor) -> Tensor:
    """Return the bytes of a diffusers GGUFParameter as an ordinary tensor on the same storage."""
    return parameter.as_tensor().detach()  # type: ignore[attr-defined]


def plain_bias(module: Any, compute_dtype: torch.dtype) -> Tensor | None:
    """Return the layer's bias as a float tensor; packed bytes of diffusers are decoded."""
    bias = module.bias
    if bias is None or not hasattr(bias, "quant_type"):
        return bias
    return nn.Parameter(decode_stored(bias, "bias", compute_dtype), requires_grad=False)


def decode_stored(parameter: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """Decode a diffusers GGUFParameter of any type to `dtype`."""
    row, data = packed_type(parameter, name), plain_bytes(parameter)
    if isinstance(row, BlockFormat):
        return reference.dequantize(Packed(data, row), dtype)
    return data.view(row.dtype).to(dtype)


def take_over(module: Any, backend: str, compute: str) -> GGUFLinear:
    """Return what takes the place of diffusers' GGUFLinear: its bytes, moved and not copied.

    They are rearranged where the backend wants planes.
    """
    fmt = packed_type(module.weight, "weight").name
    dtype = module.compute_dtype or torch.float32
    layer = GGUFLinear.from_packed(
        plain_bytes(module.weight), fmt, plain_bias(module, dtype), backend=backend, compute=compute, compute_dtype=dtype
    )
    return carry_over(module, layer.arrange())


def unpack_plain(module: Any) -> nn.Linear:
    """Return what takes the place of diffusers' GGUFLinear of a plain type (BF16): an nn.Linear."""
    dtype = module.compute_dtype or torch.float32
    plain = PLAIN_TYPES[packed_type(module.weight, "weight").name]
    weight = plain_bytes(module.weight).view(plain.dtype).to(dtype)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = plain_bias(module, dtype)  # type: ignore[assignment]
    return carry_over(module, linear)


def quantize_layer(module: nn.Linear, format: str, backend: str, compute: str) -> GGUFLinear:
    """Return what takes the place of an nn.Linear: its weight quantized on the device it is on."""
    weight = module.weight.detach()
    if weight.device.type == "meta":
        fmt = get_format(format)
        qweight = torch.empty(weight.shape[0], fmt.row_bytes(weight.shape[1]), dtype=torch.uint8, device="meta")
        layer = GGUFLinear.from_packed(qweight, fmt, module.bias, backend=backend, compute=compute, compute_dtype=weight.dtype)
    else:
        layer = GGUFLinear.from_linear(module, format, backend=backend, compute=compute)
    return carry_over(module, layer.arrange())


def carry_over(old: nn.Module, new: Layer) -> Layer:
    """Carry hooks, the training flag and foreign attributes of `old` over to `new`.

    An attribute of diffusers' is `_tp_packed_row_blocks`.
    """
    own = set(new.__dict__) - {key for key in new.__dict__ if "_hooks" in key}
    for key, value in old.__dict__.items():
        if key not in own and key not in _LEFT_BEHIND:
            new.__dict__[key] = value
    new.train(old.training)
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)
    return new
