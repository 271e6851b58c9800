"""Compile a kernel for a card that is not here, with the constants and alignment a real launch would have."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flux_kernels.compute import group_width
from flux_kernels.formats import FORMATS, BlockFormat
from flux_kernels.kernels.activations import quantize_activation_kernel, scale_to_fp16_kernel
from flux_kernels.kernels.dequantize import dequantize_kernel
from flux_kernels.kernels.fp16_gemm import fp16_gemm_kernel
from flux_kernels.kernels.fused_gemm import fused_gemm_kernel
from flux_kernels.kernels.int8_gemm import int8_gemm_kernel
from flux_kernels.kernels.small_m import small_m_kernel
from flux_kernels.kernels.split_k import split_k_kernel
from flux_kernels.kernels.tuning import QUANTIZE_ROWS, SCALE_BLOCK, UNPACK_ROWS, Tile, largest_tile_k
from flux_kernels.kernels.unpack_int8 import row_largest_kernel, unpack_int8_kernel

from .sass import MachineCode, read

CAPABILITIES = (80, 86, 89, 90, 120)
_DTYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}


@dataclass(frozen=True)
class Compiled:
    """Hold one compiled kernel: its machine code, shared memory in bytes, and threads per program."""

    code: MachineCode
    shared: int
    threads: int
    ptx: str


def compile_kernel(kernel, pointers: dict, integers: tuple, constants: dict, capability: int, **options) -> Compiled:
    """Compile `kernel` with 16-byte aligned pointers and integers that are multiples of 16, as Flux's shapes give."""
    names = kernel.arg_names
    signature = {name: pointers.get(name) or ("i32" if name in integers else "constexpr") for name in names}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *integers)}
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    threads = 32 * built.metadata.num_warps
    return Compiled(read(built.asm["cubin"]), built.metadata.shared, threads, built.asm["ptx"])


def format_constants(fmt: BlockFormat, k: int, planes: bool | None = None) -> dict:
    """Return the constants a kernel takes from a format's row, for rows of `k` weights."""
    return dict(
        K=k,
        DECODE=fmt.decode_tile,
        NUM_BLOCKS=k // fmt.block_size,
        ROW_BYTES=fmt.row_bytes(k),
        PLANES=fmt.planes if planes is None else planes,
    )


def _ldmatrix(tile: Tile, dtype: str) -> bool:
    return tile.ldmatrix and dtype != "fp32"


def compile_fused(name: str, capability: int, tile: Tile, dtype: str = "bf16", k: int = 3072, branch: bool = False) -> Compiled:
    """Compile the fused GEMM for one format, card and tile, with or without a low-rank branch in its epilogue."""
    x = _DTYPES[dtype]
    pointers = dict(x_ptr=x, w_ptr="*u8", table_ptr="*u8", bias_ptr=x, y_ptr=x)
    blocks = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, TILE_K=tile.tile_k, LDMATRIX=_ldmatrix(tile, dtype))
    constants = format_constants(FORMATS[name], k) | blocks
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    _branch(pointers, constants, branch, dtype)
    return compile_kernel(fused_gemm_kernel, pointers, ("M", "N", "R", "stride_xm"), constants, capability, **options)


def _branch(pointers: dict, constants: dict, branch: bool, dtype: str) -> None:
    """Give a kernel the pointers of a low-rank branch, or none."""
    names = ("hidden_ptr", "up_ptr")
    pointers.update(dict.fromkeys(names, _DTYPES[dtype]) if branch else {})
    constants.update({} if branch else dict.fromkeys(names))


def compile_split_k(name: str, capability: int, tile: Tile, dtype: str = "bf16", k: int = 3072) -> Compiled:
    """Compile the split-K GEMM for one format, card and tile."""
    pointers = dict(x_ptr=_DTYPES[dtype], w_ptr="*u8", table_ptr="*u8", partial_ptr="*fp32")
    blocks = dict(
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, TILE_K=tile.tile_k, LDMATRIX=_ldmatrix(tile, dtype), SPLITS=tile.splits
    )
    constants = format_constants(FORMATS[name], k) | blocks
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    _branch(pointers, constants, False, dtype)
    return compile_kernel(split_k_kernel, pointers, ("M", "N", "R", "stride_xm"), constants, capability, **options)


def compile_fp16(name: str, capability: int, tile: Tile, dtype: str = "bf16", k: int = 3072, branch: bool = False) -> Compiled:
    """Compile the GEMM with fp16 accumulation for one format, card and tile, with or without a low-rank branch."""
    pointers = dict(x_ptr="*fp16", x_scale_ptr="*fp32", w_ptr="*u8", table_ptr="*u8", bias_ptr=_DTYPES[dtype])
    blocks = dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, TILE_K=tile.tile_k, LDMATRIX=_ldmatrix(tile, dtype))
    constants = format_constants(FORMATS[name], k) | blocks
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    pointers |= {"y_ptr": _DTYPES[dtype]}
    _branch(pointers, constants, branch, dtype)
    return compile_kernel(fp16_gemm_kernel, pointers, ("M", "N", "R"), constants, capability, **options)


