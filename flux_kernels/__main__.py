"""`python -m flux_kernels`: the command line, for launchers that start modules (torchrun, accelerate)."""

from __future__ import annotations

from .cli import app

app()
