"""What each architecture's files hold, typed by hand: a case a file, never taken from flux_kernels."""

from __future__ import annotations

from .case import Case
from .flux2 import FLUX2
from .sd3 import SD3
from .wan import WAN

CASES: dict[str, Case] = {case.name: case for case in (FLUX2, SD3, WAN)}
