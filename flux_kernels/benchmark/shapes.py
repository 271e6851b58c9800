"""Hold the input widths around FLUX.1-dev's blocks; name a step's size, and reduce its calls."""

from __future__ import annotations

from ..models.calls import Call

LATENT, TEXT_WIDTH, POOLED, SINUSOID = 64, 4096, 768, 256  # packed latent, T5, CLIP, timestep embedding: input widths


def size_name(step: str, scale: int = 1) -> str:
    """Name the size of a step in result rows: the pictures, and by what M and N were divided."""
    return step if scale == 1 else f"{step}, M and N / {scale}"


def reduced(call: Call, scale: int) -> Call:
    """Divide M and N by `scale`, for machines too slow for the real size; K stays, so every format fits."""
    return Call(max(1, call.m // scale), max(1, call.n // scale), call.k, call.calls, call.where)
