"""Build GGUF files by hand, well-formed or not, from struct alone.

An oracle that shares nothing with flux_kernels.
"""

from __future__ import annotations

import struct

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
F32, F16, Q4_0, Q8_0, Q4_K = 0, 1, 2, 8, 12


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def key_value(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return string(key) + u32(kind) + payload


def array(kind: int, count: int, payload: bytes) -> bytes:
    return u32(kind) + u64(count) + payload


def info(name: str | bytes, dims: tuple[int, ...], kind: int = F32, offset: int = 0, n_dims: int | None = None) -> bytes:
    """One tensor info; `dims` in file order (the row length first)."""
    return string(name) + u32(len(dims) if n_dims is None else n_dims) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def gguf(
    keys: list[bytes] | None = None,
    infos: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensor_count: int | None = None,
    key_count: int | None = None,
    alignment: int = 32,
) -> bytes:
    keys, infos = keys or [], infos or []
    counts = u64(len(infos) if tensor_count is None else tensor_count) + u64(len(keys) if key_count is None else key_count)
    header = magic + u32(version) + counts + b"".join(keys) + b"".join(infos)
    return header + bytes(-len(header) % alignment) + data


def small() -> bytes:
    """Build a well-formed file with every kind of value and three tensors.

    The last is 34 bytes long and padded to 64.
    """
    keys = [
        key_value("general.architecture", STRING, string("flux")),
        key_value("a.bool", BOOL, b"\1"),
        key_value("a.float", FLOAT32, struct.pack("<f", 1.5)),
        key_value("a.numbers", ARRAY, array(INT32, 2, struct.pack("<2i", 3072, -64))),
        key_value("a.names", ARRAY, array(STRING, 2, string("x") + string("ü"))),
        key_value("a.big", UINT64, u64(2**64 - 1)),
    ]
    infos = [info("w", (32, 2), Q8_0, 0), info("b", (8,), F32, 96), info("s", (32,), Q8_0, 128)]
    data = bytes(range(68)) + bytes(28) + struct.pack("<8f", *range(8)) + bytes(range(34)) + bytes(30)
    return gguf(keys, infos, data)
