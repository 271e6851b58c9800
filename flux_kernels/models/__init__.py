"""The transformers of GGUF files: architectures as data, and what loads, writes and types all of them."""

from __future__ import annotations

from .load import load_flux, load_transformer
from .save import save_gguf
from .types import tensor_types

__all__ = ["load_flux", "load_transformer", "save_gguf", "tensor_types"]
