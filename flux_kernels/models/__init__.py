"""What is special to the Flux family: tensor names, variants, layouts, loading and writing files."""

from __future__ import annotations

from .load import load_flux
from .save import save_gguf
from .types import tensor_types

__all__ = ["load_flux", "save_gguf", "tensor_types"]
