"""Quantize float weights to packed rows, with the library's own quantizers or libggml's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from .errors import FormatError
from .formats import BlockFormat, get_format
from .torch_backend import libggml

Engine = Literal["auto", "torch", "libggml"]

# How many weights are searched at a time; about ten float32 buffers of that size live.
CHUNK_WEIGHTS = {"cpu": 1 << 18, "cuda": 1 << 24}


def quantize(
    weight: Tensor,
    format: str | BlockFormat,
    importance: Tensor | None = None,
    *,
    name: str = "",
    engine: Engine = "auto",
) -> Tensor:
    """Quantize weights to packed rows, on the device they are on.

    The bytes of a row depend on that row alone: the library's own quantizers give the same on every device, for every number
    of threads and however the rows are cut. Peak memory is the result plus a few chunks.

    Args:
        weight: [..., N, K] (or [K]) of a floating dtype, finite.
        format: ggml type name, such as "Q4_K".
        importance: [K], or of the shape of `weight`; non-negative: sum(importance * (weight - decoded)^2) is made small, as
            with an imatrix of llama.cpp. Its scale does not matter; blocks where it is 0 throughout count evenly.
        name: of the tensor, for error messages.
        engine: "torch" for the library's own quantizer, "libggml" for libggml's on the CPU, "auto" for the own where there
            is one.

    Returns:
        uint8 [..., N, K // block_size * type_size].

    Raises:
        FormatError: where K is not whole blocks, values are not finite, shapes do not fit, or no quantizer is at hand.
    """
    fmt = get_format(format)
    search = quantizer(fmt, engine)
    what = f"{name} " if name else ""
    if not isinstance(weight, Tensor):
        raise FormatError(
            f"quantize needs a torch.Tensor, got {what}a {type(weight).__name__}. torch.from_numpy makes one of an array."
        )
    if not weight.dtype.is_floating_point:
        raise FormatError(f"quantize needs a floating dtype, got {what}{weight.dtype}. Packed weights are dequantized first.")
    if weight.dim() < 1:
        raise FormatError(f"quantize needs weights of shape [..., K], got {what}a scalar.")
    k = weight.shape[-1]
    packed_shape = (*weight.shape[:-1], fmt.row_bytes(k, name))
    _check_importance(importance, weight, what)
    rows = weight.detach().reshape(-1, k)
    weights = None if importance is None else importance.detach().to(weight.device).float().expand(weight.shape).reshape(-1, k)
    packed = torch.empty(rows.shape[0], packed_shape[-1], dtype=torch.uint8, device=weight.device)
    step = max(1, CHUNK_WEIGHTS.get(weight.device.type, CHUNK_WEIGHTS["cuda"]) // k)
    for start in range(0, rows.shape[0], step):
        chunk = rows[start : start + step].float()
        if not torch.isfinite(chunk).all():
            raise FormatError(
                f"Cannot quantize {what}to {fmt.name}: it holds NaN or infinity (first in row {_first_bad(chunk, start)}). "
                "Check the source, or leave the tensor as it is."
            )
        packed[start : start + step] = search(chunk, None if weights is None else weights[start : start + step])
    return packed.reshape(packed_shape)


def quantizer(fmt: BlockFormat, engine: Engine = "auto") -> Callable[[Tensor, Tensor | None], Tensor]:
    """Return what quantizes `fmt`.

    (float32 rows [rows, K], importance or None) -> uint8 [rows, row bytes].

    Raises:
        FormatError: where `engine` is not at hand for this format.
    """
    if engine not in ("auto", "torch", "libggml"):
        raise FormatError(f'engine must be "auto", "torch" or "libggml", got {engine!r}.')
    if engine != "libggml" and fmt.quantize is not None:
        return fmt.quantize
    if engine == "torch":
        raise FormatError(f'{fmt.name} has no quantizer in torch. Use engine="libggml", or another type.')
    if not libggml.available():
        raise FormatError(
            f"{fmt.name} is quantized by libggml, which is not installed. Install it with `pip install libggml-python`, or "
            "choose a type that has a quantizer here, such as Q4_K."
        )
    return lambda rows, importance: libggml.quantize(rows, fmt, importance)


def _check_importance(importance: Tensor | None, weight: Tensor, what: str) -> None:
    if importance is None:
        return
    if importance.shape not in (weight.shape, weight.shape[-1:]):
        raise FormatError(
            f"importance of {what or 'the weight '}must have shape {list(weight.shape[-1:])} or {list(weight.shape)}, got "
            f"{list(importance.shape)}."
        )
    if not torch.isfinite(importance).all() or (importance < 0).any():
        raise FormatError(f"importance of {what or 'the weight '}must be finite and non-negative.")


def _first_bad(chunk: Tensor, start: int) -> int:
    return start + int((~torch.isfinite(chunk)).any(1).nonzero()[0])
