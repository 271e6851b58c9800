"""The architectures, one a file. A new one is a file and an entry here."""

from __future__ import annotations

from ..architecture import Architecture
from .flux1 import FLUX1
from .flux2 import FLUX2
from .sd3 import SD3
from .wan import WAN

# A file is of the first whose mark it has. Those that ask for more than a mark (mark_needs) come last.
ARCHITECTURES: tuple[Architecture, ...] = (FLUX2, SD3, WAN, FLUX1)
