"""Infer the config of a FluxTransformer2DModel from a file's tensors: no hub, no network, any width."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import GGUFError
from .names import block_of, stored_name

Shapes = Mapping[str, tuple[int, ...]]
# JSON of the config, in files that save_gguf wrote.
CONFIG_KEY = "flux_kernels.config"

# The halves of a rotary axis are pairs, so every axis is even; FLUX.1 gives the index axis an eighth of a head and the
# two image axes the rest: (16, 56, 56) of 128.
_ROPE_INDEX_SHARE = 8
_ROPE_HEAD_STEP = 32

# Far above any FLUX.1: they bound the time and the sizes that a hostile header can ask for.
_MAX_WIDTH = 2**16
_MAX_BLOCKS = 512

CONFIG_NAMES = (
    "patch_size",
    "in_channels",
    "out_channels",
    "num_layers",
    "num_single_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
    "guidance_embeds",
    "axes_dims_rope",
)


def infer_config(
    shapes: Shapes, naming: str, metadata: Mapping[str, Any] | None = None, config: object | None = None
) -> dict[str, Any]:
    """Infer every argument of FluxTransformer2DModel from tensor shapes.

    All but two follow from the tensors. `patch_size` is 1 in every FLUX.1. `axes_dims_rope` is, in this order: the one of
    `config`; the one that `save_gguf` left in the file; (16, 56, 56) scaled to the head size, where that is a multiple
    of 32.

    Args:
        shapes: tensor name without prefix -> shape in torch order.
        naming: "bfl" or "diffusers".
        metadata: the file's key-values.
        config: what overrides the inferred values: a mapping, a model with a `config`, or the path of a config.json or of
            a directory that holds one.

    Raises:
        GGUFError: where a tensor that the config is read from is missing or cannot be FLUX.1's.
    """
    inferred = _from_tensors(shapes, naming)
    rope = _written_rope(metadata or {})
    if sum(rope) == inferred["attention_head_dim"]:
        inferred["axes_dims_rope"] = rope
    inferred.update(_override(config))
    if inferred.get("axes_dims_rope") is None:
        inferred["axes_dims_rope"] = default_rope(inferred["attention_head_dim"])
    inferred["axes_dims_rope"] = tuple(inferred["axes_dims_rope"])
    return inferred


def default_rope(head_dim: int) -> tuple[int, int, int]:
    """Scale FLUX.1's rotary axes (16, 56, 56) to another head size.

    Raises:
        GGUFError: where that gives odd axes.
    """
    if head_dim % _ROPE_HEAD_STEP:
        raise GGUFError(
            f"The file has heads of {head_dim}; how they split into rotary axes is not in the tensors, and (16, 56, 56) scales "
            f"only to multiples of {_ROPE_HEAD_STEP}. Pass config={{'axes_dims_rope': (a, b, c)}} with a + b + c = {head_dim}."
        )
    index = head_dim // _ROPE_INDEX_SHARE
    image = (head_dim - index) // 2
    return index, image, image


def _from_tensors(shapes: Shapes, naming: str) -> dict[str, Any]:
    num_layers = _count_blocks(shapes, ("double_blocks", "transformer_blocks"))
    num_single_layers = _count_blocks(shapes, ("single_blocks", "single_transformer_blocks"))
    first = "transformer_blocks.0" if num_layers else "single_transformer_blocks.0"
    (head_dim,) = _shape(shapes, naming, f"{first}.attn.norm_q.weight", 1)
    width, in_channels = _shape(shapes, naming, "x_embedder.weight", 2)
    _, joint_dim = _shape(shapes, naming, "context_embedder.weight", 2)
    _, pooled_dim = _shape(shapes, naming, "time_text_embed.text_embedder.linear_1.weight", 2)
    out_channels, _ = _shape(shapes, naming, "proj_out.weight", 2)
    if width > _MAX_WIDTH:
        raise GGUFError(f"The file has width {width}; FLUX.1 has 3072, and more than {_MAX_WIDTH} is not read. It is damaged.")
    if width % head_dim:
        raise GGUFError(
            f"The file has width {width} and heads of {head_dim}; a FLUX.1 width is whole heads. The file is damaged."
        )
    guidance = stored_name("time_text_embed.guidance_embedder.linear_1.weight", naming)
    return {
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": width // head_dim,
        "joint_attention_dim": joint_dim,
        "pooled_projection_dim": pooled_dim,
        "guidance_embeds": guidance in shapes,
    }


def _shape(shapes: Shapes, naming: str, parameter: str, dims: int) -> tuple[int, ...]:
    """Return the shape of the stored tensor of an unsplit parameter."""
    name = stored_name(parameter, naming)
    if name not in shapes:
        raise GGUFError(f"The file lacks {name!r}, which every FLUX.1 file holds. It is incomplete or another model.")
    if len(shapes[name]) != dims or 0 in shapes[name]:
        raise GGUFError(
            f"{name!r} has shape {list(shapes[name])}; FLUX.1 has {dims} dimension{'s' * (dims > 1)} there, none of them 0."
        )
    return shapes[name]


def _count_blocks(shapes: Shapes, kinds: tuple[str, ...]) -> int:
    """Count the blocks of a kind, before a model of that size is built.

    Raises:
        GGUFError: where indices are missing, or there are far too many.
    """
    indices = {block[1] for block in map(block_of, shapes) if block and block[0] in kinds}
    missing = next((index for index in range(len(indices)) if index not in indices), None)
    if missing is not None:
        raise GGUFError(
            f"The file has {kinds[0]} up to {max(indices)}, but none with index {missing}. FLUX.1 blocks are numbered from 0 "
            "without gaps: the file is incomplete."
        )
    if len(indices) > _MAX_BLOCKS:
        raise GGUFError(
            f"The file has {len(indices)} {kinds[0]}; FLUX.1 has 19 and 38, and more than {_MAX_BLOCKS} are not read."
        )
    return len(indices)


def _written_rope(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the axes_dims_rope that `save_gguf` left in the file, () where it did not write it."""
    text = metadata.get(CONFIG_KEY)
    if text is None:
        return ()
    try:
        rope = json.loads(text)["axes_dims_rope"]
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise GGUFError(f"The key {CONFIG_KEY!r} holds no JSON with axes_dims_rope. Remove the key from the file.") from error
    if not isinstance(rope, list) or not all(isinstance(axis, int) for axis in rope):
        raise GGUFError(f"axes_dims_rope in the key {CONFIG_KEY!r} is no list of integers. Remove the key from the file.")
    return tuple(rope)


def _override(config: object | None) -> dict[str, Any]:
    """Read what the user passed as `config` into the arguments it names."""
    if config is None:
        return {}
    if isinstance(config, str | Path):
        config = _read_config(Path(config))
    values = config if isinstance(config, Mapping) else getattr(config, "config", None)
    if not isinstance(values, Mapping):
        raise TypeError(f"config is a mapping, a model, or a path to config.json, got {type(config).__name__}.")
    # A model saved with packed layers describes them there; the file has its own.
    ignored = ("_", "quantization_config")
    unknown = [name for name in values if not name.startswith(ignored) and name not in CONFIG_NAMES]
    if unknown:
        raise GGUFError(f"FluxTransformer2DModel has no config value {unknown[0]!r}. Known: {', '.join(CONFIG_NAMES)}.")
    return {name: value for name, value in values.items() if name in CONFIG_NAMES}


def _read_config(path: Path) -> Any:
    candidates = [path / "config.json", path / "transformer" / "config.json"] if path.is_dir() else [path]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise GGUFError(f"No config.json at {path}. Pass the file, or a directory that holds it (or transformer/config.json).")
    return json.loads(file.read_text(encoding="utf-8"))
