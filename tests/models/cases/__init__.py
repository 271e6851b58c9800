"""What each architecture's files hold, typed by hand: a case a file, never taken from flux_kernels."""

from __future__ import annotations

from .case import Case
from .chroma import CHROMA
from .flux2 import FLUX2
from .krea2 import KREA2
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .wan import WAN
from .z_image import Z_IMAGE

CASES: dict[str, Case] = {case.name: case for case in (FLUX2, Z_IMAGE, CHROMA, KREA2, QWEN_IMAGE, WAN, SD3)}
