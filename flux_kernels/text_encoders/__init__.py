"""Text encoders from GGUF files: a table of encoders as data, and what loops over it: names, config, load and save."""

from __future__ import annotations

from .load import load_t5, load_text_encoder
from .save import save_t5, save_text_encoder

__all__ = ["load_t5", "load_text_encoder", "save_t5", "save_text_encoder"]
