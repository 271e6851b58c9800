"""Tell a model that has fewer blocks than a published one.

It was pruned, or its file was cut short. No tensor tells the two apart, so it loads, and the user hears of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from .architecture import Architecture, Variant
from .model_class import model_class


def lacking_blocks(architecture: Architecture, config: Mapping[str, Any]) -> str | None:
    """Say which blocks of a published model a config lacks, or None.

    Only a config with all other values of a variant lacks blocks of it: other models have the counts that they have.
    """
    counts = {name: config[name] for name in architecture.counts.values()}
    if any(counts.items() >= published.items() for published in architecture.pruned):
        return None
    usual = inspect.signature(model_class(architecture).__init__).parameters
    for variant in architecture.variants:
        whole = {name: variant.config.get(name, usual[name].default) for name in counts}
        if all(counts[name] <= whole[name] for name in counts) and counts != whole and _same_but(variant, config, counts):
            return _sentence(architecture, variant, counts, whole)
    return None


def _same_but(variant: Variant, config: Mapping[str, Any], counts: Mapping[str, int]) -> bool:
    """Tell whether a config has all values of a variant but the counts of blocks."""
    return all(config.get(name) == value for name, value in variant.config.items() if name not in counts)


def _sentence(architecture: Architecture, variant: Variant, counts: Mapping[str, int], whole: Mapping[str, int]) -> str:
    lists = {blocks: name for blocks, name in architecture.counts.items() if counts[name] < whole[name]}
    lacking = " and ".join(f"{counts[name]} of the {whole[name]} {blocks}" for blocks, name in lists.items())
    return (
        f"It has {lacking} of {variant.name} and is otherwise that model. A pruned model is like that, and so is a file that lost "
        "its last blocks, which draws noise: if nothing says that it was pruned, get it again."
    )
