"""Quantize with libggml itself, from the optional libggml-python package.

The types without a quantizer here, or any type.

libggml works on the CPU, in one thread. Source: ggml.h ggml_quantize_chunk, ggml_quantize_requires_imatrix.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FormatError
from ..formats import BlockFormat

_INSTALL = "Install it with `pip install libggml-python`"
_FILES = ("lib*/libggml-base.so", "lib*/libggml-base.dylib", "bin/ggml-base.dll", "lib*/ggml-base.dll")
# Q8_1 and Q8_K, ggml's activation types: ggml_quantize_chunk aborts the process on them.
_NEVER = (9, 15)


def available() -> bool:
    """Tell whether libggml is installed."""
    return _file() is not None


def quantize(rows: Tensor, fmt: BlockFormat, importance: Tensor | None = None) -> Tensor:
    """Quantize rows with libggml.

    Args:
        rows: floating [rows, K], K whole blocks; finite.
        fmt: the block type.
        importance: float [rows, K] or None. libggml weighs by column: rows with weights of their own go row by row.

    Returns:
        uint8 [rows, row bytes], on the device of `rows`.

    Raises:
        FormatError: where libggml is missing, cannot make the type, or needs an importance that is not given.
    """
    library = _library(fmt)
    if importance is None and library.ggml_quantize_requires_imatrix(fmt.ggml_type):
        raise FormatError(
            f"libggml quantizes to {fmt.name} only with an importance matrix, got none. Give importance= (an imatrix, or ones "
            "for what it is worth), or choose a type that needs none."
        )
    x = rows.detach().to("cpu", torch.float32).contiguous()
    packed = torch.empty(x.shape[0], fmt.row_bytes(x.shape[1]), dtype=torch.uint8)
    if importance is None:
        _chunk(library, fmt, x, packed, None)
    elif importance.stride(0) == 0 or x.shape[0] == 1:
        _chunk(library, fmt, x, packed, importance[:1].to("cpu", torch.float32).contiguous())
    else:
        weights = importance.to("cpu", torch.float32).contiguous()
        for row in range(x.shape[0]):
            _chunk(library, fmt, x[row : row + 1], packed[row : row + 1], weights[row])
    return packed.to(rows.device)


def requires_importance(fmt: BlockFormat) -> bool:
    """Tell whether libggml quantizes to `fmt` only with an importance.

    Raises FormatError where it cannot at all.
    """
    return bool(_library(fmt).ggml_quantize_requires_imatrix(fmt.ggml_type))


def library() -> ctypes.CDLL:
    """Load libggml; raise FormatError where it is not installed."""
    path = _file()
    if path is None:
        raise FormatError(f"libggml is not installed. {_INSTALL}.")
    return _load(path)


def _chunk(library: ctypes.CDLL, fmt: BlockFormat, x: Tensor, packed: Tensor, weights: Tensor | None) -> None:
    if not x.numel():
        return
    pointer = None if weights is None else weights.data_ptr()
    written = library.ggml_quantize_chunk(fmt.ggml_type, x.data_ptr(), packed.data_ptr(), 0, *x.shape, pointer)
    if written != packed.numel():
        raise FormatError(
            f"libggml wrote {written} bytes of {fmt.name}, expected {packed.numel()}: another version? {_INSTALL}."
        )


@cache
def _file() -> Path | None:
    try:
        spec = importlib.util.find_spec("libggml")
    except ModuleNotFoundError:  # an import hook refuses it
        spec = None
    folders = spec.submodule_search_locations if spec else None
    paths = [path for folder in folders or () for pattern in _FILES for path in Path(folder).glob(pattern)]
    return paths[0] if paths else None


@cache
def _load(path: Path) -> ctypes.CDLL:
    # It would install a handler that answers any abort of the process with a debugger, whose copies of it may stay for ever.
    os.environ.setdefault("GGML_NO_BACKTRACE", "1")
    library = ctypes.CDLL(str(path))
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_type_name.argtypes = [ctypes.c_int]
    return library


def _library(fmt: BlockFormat) -> ctypes.CDLL:
    """Load libggml; raise FormatError where it is missing or has no such type."""
    path = _file()
    if path is None:
        raise FormatError(f"{fmt.name} is quantized by libggml, which is not installed. {_INSTALL}, or choose another type.")
    library = _load(path)
    if fmt.ggml_type in _NEVER or library.ggml_type_name(fmt.ggml_type) != fmt.name.lower().replace("_k", "_K").encode():
        raise FormatError(f"The installed libggml cannot quantize to {fmt.name} (ggml type {fmt.ggml_type}).")
    return library
