"""Estimate what `measure` holds in memory; refuse, before anything is loaded, what does not fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..compute import dtype_name
from ..errors import GGUFError
from ..generation.memory_check import companion_files, loaded_weights, require_memory
from ..generation.memory_plan import GIB, transformer_working
from ..generation.text_pipelines import usual_batch
from .measured_model import Source16
from .request import Size
from .states import BATCH_TOKENS, SCHEMA

# Of every state: in front of the block in work, the last one, and the changed one while measuring.
_HIDDEN_STATES = 3


def check_memory(
    source: Source16,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[Size],
    count: int,
    *,
    states: Path,
    capturing: bool,
    processes: int = 1,
) -> None:
    """Raise FormatError where measuring needs more memory than is free, with the numbers and the ways out.

    Args:
        source: what is measured; the embedded model always fits.
        device: to measure on.
        dtype: to measure in.
        sizes: (width, height) in pixels of the pictures, where they are to be captured.
        count: of states to capture.
        states: file of captured states; where it is there, it says how many of which size.
        capturing: whether this process draws the states, for which text encoders and VAE are loaded too.
        processes: that measure on this computer.
    """
    if source.embedded:
        return
    try:
        config = source.config
    except GGUFError:
        # Opening the model says what is wrong with it.
        return
    sizes = _captured_sizes(states) or [sizes[number % len(sizes)] for number in range(count)]
    needs = memory_needs(source, config, device, dtype, sizes, capturing=capturing)
    name = dtype_name(dtype)
    where = "the CPU" if device.type == "cpu" else str(device)
    what = f"Measuring {source.name} in {name} on {where}"
    require_memory(what, needs, device, _ways_out(source, config, device, dtype, sizes, capturing), processes=processes)


def memory_needs(
    source: Source16,
    config: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    sizes: Sequence[Size],
    *,
    capturing: bool,
) -> dict[str, int]:
    """Return what for -> bytes held at the peak.

    The peak is while capturing, or later with the states' hidden states, whichever is more.

    Args:
        source: what is measured.
        config: of its transformer.
        device: to measure on.
        dtype: to measure in.
        sizes: (width, height) in pixels of each state.
        capturing: whether states are captured by drawing.
    """
    width = source.architecture.width(config)
    usual = source.usual
    at_a_time = usual_batch(source.architecture, usual)
    tokens = [at_a_time * (source.architecture.picture_tokens(usual, *size) + usual.text_tokens) for size in sizes]
    at_once = max(*tokens, min(sum(tokens), BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])))
    transformer = loaded_weights(source.files, dtype, device).held
    companions = loaded_weights(companion_files(source.base), dtype, device).held if capturing and source.base else 0
    hidden = _HIDDEN_STATES * sum(tokens) * width * dtype.itemsize
    drawing = {
        "text encoders and VAE": companions,
        "activations": transformer_working(width, max(tokens), itemsize=dtype.itemsize),
    }
    measuring = {
        f"hidden states of {len(sizes)} pictures": hidden,
        "activations": transformer_working(width, at_once, itemsize=dtype.itemsize),
    }
    longer = drawing if capturing and sum(drawing.values()) > sum(measuring.values()) else measuring
    return {"the transformer": transformer, **longer}


def _ways_out(source: Source16, config, device, dtype, sizes, capturing: bool) -> str:
    ways = []
    if device.type == "cpu" and dtype == torch.float32:
        half = sum(memory_needs(source, config, device, torch.bfloat16, sizes, capturing=capturing).values())
        mapped = loaded_weights(source.files, torch.bfloat16, device).mapped
        kept = ", as weights of that type stay in their file, slow where it is larger than what is free" if mapped else ""
        ways.append(f"--dtype bfloat16 (about {half / GIB:.1f} GiB{kept})")
    ways += ["fewer --states or smaller --sizes", "a GPU or a computer with more memory"]
    return (
        f"Take {', '.join(ways[:-1])}, or {ways[-1]}. Nothing needs to be measured for `quantize --type Q4_K_S`, nor for `plan` with a "
        "casting_cost table that MixedQuantFlux published."
    )


def _captured_sizes(path: Path) -> list[Size]:
    """Return the picture sizes of captured states, [] where there are none.

    Reading them all says what is wrong with them.
    """
    if not path.exists():
        return []
    try:
        with safe_open(path, framework="pt") as stored:
            facts = json.loads((stored.metadata() or {})[SCHEMA])
        return [(state["width"], state["height"]) for state in facts["states"]]
    except (SafetensorError, KeyError, ValueError):
        return []
