"""List what the library launches: it runs on tensors without data, kernels are written down.

So the report follows the library by itself: a kernel, a tile or a constant that a call would launch with is what gets compiled,
in every dtype of x. Calls stand for classes of calls: all M up to 16 and the sizes of the default table's steps above, K of
FLUX.1's blocks and of its image embedder (64), N below a wide tile (64).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from flux_kernels.compute import DATACENTER, PROMOTE_K, WEIGHT_ONLY_M, mode_of_call
from flux_kernels.formats import FORMATS, BlockFormat, Packed
from flux_kernels.kernels.choice import Choice, default_choice, tile_of
from flux_kernels.kernels.modes import MODES
from flux_kernels.kernels.tiles import int8_tile, row_scales_serve, split_k_tile

from .code_of import code_of

ANY = "any"  # the format or dtype of a kernel that is the same for all
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = (*range(1, WEIGHT_ONLY_M + 1), 17, 32, 64, 65, 128, 256, 512, 513, 1024, 4608)  # M
SHAPES = ((3072, 3072), (3072, 64), (64, 3072))  # N, K
# What the report compiles split-K with, which tuning alone chooses; it also tries others
SPLITS = 4
RANK = 16
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
}


@dataclass(frozen=True)
class Launch:
    """Hold one kernel as the library launches it.

    Attributes:
        name: of the kernel, and what it was given: "_rows" (scales of weight rows), "_outliers", "_branch".
        format, dtype: of the weight and of x, ANY where the kernel is the same for all.
        k: weights of a row, a constant of every kernel but the sum of split-K (0) and row_scale (parts of a row).
        tile: sizes, warps and stages as text.
        signature: argument -> type.
        constants: argument -> constexpr.
        options: num_warps and num_stages where the library says them.
    """

    name: str
    format: str
    dtype: str
    k: int
    tile: str
    kernel: JITFunction = field(compare=False, repr=False)
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    options: tuple[tuple[str, int], ...]

    @property
    def weights(self) -> int:
        """Return how many weights or values of x a program decodes in an iteration, 0 for none."""
        sizes = dict(self.constants)
        if "DECODE" in sizes:
            return sizes["BLOCK_N"] * sizes["TILE_K"]
        if "CODES" in sizes:
            return sizes["BLOCK_N"] * sizes["TILE_K"] * sizes["SPLITS"]
        return sizes["BLOCK_M"] * sizes["GROUP"] if self.kernel.__name__.startswith("quantize") else 0

    @property
    def unspecialized(self) -> tuple[str, ...]:
        """Return the arguments that nothing is assumed of, the others being multiples of 16."""
        return tuple(parameter.name for parameter in self.kernel.params if parameter.do_not_specialize)

    @property
    def code(self) -> str:
        """Return a hash of the kernel's source and of what it is compiled with."""
        unspecialized = tuple((name, "unspecialized") for name in self.unspecialized)
        return code_of(self.kernel, self.signature, self.constants, self.options, unspecialized)


@cache
def launches(capability: int, rows: tuple[int, ...] = ROWS) -> tuple[Launch, ...]:
    """Return every distinct kernel that calls of `rows` rows launch, over all formats and dtypes of x."""
    distinct: dict[tuple, Launch] = {}
    for call in _calls(divmod(capability, 10), rows):
        for launch in launched(*call):
            same = (launch.name, launch.signature, launch.constants, launch.options)
            distinct[same] = _either(distinct.get(same, launch), launch)
    return tuple(distinct.values())


def launched(
    compute: str, fmt: BlockFormat, shape: tuple[int, int, int], dtype: str, branch: bool, choice: Choice
) -> list[Launch]:
    """Return what one call launches as chosen, in int8 with and without outlier channels.

    Args:
        shape: M, N and K.
        dtype: of x and the bias, a key of DTYPES.
    """
    m, n, k = shape
    empty = lambda *size, dtype=DTYPES[dtype]: torch.empty(*size, dtype=dtype, device="meta")
    x, bias, y = empty(m, k), empty(n), empty(m, n)
    weight = Packed(empty(n, fmt.row_bytes(k), dtype=torch.uint8), fmt, fmt.planes)
    factors = (empty(m, RANK), empty(n, RANK)) if branch else None
    with _recorded(fmt.name, dtype) as written:
        MODES[compute].linear(x, weight, bias, y, factors, choice=choice)
        # With outlier channels a call is chosen for as without.
        if MODES[compute].takes_outliers and branch:
            outliers = (empty(RANK, dtype=torch.int32), empty(n, RANK))
            MODES[compute].linear(x, weight, bias, y, factors, outliers, choice=choice)
    return written


def _either(one: Launch, other: Launch) -> Launch:
    """Return the launch that two calls share, with ANY where they differ."""
    return replace(
        one, format=one.format if one.format == other.format else ANY, dtype=one.dtype if one.dtype == other.dtype else ANY
    )


