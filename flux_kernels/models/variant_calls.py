"""Every linear call of a step of any published model: shapes of layers, rows that reach them."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache

from torch import nn

from ..errors import FormatError
from .architecture import Architecture, Variant
from .architectures import ARCHITECTURES
from .calls import Call, step_calls
from .model_class import empty_model
from .names import block_of, tensor_class

MAIN_MODEL = "flux1-dev"
VARIANTS: dict[str, tuple[Architecture, Variant]] = {
    variant.slug: (row, variant) for row in reversed(ARCHITECTURES) for variant in row.variants
}
"""Name for options -> (architecture, variant)."""

# What reaches a layer: the picture's tokens, the prompt's, both, or a row a picture (modulation).
IMAGE, TEXT, BOTH, BATCH = "image", "text", "both", "batch"


def find_variant(slug: str) -> tuple[Architecture, Variant]:
    """Return a published model by its name for options; raise FormatError for another name."""
    if slug not in VARIANTS:
        raise FormatError(f"Unknown model {slug!r}. Known: {', '.join(VARIANTS)}.")
    return VARIANTS[slug]


def variant_calls(slug: str, *, width: int | None = None, height: int | None = None, batch: int = 1) -> list[Call]:
    """List the calls inside the blocks of a published model for one step, as `derived_calls`.

    FLUX.1-dev's are `step_calls`, which need no diffusers.
    """
    if slug != MAIN_MODEL:
        return derived_calls(slug, width=width, height=height, batch=batch)
    usual = find_variant(slug)[1].size
    return step_calls(width or usual[0], height or usual[1], batch)


def derived_calls(slug: str, *, width: int | None = None, height: int | None = None, batch: int = 1) -> list[Call]:
    """List the calls inside the blocks of a published model for one step, from its layers' shapes.

    Layers that share a shape and the rows that reach them are one entry, the most work first.

    Args:
        slug: such as "flux2-klein-4b".
        width: of the picture in pixels; None takes the model's usual size, and the usual length of a video.
        height: likewise.
        batch: pictures at once.

    Raises:
        FormatError: for an unknown model.
        GGUFError: where the installed diffusers does not have it.
    """
    architecture, variant = find_variant(slug)
    image = architecture.picture_tokens(variant, width, height)
    rows = {IMAGE: batch * image, TEXT: batch * variant.text_tokens, BATCH: batch}
    rows[BOTH] = rows[IMAGE] + rows[TEXT]
    calls: dict[tuple[int, int, int], tuple[list[str], int]] = {}
    for (layer, n, k), count in _layers(slug).items():
        kind, _, times = reaching(architecture.tokens, layer).partition("*")
        key = (rows[kind] * int(times or 1), n, k)
        names, counted = calls.get(key, ([], 0))
        calls[key] = ([*names, layer], counted + count)
    listed = [Call(*key, count, _where(names)) for key, (names, count) in calls.items()]
    return sorted(listed, key=lambda call: -call.flops * call.calls)


def reaching(tokens: Mapping[str, str], layer: str) -> str:
    """Return what reaches a layer: IMAGE, TEXT, BOTH or BATCH, or a multiple such as "text*12".

    The first pattern that its name matches counts.
    """
    return next((kind for pattern, kind in tokens.items() if fnmatchcase(layer, pattern)), IMAGE)


@cache
def _layers(slug: str) -> dict[tuple[str, int, int], int]:
    """Count the linear layers in the blocks by (name with "*" for the block, N, K)."""
    architecture, variant = find_variant(slug)
    counts: dict[tuple[str, int, int], int] = {}
    for name, module in empty_model(architecture, variant.config).named_modules():
        if isinstance(module, nn.Linear) and block_of(f"{name}."):
            key = (tensor_class(f"{name}.").rstrip("."), module.out_features, module.in_features)
            counts[key] = counts.get(key, 0) + 1
    return counts


def _where(names: list[str]) -> str:
    """Name layers in words: "single: attn.to_q, attn.to_k, attn.to_v"."""
    lists = {name.split(".*.")[0].split(".")[-1].replace("_transformer", "").removesuffix("_blocks") for name in names}
    return f"{' and '.join(sorted(lists))}: {', '.join(dict.fromkeys(name.split('.*.')[1] for name in names))}"
