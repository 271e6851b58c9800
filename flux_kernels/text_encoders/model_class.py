"""The model class of a text encoder: transformers' own, built empty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import GGUFError
from .encoder import TextEncoder


def empty_model(encoder: TextEncoder, config: Mapping[str, Any]) -> Any:
    """Build a model on the meta device: its names and shapes, for any config, without memory."""
    with torch.device("meta"):
        return _built(encoder, config)


def unfilled_model(encoder: TextEncoder, config: Mapping[str, Any]) -> Any:
    """Build a model whose parameters are on the meta device and whose token table has one place.

    Buffers that it computes, such as the frequencies of rotary positions, are real.
    """
    model = empty_model(encoder, config)
    if list(model.buffers()):
        from accelerate import init_empty_weights

        with init_empty_weights(include_buffers=False):
            model = _built(encoder, config)
    model.set_input_embeddings(model.get_input_embeddings())
    model.tie_weights = _stay_tied
    return model.eval()


def _stay_tied(*args: Any, **kwargs: Any) -> None:
    """Stand in for `tie_weights`: a packed table has no parameter `weight` to tie."""


def _built(encoder: TextEncoder, config: Mapping[str, Any]) -> Any:
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        known = getattr(transformers, encoder.model_class)
    except AttributeError:
        raise GGUFError(
            f"This is a {encoder.name}, for which transformers {transformers.__version__} has no {encoder.model_class}. "
            "Update transformers."
        ) from None
    try:
        return known(known.config_class(**config))
    except (TypeError, ValueError, RuntimeError, StrictDataclassError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise GGUFError(
            f"{encoder.model_class} cannot be built with the file's config: {reason}. The file is damaged, or another model."
        ) from error