# What a launch returns: with nothing to launch directly, the next launch comes here again
_COMPILED = defaultdict(lambda: None)


@contextmanager
def _recorded(format: str, dtype: str) -> Iterator[list[Launch]]:
    """Write down the kernels that are launched in the context, and launch none."""
    written: list[Launch] = []

    def run(kernel, *arguments, grid, warmup, **named):
        written.append(_launch(kernel, arguments, named, format, dtype))
        return _COMPILED

    with mock.patch.object(JITFunction, "run", run):
        yield written


def _calls(capability: tuple[int, int], rows: tuple[int, ...]) -> Iterator[tuple]:
    """Yield the arguments of `launched` for each choice that a card makes."""
    for fmt in FORMATS.values():
        for n, k in SHAPES:
            if k % fmt.block_size:
                continue
            for dtype in DTYPES:
                for branch in (False, True):
                    for compute in _modes(capability, k):
                        for m, choice in _choices(compute, fmt, (rows, n, k), capability, dtype, branch):
                            yield compute, fmt, (m, n, k), dtype, branch, choice
                    for compute, choice in _tuned(fmt, n, k, capability, dtype, branch) if n == k else ():
                        yield compute, fmt, (512, n, k), dtype, branch, choice


def _tuned(
    fmt: BlockFormat, n: int, k: int, capability: tuple[int, int], dtype: str, branch: bool
) -> Iterator[tuple[str, Choice]]:
    """Yield what tuning alone may choose: fused at any M, split-K, int8 with the other kind of scales."""
    if dtype != "fp32":
        for m in (64, 512):
            yield "exact", Choice("fused", tile_of("fused", fmt, m, n, k, capability, branch), "")
        yield "exact", Choice("split_k", replace(split_k_tile(fmt, 512, n, k, capability), splits=SPLITS), "")
    for algorithm in ("two_stage", *["row_scales"] * row_scales_serve(fmt)):
        yield "int8", Choice(algorithm, int8_tile(512, capability, DTYPES[dtype], branch), "")


def _modes(capability: tuple[int, int], k: int) -> list[str]:
    """Return the compute modes that a card and K allow."""
    refused = {"fp16_accumulate"} if capability in DATACENTER or k % PROMOTE_K else set()
    return [mode for mode in MODES if mode not in refused]


def _choices(compute: str, fmt: BlockFormat, shapes, capability, dtype: str, branch: bool) -> list[tuple[int, Choice]]:
    """Return one M for each choice that differs in what it launches, and two-stage in exact mode."""
    chosen = {}
    rows, n, k = shapes
    for m in rows:
        if compute == mode_of_call(compute, m):
            choice = default_choice(compute, fmt, m, n, k, capability, DTYPES[dtype], branch)
            chosen.setdefault((choice.algorithm, choice.tile), (m, choice))
    # Its unpacking is what `dequantize` does on any card, to any dtype.
    if compute == "exact":
        chosen.setdefault(("two_stage", None), (rows[-1], Choice("two_stage", None, "")))
    return list(chosen.values())


def _launch(kernel: JITFunction, arguments: tuple, named: dict, format: str, dtype: str) -> Launch:
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
    options = {name: values.pop(name) for name in list(values) if name not in kernel.arg_names}
    fixed = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    constants = {name: value for name, value in values.items() if name in fixed or value is None}
    signature = {name: _type(value) for name, value in values.items() if name not in constants}
    return Launch(
        _name(kernel, constants, signature),
        format,
        dtype,
        constants.get("K", constants.get("PARTS", 0)),
        _tile(constants, options),
        kernel,
        tuple(sorted(signature.items())),
        tuple(sorted(constants.items(), key=lambda item: item[0])),
        tuple(sorted(options.items())),
    )


def _type(value: torch.Tensor | float) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


def _name(kernel: JITFunction, constants: dict, signature: dict) -> str:
    rows = constants.get("ROW_SCALES") or "row_scale_ptr" in signature
    given = {"_rows": rows, "_outliers": "keep_ptr" in signature, "_branch": "hidden_ptr" in signature}
    return kernel.__name__.removesuffix("_kernel") + "".join(suffix for suffix, is_given in given.items() if is_given)


def _tile(constants: dict, options: dict) -> str:
    """Write a launch's sizes as str(Tile) does."""
    step = next((name for name in ("TILE_K", "GROUP", "BLOCK_K") if name in constants), None)
    sizes = [constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK", step) if name in constants]
    words = ["x".join(map(str, sizes))]
    words += [f"{name[4:]} {options[name]}" for name in ("num_warps", "num_stages") if name in options]
    words += [f"split {constants['SPLITS']}"] if "SPLITS" in constants else []
    return " ".join(words + ["ldmatrix"] * bool(constants.get("LDMATRIX")))
