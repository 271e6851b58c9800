"""The text encoders that are loaded, as data: one file each.

A new one is a file here and an entry in the tuple.
"""

from __future__ import annotations

from ..encoder import TextEncoder
from .qwen3 import QWEN3
from .t5 import T5

# Of rows that a file's tensors show, the one that its architecture key names is taken, else the first.
TEXT_ENCODERS: tuple[TextEncoder, ...] = (T5, QWEN3)
