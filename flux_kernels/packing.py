"""Quantize float weights to packed rows, with the library's own quantizers or libggml's."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from .errors import FormatError
from .formats import BlockFormat, get_format


def quantize(weight: Tensor, format: str | BlockFormat, importance: Tensor | None = None) -> Tensor:
    """Quantize weights to packed rows, on the device they are on.

    Args:
        weight: [..., N, K] (or [K]) of a floating dtype, finite.
        format: ggml type name, such as "Q4_K".
        importance: [K], or of the shape of `weight`; non-negative weighting of the squared error, as in an imatrix.

    Returns:
        uint8 [..., N, K // block_size * type_size].

    Raises:
        FormatError: where K is not whole blocks, values are not finite, shapes do not fit, or no quantizer is at hand.
    """
    fmt = get_format(format)
    if not weight.dtype.is_floating_point:
        raise FormatError(f"quantize needs a floating dtype, got {weight.dtype}.")
    if weight.dim() < 1:
        raise FormatError("quantize needs weights of shape [..., K], got a scalar.")
    k = weight.shape[-1]
    row_bytes = fmt.row_bytes(k)
    rows = weight.detach().reshape(-1, k).float()
    if not torch.isfinite(rows).all():
        raise FormatError(f"Cannot quantize to {fmt.name}: the weight holds NaN or infinity. Check the source file.")
    packed = quantizer(fmt)(rows, _importance_rows(importance, weight))
    return packed.reshape(*weight.shape[:-1], row_bytes)


def quantizer(fmt: BlockFormat):
    """Return what quantizes `fmt`: (float32 rows [rows, K], importance or None) -> uint8 [rows, row bytes].

    Raises:
        FormatError: where neither the library nor an installed libggml can.
    """
    if fmt.quantize is not None:
        return fmt.quantize
    if importlib.util.find_spec("libggml") is None:
        raise FormatError(
            f"{fmt.name} has no quantizer of its own yet. Install libggml's with `pip install libggml-python`, or choose one "
            "of the formats that have one."
        )
    from . import libggml

    return lambda rows, importance: libggml.quantize(rows, fmt, importance)


def _importance_rows(importance: Tensor | None, weight: Tensor) -> Tensor | None:
    """Broadcast importance to float32 rows [rows, K] and check it."""
    if importance is None:
        return None
    if importance.shape not in (weight.shape, weight.shape[-1:]):
        raise FormatError(
            f"importance must have shape {list(weight.shape[-1:])} or {list(weight.shape)}, got {list(importance.shape)}."
        )
    if not torch.isfinite(importance).all() or (importance < 0).any():
        raise FormatError("importance must be finite and non-negative.")
    rows = importance.detach().to(weight.device).float().expand(weight.shape)
    return rows.reshape(-1, weight.shape[-1])
