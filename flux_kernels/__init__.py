"""flux_kernels: GGUF-quantized Flux at full speed inside diffusers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .calibration.fidelity import fidelity
from .calibration.fidelity_report import FidelityReport
from .calibration.outliers import keep_outliers
from .errors import BackendUnavailable, FormatError, GGUFError
from .formats import FORMATS, BlockFormat
from .integrations.on_import import after_import
from .layers.embedding import GGUFEmbedding
from .layers.fuse import FuseReport, fuse_projections, unfuse_projections
from .layers.linear import GGUFLinear
from .layers.memory import memory_footprint, pin_memory
from .ops import dequantize, linear
from .packing import quantize
from .swap import swap_linear
from .swap.report import SwapReport
from .version import own_version

if TYPE_CHECKING:
    from .gguf.file import GGUFFile, read_gguf
    from .integrations.lora import fuse_lora, unfuse_lora
    from .integrations.public_config import FluxKernelsConfig
    from .machine.warmup import warmup
    from .models import load_flux, load_transformer, save_gguf
    from .text_encoders import load_t5, load_text_encoder, save_t5, save_text_encoder

after_import("diffusers.quantizers.auto", lambda: importlib.import_module(f"{__name__}.integrations.registration").register())
after_import("peft.tuners.lora.model", lambda: importlib.import_module(f"{__name__}.integrations.lora_merge").install())
after_import(
    "diffusers.loaders.peft", lambda: importlib.import_module(f"{__name__}.integrations.lora_merge").install_in_diffusers()
)

# Names whose modules need more than torch, or are wanted by few: imported when first asked for.
_LAZY = {
    "FluxKernelsConfig": "integrations.public_config",
    "fuse_lora": "integrations.lora",
    "unfuse_lora": "integrations.lora",
    "GGUFFile": "gguf.file",
    "read_gguf": "gguf.file",
    "load_flux": "models",
    "load_transformer": "models",
    "load_t5": "text_encoders",
    "load_text_encoder": "text_encoders",
    "save_t5": "text_encoders",
    "save_text_encoder": "text_encoders",
    "save_gguf": "models",
    "warmup": "machine.warmup",
}

__all__ = [
    "FORMATS",
    "BackendUnavailable",
    "BlockFormat",
    "FidelityReport",
    "FluxKernelsConfig",
    "FormatError",
    "FuseReport",
    "GGUFEmbedding",
    "GGUFError",
    "GGUFFile",
    "GGUFLinear",
    "SwapReport",
    "dequantize",
    "fidelity",
    "fuse_lora",
    "fuse_projections",
    "keep_outliers",
    "linear",
    "load_flux",
    "load_t5",
    "load_text_encoder",
    "load_transformer",
    "memory_footprint",
    "pin_memory",
    "quantize",
    "read_gguf",
    "save_gguf",
    "save_t5",
    "save_text_encoder",
    "swap_linear",
    "unfuse_lora",
    "unfuse_projections",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """Import a lazy public name on first use."""
    if name == "__version__":
        return own_version()
    if name not in _LAZY:
        raise AttributeError(f"module 'flux_kernels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
