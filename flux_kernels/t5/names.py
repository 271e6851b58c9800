"""Names of a T5 encoder's tensors as data: llama.cpp's, transformers', prefixes of checkpoints.

Source: gguf-py's tensor_mapping.py (MODEL_ARCH.T5ENCODER), and the modules of transformers' T5EncoderModel.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from ..errors import GGUFError

PREFIXES = ("text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "text_encoder_2.")
TABLE = "shared.weight"
# The same table under its second name; some files have it under both.
_TABLE_TWIN = "encoder.embed_tokens.weight"
_ATTENTION, _FEED_FORWARD = "layer.0.SelfAttention", "layer.1.DenseReluDense"
# llama.cpp's module inside a block -> transformers'. An encoder without gate has one input projection, `wi`.
_IN_BLOCK = {
    "attn_q": f"{_ATTENTION}.q",
    "attn_k": f"{_ATTENTION}.k",
    "attn_v": f"{_ATTENTION}.v",
    "attn_o": f"{_ATTENTION}.o",
    "attn_rel_b": f"{_ATTENTION}.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": f"{_FEED_FORWARD}.wi_0",
    "ffn_up": f"{_FEED_FORWARD}.wi_1",
    "ffn_down": f"{_FEED_FORWARD}.wo",
    "ffn_norm": "layer.1.layer_norm",
}
_GATE, _UP_WITHOUT_GATE = "ffn_gate", f"{_FEED_FORWARD}.wi"
_OUTSIDE = {"token_embd.weight": TABLE, "enc.output_norm.weight": "encoder.final_layer_norm.weight"}
# Parts of a whole T5 that its encoder has no use for: the decoder and the output head.
_NOT_ENCODER = re.compile(r"(dec\.|decoder\.|output\.weight|lm_head\.)")
_IN_ANY_BLOCK = re.compile(r"(enc\.blk|encoder\.block)\.[0-9]{1,6}\.(.+)")
_BLOCK = re.compile(r"enc\.blk\.([0-9]{1,6})\.(\w+)\.weight")


def strip_prefix(name: str) -> str:
    """Drop the prefix that single-file checkpoints put before a text encoder's names."""
    return next((name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix)), name)


def block_name(name: str) -> str | None:
    """Return the name of a tensor inside a block with "*" for the block's index, None for any other."""
    match = _IN_ANY_BLOCK.fullmatch(strip_prefix(name))
    return match and f"{match[1]}.*.{match[2]}"


def parameter_names(names: Collection[str]) -> dict[str, str]:
    """Map the parameters of transformers' T5EncoderModel to the names in the file.

    Decoder tensors are left out; a name that is not known stays as it is, for the check against the model to name it.

    Raises:
        GGUFError: where two tensors are one parameter.
    """
    gated = any(f".{_GATE}." in name for name in names)
    names_by_parameter: dict[str, str] = {}
    for name in names:
        bare = strip_prefix(name)
        if _NOT_ENCODER.match(bare) or (bare == _TABLE_TWIN and TABLE in map(strip_prefix, names)):
            continue
        parameter = _parameter(bare, gated)
        if parameter in names_by_parameter:
            twins = f"{names_by_parameter[parameter]!r} and {name!r}"
            raise GGUFError(f"Tensors {twins} are both {parameter!r}. A file must hold each once.")
        names_by_parameter[parameter] = name
    return names_by_parameter


def _parameter(bare: str, gated: bool) -> str:
    """Return transformers' name of a tensor."""
    match = _BLOCK.fullmatch(bare)
    if not match or match[2] not in _IN_BLOCK:
        return TABLE if bare == _TABLE_TWIN else _OUTSIDE.get(bare, bare)
    module = _UP_WITHOUT_GATE if match[2] == "ffn_up" and not gated else _IN_BLOCK[match[2]]
    return f"encoder.block.{match[1]}.{module}.weight"


def written_name(parameter: str) -> str:
    """Return llama.cpp's name of a parameter of T5EncoderModel.

    Raises:
        GGUFError: where it has none.
    """
    outside = {theirs: ours for ours, theirs in _OUTSIDE.items()}
    if parameter in outside:
        return outside[parameter]
    match = re.fullmatch(r"encoder\.block\.([0-9]{1,6})\.(.+)\.weight", parameter)
    inside = {theirs: ours for ours, theirs in _IN_BLOCK.items()} | {_UP_WITHOUT_GATE: "ffn_up"}
    if not match or match[2] not in inside:
        raise GGUFError(f"{parameter!r} is no parameter of a T5 encoder that GGUF has a name for.")
    return f"enc.blk.{match[1]}.{inside[match[2]]}.weight"
