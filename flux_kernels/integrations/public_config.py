"""The door to FluxKernelsConfig: diffusers' table of quantizers is imported first.

The table's import enters the quantizer (registration.py), which needs the whole of config.py. Where config.py came first, its own
import of diffusers would ask for it half made.
"""

from __future__ import annotations

import diffusers.quantizers.auto  # noqa: F401

from .config import FluxKernelsConfig

__all__ = ["FluxKernelsConfig"]
