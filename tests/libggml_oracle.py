"""Call libggml through ctypes: quantize and dequantize rows of any ggml type.

It comes with the wheel of libggml-python.

The oracle of the format tests. It knows nothing of flux_kernels: block geometry comes from libggml's own type traits.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np

# ggml's enum ends here in 0.20; a lookup past it would read foreign memory
TYPE_COUNT = 43
UNQUANTIZABLE = ("q8_1", "q8_K")  # activation types: ggml_quantize_chunk aborts the process on them


class _TypeTraits(ctypes.Structure):
    """Mirror struct ggml_type_traits of ggml.h."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    ]


@cache
def _library() -> ctypes.CDLL:
    import libggml

    library = ctypes.CDLL(str(Path(libggml.__file__).parent / "lib64" / "libggml-base.so"))
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return library


@cache
def type_ids() -> dict[str, int]:
    """Return the names of libggml's quantizable block types, with their enum values.

    In upper case: "Q4_K".
    """
    names = {}
    for ggml_type in range(TYPE_COUNT):
        traits = _library().ggml_get_type_traits(ggml_type).contents
        if traits.type_name and traits.is_quantized and traits.to_float and traits.type_name.decode() not in UNQUANTIZABLE:
            names[traits.type_name.decode().upper()] = ggml_type
    return names


def geometry(type_name: str) -> tuple[int, int]:
    """Return (weights per block, bytes per block) of a type."""
    traits = _traits(type_name)
    return traits.blck_size, traits.type_size


def requires_importance(type_name: str) -> bool:
    """Tell whether libggml refuses to quantize to the type without an importance matrix."""
    return _library().ggml_quantize_requires_imatrix(type_ids()[type_name])


def quantize(type_name: str, x: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Quantize float32 [rows, K] to uint8 [rows, row bytes].

    importance: float32 [K]; ones where the type requires one.
    """
    block_size, type_size = geometry(type_name)
    x = np.ascontiguousarray(x, dtype=np.float32)
    rows, k = x.shape
    if k % block_size:
        raise ValueError(f"{type_name} needs K % {block_size} == 0, got K={k}.")
    if importance is None and requires_importance(type_name):
        importance = np.ones(k, dtype=np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    if weights is not None and weights.shape != (k,):
        raise ValueError(f"importance must have shape ({k},), got {weights.shape}.")
    packed = np.zeros((rows, k // block_size * type_size), dtype=np.uint8)
    written = _library().ggml_quantize_chunk(
        type_ids()[type_name], x.ctypes.data, packed.ctypes.data, 0, rows, k, None if weights is None else weights.ctypes.data
    )
    if written != packed.size:
        raise RuntimeError(f"libggml wrote {written} bytes of {type_name}, expected {packed.size}.")
    return packed


def dequantize(type_name: str, packed: np.ndarray, k: int) -> np.ndarray:
    """Dequantize uint8 [rows, row bytes] to float32 [rows, k]."""
    block_size, type_size = geometry(type_name)
    packed = np.ascontiguousarray(packed, dtype=np.uint8)
    if packed.shape[1] * block_size != k * type_size:
        raise ValueError(f"{packed.shape[1]} bytes a row are not {k} weights of {type_name}.")
    y = np.empty((packed.shape[0], k), dtype=np.float32)
    _traits(type_name).to_float(packed.ctypes.data, y.ctypes.data, y.size)
    return y


def _traits(type_name: str) -> _TypeTraits:
    if type_name not in type_ids():
        raise KeyError(f"libggml has no quantizable type {type_name!r}; it has {', '.join(type_ids())}.")
    return _library().ggml_get_type_traits(type_ids()[type_name]).contents


class _CpuTraits(ctypes.Structure):
    """Mirror struct ggml_type_traits_cpu of ggml-cpu.h."""

    _fields_ = [
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        (
            "vec_dot",
            ctypes.CFUNCTYPE(
                None,
                ctypes.c_int,
                *[ctypes.c_void_p, ctypes.c_size_t] * 3,
                ctypes.c_int,
            ),
        ),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    ]


@cache
def _cpu_library() -> ctypes.CDLL:
    import libggml

    _library()
    library = ctypes.CDLL(str(Path(libggml.__file__).parent / "lib64" / "libggml-cpu.so"))
    library.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_CpuTraits)
    library.ggml_get_type_traits_cpu.argtypes = [ctypes.c_int]
    library.ggml_cpu_init()
    return library


def int8_dot(type_name: str, packed: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Multiply as ggml does on a CPU: activations are quantized to the type's int8 partner.

    Activations float32 [M, K], y float32 [M, N].
    """
    traits = _cpu_library().ggml_get_type_traits_cpu(type_ids()[type_name]).contents
    activation = _library().ggml_get_type_traits(traits.vec_dot_type).contents
    x = np.ascontiguousarray(x, dtype=np.float32)
    packed = np.ascontiguousarray(packed, dtype=np.uint8)
    m, k = x.shape
    quantize_row = _cpu_library().ggml_get_type_traits_cpu(traits.vec_dot_type).contents.from_float
    codes = np.zeros((m, k // activation.blck_size * activation.type_size), dtype=np.uint8)
    y = np.empty((m, packed.shape[0]), dtype=np.float32)
    for token in range(m):
        quantize_row(x[token].ctypes.data, codes[token].ctypes.data, k)
        for row in range(packed.shape[0]):
            traits.vec_dot(k, y[token, row:].ctypes.data, 0, packed[row].ctypes.data, 0, codes[token].ctypes.data, 0, 1)
    return y


def activation_block(type_name: str) -> int:
    """Return how many activations share one int8 scale in ggml's product with a type."""
    traits = _cpu_library().ggml_get_type_traits_cpu(type_ids()[type_name]).contents
    return _library().ggml_get_type_traits(traits.vec_dot_type).contents.blck_size
