"""List what is run: kernels x formats x dtypes x cards, or each kernel with each format once."""

from __future__ import annotations

from dataclasses import dataclass

from flux_kernels.formats import FORMATS

CAPABILITIES = (80, 86, 89, 90, 120)
FLOATS = ("bf16", "fp16", "fp32")
_HALVES = ("bf16", "fp16")
# kernel -> the dtypes of x (or of the result) it ships in. Float32 x has no tensor cores: the wide tiles do not take it.
WITH_FORMAT = {
    "dequantize": FLOATS,
    "narrow": FLOATS,
    "medium": _HALVES,
    "wide": _HALVES,
    "split_k": _HALVES,
    "small_m": FLOATS,
    "fp16": FLOATS,
    "unpack_int8": ("fp32",),
    "unpack_int8_rows": ("fp32",),
    "narrow_branch": FLOATS,
    "wide_branch": _HALVES,
    "small_m_branch": FLOATS,
    "fp16_branch": FLOATS,
}
FORMAT_FREE = {  # the format's part is unpack_int8; these run with one format
    "quantize_activation": FLOATS,
    "int8": FLOATS,
    "int8_rows": FLOATS,
    "int8_branch": FLOATS,
    "int8_rows_branch": FLOATS,
}
KERNELS = {**WITH_FORMAT, **FORMAT_FREE}
_FORMAT = "Q4_K"  # of the kernels that no format is compiled into
_BRANCH_FORMATS = 5  # in the small sweep a branch meets every fifth format


@dataclass(frozen=True, order=True)
class Case:
    """Name one kernel as it is compiled: with which format and dtype, for which card."""

    kernel: str
    format: str
    dtype: str
    capability: int

    def __str__(self) -> str:
        return f"{self.kernel} {self.format} {self.dtype} sm_{self.capability}"


def whole(kernels=(), formats=(), dtypes=(), capabilities=()) -> list[Case]:
    """Return every case, or those of some kernels, formats, dtypes and cards."""
    return [
        Case(kernel, name, dtype, capability)
        for kernel in (kernels or KERNELS)
        for name in ((_FORMAT,) if kernel in FORMAT_FREE else formats or FORMATS)
        for dtype in KERNELS[kernel]
        if not dtypes or dtype in dtypes
        for capability in (capabilities or CAPABILITIES)
    ]


def small(kernels=(), capabilities=()) -> list[Case]:
    """Return the part for every change: each kernel with each format once, dtypes and cards taken in turn.

    Branches, which share the kernel's main loop, meet every fifth format; kernels without a format run in every dtype. Every
    format meets every card.
    """
    cards = tuple(capabilities or CAPABILITIES)
    cases = []
    for turn, kernel in enumerate(KERNELS):
        if kernels and kernel not in kernels:
            continue
        names = list(FORMATS)[turn % _BRANCH_FORMATS :: _BRANCH_FORMATS] if kernel.endswith("_branch") else list(FORMATS)
        if kernel in FORMAT_FREE:
            names = [_FORMAT] * len(KERNELS[kernel])
        for position, name in enumerate(names):
            dtype = KERNELS[kernel][(turn + position) % len(KERNELS[kernel])]
            cases.append(Case(kernel, name, dtype, cards[(turn + position + position // len(cards)) % len(cards)]))
    return cases
