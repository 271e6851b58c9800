"""What each architecture's files hold, typed by hand: a case a file, never taken from flux_kernels."""

from __future__ import annotations

from .case import Case
from .chroma import CHROMA
from .flux2 import FLUX2
from .krea2 import KREA2

CASES: dict[str, Case] = {case.name: case for case in (FLUX2, CHROMA, KREA2)}
