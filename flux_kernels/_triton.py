"""Import Triton in one place, or an inert stand-in, so that the torch backend needs torch alone.

Format and kernel files write `from .._triton import jit, tl`. Where Triton is missing, `jit` returns the function as it
is and `tl.constexpr` only holds a value: the modules import, and nothing that needs a GPU can be launched.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    TRITON_VERSION: str | None = triton.__version__
except ImportError as error:
    if error.name is not None and error.name.split(".")[0] != "triton":
        raise
    triton = None
    TRITON_VERSION = None

    class _Constexpr:
        """Hold a value where Triton's constexpr would."""

        def __init__(self, value: Any):
            self.value = value

    class _Language:
        """Answer the names that modules use at import time, and nothing else."""

        constexpr = _Constexpr

    tl = _Language()

    def jit(function=None, **_options):
        """Return the function unchanged; it is never launched without Triton."""
        return function if function is not None else (lambda inner: inner)


def interpreting() -> bool:
    """Tell whether kernels run in Triton's CPU interpreter (TRITON_INTERPRET=1 when they were decorated)."""
    return triton is not None and bool(triton.knobs.runtime.interpret)
