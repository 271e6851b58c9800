"""Read sm_90's shared-memory matrix descriptors: in which bytes a tile's rows and columns lie.

Bits 0-13 start address, 16-29 leading and 32-45 stride byte offset, each in units of 16 bytes; 49-51 base offset; 62-63 the
swizzle: 1, 2, 3 for patterns of 128, 64, 32 bytes (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout").
K-major tiles stand in groups of eight rows, one stride apart, of a row of the pattern's width each. The swizzle exchanges the
16-byte pieces of an address by the bits of the 128-byte line it lies in.
"""

from __future__ import annotations

import numpy as np

from .faults import Fault

_PIECE = 16  # bytes that stay together
_WIDTHS = {1: 128, 2: 64, 3: 32}  # swizzle mode -> bytes of a row of the pattern


def row_pieces(descriptor: int, rows: int, row_bytes: int) -> np.ndarray:
    """Return the byte addresses int64 [rows, row_bytes / 16] of a K-major tile's pieces of 16 bytes.

    Raises:
        Fault: for no swizzle, a base offset, or a tile that reaches past a row of the pattern.
    """
    start, stride = (descriptor & 0x3FFF) * _PIECE, (descriptor >> 32 & 0x3FFF) * _PIECE
    mode = descriptor >> 62
    if mode not in _WIDTHS or descriptor >> 49 & 7:
        raise Fault(f"unknown matrix descriptor {descriptor:#x}")
    width = _WIDTHS[mode]
    if start % width + row_bytes > width:
        raise Fault(f"a tile of {row_bytes} bytes a row at {start:#x} reaches past rows of {width} bytes")
    row, piece = np.arange(rows)[:, None], np.arange(row_bytes // _PIECE)[None, :]
    plain = start + row // 8 * stride + row % 8 * width + piece * _PIECE
    line = plain >> 7 & (width // _PIECE - 1)
    return plain ^ line * _PIECE
