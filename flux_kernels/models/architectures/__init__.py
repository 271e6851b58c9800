"""The architectures, one a file. A new one is a file and an entry here."""

from __future__ import annotations

from ..architecture import Architecture
from .chroma import CHROMA
from .flux1 import FLUX1
from .flux2 import FLUX2
from .krea2 import KREA2
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .wan import WAN
from .z_image import Z_IMAGE

# A file is of the first whose mark it has. Those that ask for more than a mark (mark_needs) come last.
ARCHITECTURES: tuple[Architecture, ...] = (SD3, WAN, QWEN_IMAGE, KREA2, CHROMA, Z_IMAGE, FLUX2, FLUX1)
