"""Say in words what a user who chooses a type wants to know of a row.

For `flux-kernels formats` and docs/formats.md.
"""

from __future__ import annotations

from math import lcm

from ..compute import PROMOTE_K
from ..formats import BlockFormat, describe
from ..kernels.odd_tiles import OddTile, odd_tiles


def odd_tiles_of(fmt: BlockFormat) -> list[OddTile]:
    """Return the rows of odd_tiles.csv that speak of a format."""
    return [row for row in odd_tiles() if fmt.name in row.formats]


def geometry(fmt: BlockFormat) -> str:
    """Return one line of sizes and numbers."""
    file_type = "" if fmt.file_type is None else f", llama.cpp's file type {fmt.file_type}"
    size = f"{fmt.type_size} bytes per {fmt.block_size} weights, {fmt.bits_per_weight:g} bits per weight"
    return f"{size}; ggml type {fmt.ggml_type}{file_type}"


def facts_in_words(fmt: BlockFormat, quantizer: str) -> dict[str, str]:
    """Map titles to one phrase each.

    Args:
        quantizer: who quantizes to the format.
    """
    facts = describe(fmt)
    rows = f"K is a multiple of {fmt.block_size}"
    if fmt.block_size % PROMOTE_K:
        rows += f", in fp16_accumulate of {lcm(fmt.block_size, PROMOTE_K)}"
    memory = f"field by field: {', then '.join(f'all {field.name}' for field in facts.fields)} of a row"
    codes = (
        "codes are multiplied on tensor cores before their scales" if facts.tensor_core_codes else "weights are decoded first"
    )
    return {
        "rows": rows,
        "a scale": f"for {fmt.sub_block} weights",
        "error": f"at most {100 * fmt.relative_rms:g} % of the weights' RMS, where these are gaussian",
        "quantizer": quantizer,
        "backends": "triton, torch" if facts.triton else "torch",
        "in GPU memory": memory if fmt.planes else "in file order",
        "few rows of x": codes,
        "table": facts.table or "none",
        "source": fmt.source,
    }


def tiles_in_words(fmt: BlockFormat) -> list[str]:
    """Say where a default tile does not serve a format, what differs and why, a phrase each."""
    return [f"{row.where}: {_changes(row)} ({row.why})" for row in odd_tiles_of(fmt)] or ["the defaults everywhere"]


def _changes(row: OddTile) -> str:
    return ", ".join(f"{name}={value}" for name, value in row.changes.items())
