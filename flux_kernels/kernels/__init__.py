"""Launch the Triton kernels: the only module `ops` imports from here, and only when the triton backend is asked for.

The decoder contract. Each format's row owns `decode_tile`, a JIT function that every kernel takes as a constexpr:

    decode_tile(row_ptr, block, i, table_ptr, NUM_BLOCKS, PLANES) -> float32 [BLOCK_N, 32]

row_ptr    [BLOCK_N] uint8 pointers to row starts (rows are NUM_BLOCKS blocks, contiguous)
block      index of the first block of the current tile (run time)
i          constexpr: which 32-weight slice, counted from the start of `block`
table_ptr  uint8 pointer to the format's lookup table (BlockFormat.table), unused where it has none
PLANES     constexpr: rows are stored field by field (Layout.to_planes)

The tile decoder must give the same float32 bits as the row's torch decode. A function is passed, never the row object:
Triton's cache key covers the source of a constexpr function, but not of a Python object's methods.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._triton import triton
from ..formats import BlockFormat
from .dequantize import dequantize_kernel
from .fused_gemm import fused_gemm_kernel
from .small_m import small_m_kernel
from .tuning import SMALL_M, fused_tile, largest_tile_k, small_m_tile

_DEQUANTIZE_ROWS = 16


def _table(fmt: BlockFormat, data: Tensor) -> Tensor:
    return fmt.table_on(data.device) if fmt.table is not None else data


def _format_constants(fmt: BlockFormat, row_bytes: int, planes: bool) -> dict:
    num_blocks = row_bytes // fmt.type_size
    return dict(
        K=num_blocks * fmt.block_size, DECODE=fmt.decode_tile, NUM_BLOCKS=num_blocks, ROW_BYTES=row_bytes, PLANES=planes
    )


def dequantize(data: Tensor, fmt: BlockFormat, dtype: torch.dtype, planes: bool = False) -> Tensor:
    """Decode packed rows uint8 [N, row bytes] to [N, K] of `dtype`; float32 bit-equal to the reference, 16 bit rounded once."""
    n, row_bytes = data.shape
    constants = _format_constants(fmt, row_bytes, planes)
    y = torch.empty(n, constants["K"], dtype=dtype, device=data.device)
    if y.numel():
        tile_k = largest_tile_k(fmt, constants["K"])
        grid = (triton.cdiv(n, _DEQUANTIZE_ROWS), constants["K"] // tile_k)
        with _device_of(data):
            dequantize_kernel[grid](data, _table(fmt, data), y, n, **constants, BLOCK_N=_DEQUANTIZE_ROWS, TILE_K=tile_k)
    return y


def linear(x: Tensor, data: Tensor, bias: Tensor | None, fmt: BlockFormat, compute: str, planes: bool = False) -> Tensor:
    """Compute x [M, K] @ decode(data [N, row bytes]).T + bias -> [M, N] in x's dtype, accumulated in float32."""
    y = torch.empty(x.shape[0], data.shape[0], dtype=x.dtype, device=x.device)
    if y.numel():
        x = x if x.stride(-1) == 1 else x.contiguous()
        launch = _launch_small_m if x.shape[0] <= SMALL_M else _launch_fused
        with _device_of(data):
            launch(x, data, bias, y, fmt, _format_constants(fmt, data.shape[1], planes))
    return y


def _launch_small_m(x: Tensor, data: Tensor, bias: Tensor | None, y: Tensor, fmt: BlockFormat, constants: dict) -> None:
    m, n = y.shape
    tile = small_m_tile(fmt, constants["K"])
    blocks = dict(BLOCK_N=tile.block_n, TILE_K=tile.tile_k, num_warps=tile.num_warps)
    grid = (triton.cdiv(n, tile.block_n), m)
    small_m_kernel[grid](x, data, _table(fmt, data), bias, y, n, x.stride(0), **constants, **blocks)


def _launch_fused(x: Tensor, data: Tensor, bias: Tensor | None, y: Tensor, fmt: BlockFormat, constants: dict) -> None:
    m, n = y.shape
    tile = fused_tile(fmt, m, n, constants["K"])
    blocks = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, TILE_K=tile.tile_k)
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
    fused_gemm_kernel[grid](x, data, _table(fmt, data), bias, y, m, n, x.stride(0), **constants, **blocks, **options)


def _device_of(tensor: Tensor):
    """Make the tensor's device current during a launch (Triton launches on the current device)."""
    return torch.get_device_module(tensor.device).device(tensor.device) if tensor.device.type != "cpu" else _NoGuard()


class _NoGuard:
    """Stand in for a device guard on CPU, where Triton's interpreter runs."""

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        return False
