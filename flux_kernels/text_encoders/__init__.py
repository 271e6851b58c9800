"""Text encoders from GGUF files: a table of them as data, and what loops over it to load and save."""

from __future__ import annotations

from .load import load_t5, load_text_encoder
from .save import save_t5, save_text_encoder

__all__ = ["load_t5", "load_text_encoder", "save_t5", "save_text_encoder"]
