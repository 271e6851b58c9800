"""The T5 encoder of FLUX.1's pipelines from a GGUF file: names, config, loading, writing."""

from __future__ import annotations

from .load import load_t5
from .save import save_t5

__all__ = ["load_t5", "save_t5"]