def compile_int8(
    capability: int, tile: Tile, dtype: str = "bf16", k: int = 3072, *, row_scales: bool = False, branch: bool = False
) -> Compiled:
    """Compile the int8 GEMM for one card and tile, with scales of weight groups or rows, with or without a low-rank branch."""
    pointers = dict(x_ptr="*i8", x_scale_ptr="*fp32", w_ptr="*i8", w_scale_ptr="*fp32", bias_ptr=_DTYPES[dtype])
    constants = dict(K=k, GROUP=tile.tile_k, ROW_SCALES=row_scales, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n)
    _branch(pointers, constants, branch, dtype)
    options = dict(num_warps=tile.num_warps, num_stages=tile.num_stages)
    pointers |= {"y_ptr": _DTYPES[dtype]}
    return compile_kernel(int8_gemm_kernel, pointers, ("M", "N", "R", "stride_ym"), constants, capability, **options)


def compile_quantize_activation(capability: int, dtype: str = "bf16", k: int = 3072) -> Compiled:
    """Compile the int8 quantizer of activations for one card, without outlier channels."""
    pointers = dict(x_ptr=_DTYPES[dtype], codes_ptr="*i8", scale_ptr="*fp32")
    constants = dict(keep_ptr=None, K=k, GROUP=group_width(k), BLOCK_M=QUANTIZE_ROWS)
    return compile_kernel(quantize_activation_kernel, pointers, ("M", "stride_xm"), constants, capability)


def compile_scale_to_fp16(capability: int, dtype: str = "bf16", k: int = 3072) -> Compiled:
    """Compile the kernel that scales activations to fp16 for one card."""
    pointers = dict(x_ptr=_DTYPES[dtype], y_ptr="*fp16", scale_ptr="*fp32")
    constants = dict(K=k, BLOCK_K=SCALE_BLOCK)
    return compile_kernel(scale_to_fp16_kernel, pointers, ("stride_xm",), constants, capability)


def compile_small_m(name: str, capability: int, tile: Tile, dtype: str = "bf16", k: int = 3072) -> Compiled:
    """Compile the small-M kernel for one format, card and tile."""
    x = _DTYPES[dtype]
    pointers = dict(x_ptr=x, w_ptr="*u8", table_ptr="*u8", bias_ptr=x, y_ptr=x)
    constants = format_constants(FORMATS[name], k) | dict(BLOCK_N=tile.block_n, TILE_K=tile.tile_k)
    _branch(pointers, constants, False, dtype)
    return compile_kernel(small_m_kernel, pointers, ("N", "R", "stride_xm"), constants, capability, num_warps=tile.num_warps)


def compile_dequantize(name: str, capability: int, dtype: str = "bf16", k: int = 3072) -> Compiled:
    """Compile the unpack kernel to a float dtype for one format and card."""
    fmt = FORMATS[name]
    pointers = dict(w_ptr="*u8", table_ptr="*u8", y_ptr=_DTYPES[dtype])
    constants = format_constants(fmt, k) | dict(BLOCK_N=UNPACK_ROWS, TILE_K=largest_tile_k(fmt, k))
    return compile_kernel(dequantize_kernel, pointers, ("N",), constants, capability)


def compile_unpack_int8(
    name: str, capability: int, dtype: str = "bf16", k: int = 3072, *, row_scales: bool = False
) -> Compiled:
    """Compile the unpack kernel to int8 for one format and card (`dtype` has no effect)."""
    fmt = FORMATS[name]
    pointers = dict(w_ptr="*u8", table_ptr="*u8", codes_ptr="*i8", scale_ptr="*fp32")
    blocks = dict(GROUP=group_width(k), BLOCK_N=UNPACK_ROWS, TILE_K=largest_tile_k(fmt, k))
    if row_scales:
        pointers["largest_ptr"] = "*fp32"
    else:
        blocks["largest_ptr"] = None
    return compile_kernel(unpack_int8_kernel, pointers, ("N",), format_constants(fmt, k) | blocks, capability)


def compile_row_largest(name: str, capability: int, dtype: str = "bf16", k: int = 3072) -> Compiled:
    """Compile the kernel that finds each row's largest weight for one format and card (`dtype` has no effect)."""
    fmt = FORMATS[name]
    pointers = dict(w_ptr="*u8", table_ptr="*u8", largest_ptr="*fp32")
    blocks = dict(BLOCK_N=UNPACK_ROWS, TILE_K=largest_tile_k(fmt, k))
    return compile_kernel(row_largest_kernel, pointers, ("N",), format_constants(fmt, k) | blocks, capability)
