"""The order of a projection's rows where llama.cpp's converter permutes them for rotary positions.

transformers rotates row i of a head with row i + width / 2; llama.cpp's files of some architectures have the two side by side.
Whole rows move, so packed rows move as bytes. Source: `permute` of llama.cpp's convert_hf_to_gguf.py (LlamaModel).
"""

from __future__ import annotations

from torch import Tensor


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Return rows [heads * width, ...] in the order of llama.cpp's files."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def deinterleave(rows: Tensor, heads: int) -> Tensor:
    """Return rows [heads * width, ...] of such a file in transformers' order."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
