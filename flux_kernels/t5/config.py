"""Infer the config of a T5 encoder from a file's tensors.

Its key-values are asked only for what no tensor says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import GGUFError
from .names import TABLE

Shapes = Mapping[str, tuple[int, ...]]
# Prefixes of llama.cpp's key-values.
ARCHITECTURES = ("t5encoder", "t5")
# Layer norm epsilon of every T5, where the file does not say.
EPSILON = 1e-6
_BLOCK = "encoder.block.{}."
_BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
_EPSILON_KEYS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
# Key-value -> argument of T5Config that the tensors give: they must agree.
_CHECKED_KEYS = {
    "embedding_length": "d_model",
    "feed_forward_length": "d_ff",
    "block_count": "num_layers",
    "attention.head_count": "num_heads",
    "attention.key_length": "d_kv",
    "attention.relative_buckets_count": "relative_attention_num_buckets",
}
# Far above T5 XXL's 24: bounds the time that a hostile header can ask for.
_MAX_BLOCKS = 256
_LOADS = "flux_kernels loads the T5 encoders of FLUX.1 pipelines (T5 v1.1 XXL and its relatives)."


def infer_config(shapes: Shapes, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Infer the arguments of transformers' T5Config.

    Args:
        shapes: parameter name of T5EncoderModel -> shape in torch order.
        metadata: the file's key-values.

    Raises:
        GGUFError: for another model, or where key-values and tensors disagree.
    """
    _refuse_others(shapes, metadata)
    vocab, d_model = _matrix(shapes, TABLE)
    buckets, heads = _matrix(shapes, _BIAS.format(0))
    inner, _ = _matrix(shapes, f"{_BLOCK.format(0)}layer.0.SelfAttention.q.weight")
    gated = f"{_BLOCK.format(0)}layer.1.DenseReluDense.wi_0.weight" in shapes
    d_ff, _ = _matrix(shapes, f"{_BLOCK.format(0)}layer.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight")
    if inner % heads:
        raise GGUFError(f"The file has {heads} heads and {inner} rows of q; rows are whole heads. The file is damaged.")
    config = {
        "vocab_size": vocab,
        "d_model": d_model,
        "d_kv": inner // heads,
        "d_ff": d_ff,
        "num_layers": _count_blocks(shapes),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "layer_norm_epsilon": _epsilon(metadata),
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "is_encoder_decoder": False,
        "use_cache": False,
    }
    _compare(config, metadata)
    return config


def _refuse_others(shapes: Shapes, metadata: Mapping[str, Any]) -> None:
    """Raise GGUFError for what is no T5 encoder, with its name where tensors show it."""
    declared = metadata.get("general.architecture")
    if TABLE in shapes and _BIAS.format(1) in shapes:
        raise GGUFError(f"This is UMT5, the text encoder of Wan: every block has its own relative attention bias. {_LOADS}")
    if TABLE not in shapes or not any(name.startswith("encoder.block.") for name in shapes):
        examples = ", ".join(sorted(shapes)[:3]) or "none"
        raise GGUFError(
            f"This is no T5 encoder: its architecture key says {declared!r}, its tensors are called {examples}. {_LOADS}"
        )


def _matrix(shapes: Shapes, name: str) -> tuple[int, int]:
    if name not in shapes:
        raise GGUFError(f"The file lacks {name!r}, which every T5 encoder holds. It is incomplete.")
    if len(shapes[name]) != 2 or 0 in shapes[name]:
        raise GGUFError(f"{name!r} has shape {list(shapes[name])}; a T5 encoder has two dimensions there, none of them 0.")
    return shapes[name][0], shapes[name][1]


def _count_blocks(shapes: Shapes) -> int:
    matches = (re.match(r"encoder\.block\.([0-9]{1,6})\.", name) for name in shapes)
    indices = {int(match[1]) for match in matches if match}
    if len(indices) > _MAX_BLOCKS:
        raise GGUFError(f"The file has {len(indices)} blocks; T5 XXL has 24, and more than {_MAX_BLOCKS} are not read.")
    missing = next((index for index in range(len(indices)) if index not in indices), None)
    if missing is not None:
        raise GGUFError(f"The file has blocks up to {max(indices)}, but none with index {missing}. It is incomplete.")
    return len(indices)


def _key_value(metadata: Mapping[str, Any], key: str) -> Any:
    return next((metadata[f"{arch}.{key}"] for arch in ARCHITECTURES if f"{arch}.{key}" in metadata), None)


def _epsilon(metadata: Mapping[str, Any]) -> float:
    given = (_key_value(metadata, key) for key in _EPSILON_KEYS)
    epsilon = next((value for value in given if value is not None), EPSILON)
    if not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
        raise GGUFError(f"The key-values give a layer norm epsilon of {epsilon!r}; legal is a number between 0 and 1.")
    # A key-value is float32: 1e-6 comes back as 9.999999974752427e-07.
    return float(f"{epsilon:.7g}")


def _compare(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    for key, name in _CHECKED_KEYS.items():
        value = _key_value(metadata, key)
        if value is not None and value != config[name]:
            raise GGUFError(f"The key-value {key!r} says {value}, the tensors have {config[name]}. The file is damaged.")
