"""The compute modes as the Triton backend runs them: a row names all that is needed of a mode.

A new mode is a module and its row here, next to what compute.py says of it to users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..formats import Packed
from . import exact, fp16_accumulate, int8
from .candidates import Candidate
from .fp16_gemm import fp16_gemm_kernel
from .fused_gemm import fused_gemm_kernel
from .int8_gemm import int8_gemm_kernel
from .problem import Call, Choice, Run
from .small_m import small_m_kernel
from .small_m_codes import small_m_codes_kernel
from .split_k import split_k_kernel


@dataclass(frozen=True)
class Mode:
    """Describe a compute mode.

    Attributes:
        linear: (x [M, K], weight, bias, y [M, N], branch, outliers, choice), y written.
        prepare: what computes a product as chosen, everything but the tensors looked up once.
        default: what a call runs where no measurement says otherwise.
        candidates: what tuning tries for a call.
        algorithms: what a call can run, by name.
        products: the kernels that multiply.
        sources: files of this folder whose change makes a measurement old.
        without_tile: the algorithms whose product is torch's.
        steps_through_blocks: whether a step of a tile is whole blocks of packed rows.
        takes_outliers: whether some input channels can be left to x's dtype; the other modes compute all in it.
        row_scales: the algorithms that use scales of whole rows, each with what computes them.
    """

    linear: Callable[..., None]
    prepare: Callable[..., Run]
    default: Callable[[Call], Choice]
    candidates: Callable[[Call], Iterable[Candidate]]
    algorithms: tuple[str, ...]
    products: tuple[Any, ...]
    sources: tuple[str, ...]
    without_tile: tuple[str, ...] = ()
    steps_through_blocks: bool = True
    takes_outliers: bool = False
    row_scales: Mapping[str, Callable[[Packed], Tensor]] = field(default_factory=dict)


MODES = {
    "exact": Mode(
        linear=exact.linear,
        prepare=exact.prepare,
        default=exact.default,
        candidates=exact.candidates,
        algorithms=tuple(exact.ALGORITHMS),
        products=(fused_gemm_kernel, split_k_kernel, small_m_kernel, small_m_codes_kernel),
        sources=("fused_gemm", "split_k", "small_m", "small_m_codes", "two_stage", "dequantize", "branch", "ldmatrix"),
        without_tile=("two_stage",),
    ),
    "fp16_accumulate": Mode(
        linear=fp16_accumulate.linear,
        prepare=fp16_accumulate.prepare,
        default=fp16_accumulate.default,
        candidates=fp16_accumulate.candidates,
        algorithms=("fused",),
        products=(fp16_gemm_kernel,),
        sources=("fp16_gemm", "activations", "branch", "ldmatrix"),
    ),
    "int8": Mode(
        linear=int8.linear,
        prepare=int8.prepare,
        default=int8.default,
        candidates=int8.candidates,
        algorithms=("two_stage", "row_scales"),
        products=(int8_gemm_kernel,),
        sources=("int8_gemm", "unpack_int8", "activations", "branch"),
        # Its GEMM steps through groups of unpacked weights.
        steps_through_blocks=False,
        takes_outliers=True,
        row_scales={"row_scales": int8.row_scale},
    ),
}
"""Compute mode -> what there is to know of it."""
