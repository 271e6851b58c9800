"""Make Triton load x with ldmatrix: hide from it that the decoded weight came from bytes.

Triton takes the narrowest load in the chain to a dot operand for its K width. Packed bytes make that 4 elements of 16 bits,
which permutes K in both operands and rules out ldmatrix: x then comes as 64-bit shared loads with register moves, 846
instead of 488 main-loop instructions per 128 HMMA for Q8_0 on sm_86. A move that Triton cannot look through ends the chain. It
also keeps Triton from merging equal loads of two slices, so formats of 256-wide superblocks (two slices share each byte)
need more shared memory with it. See docs/decisions/compile-time-report.md.
"""

from __future__ import annotations

from .._triton import jit, tl


@jit
def hide_origin(w, LDMATRIX: tl.constexpr):
    """Return float32 w unchanged.

    With LDMATRIX it passes a move that Triton does not look through (NVIDIA only).
    """
    if LDMATRIX:
        w = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [w], dtype=tl.float32, is_pure=False, pack=1)
    return w
