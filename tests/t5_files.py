"""Synthetic T5 encoder files for tests, written with gguf-py and typed by hand.

Under llama.cpp's or transformers' names.
"""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import torch
from transformers import T5Config, T5EncoderModel

from .encoder_files import write_tensors

TINY = {"vocab_size": 300, "d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 4}
# transformers' module inside a block -> llama.cpp's, from gguf-py's tensor_mapping.py
GATED = {
    "layer.0.SelfAttention.q": "attn_q",
    "layer.0.SelfAttention.k": "attn_k",
    "layer.0.SelfAttention.v": "attn_v",
    "layer.0.SelfAttention.o": "attn_o",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.0.layer_norm": "attn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wi": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
    "layer.1.layer_norm": "ffn_norm",
}
OUTSIDE = {"shared.weight": "token_embd.weight", "encoder.final_layer_norm.weight": "enc.output_norm.weight"}


def llama_name(parameter: str) -> str:
    """Return llama.cpp's name of a parameter."""
    if parameter in OUTSIDE:
        return OUTSIDE[parameter]
    block, module = re.fullmatch(r"encoder\.block\.(\d+)\.(.+)\.weight", parameter).groups()
    return f"enc.blk.{block}.{GATED[module]}.weight"


def tiny_t5(gated: bool = True, **changes) -> T5EncoderModel:
    """Build a random encoder in float32."""
    torch.manual_seed(0)
    config = T5Config(**{**TINY, "feed_forward_proj": "gated-gelu" if gated else "relu", **changes})
    return T5EncoderModel(config).eval()


def type_of(parameter: str, shape: tuple[int, ...], kinds=("Q8_0", "Q5_1", "Q4_0"), table: str = "Q8_0") -> str:
    """Return a type as llama.cpp's converter would give: vectors and the relative bias stay F32."""
    if len(shape) == 1 or "relative_attention_bias" in parameter:
        return "F32"
    return table if parameter == "shared.weight" else kinds[sum(map(ord, parameter)) % len(kinds)]


def write_t5(model: T5EncoderModel, path: Path, *, name=llama_name, types=type_of, keys=True, extra=(), leave_out=()) -> dict:
    """Write an encoder with gguf-py; return the values that its tensors decode to, float32, by parameter.

    `extra`: (name, float array) of tensors to add; `leave_out`: parameters to leave away.
    """
    writer = gguf.GGUFWriter(path, "t5encoder")
    if keys:
        _write_keys(writer, model.config)
    return write_tensors(writer, model, name, types, extra, leave_out, {})


def _write_keys(writer: gguf.GGUFWriter, config: T5Config) -> None:
    """Write the key-values that llama.cpp's converter writes for a T5 encoder."""
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_block_count(config.num_layers)
    writer.add_head_count(config.num_heads)
    writer.add_key_length(config.d_kv)
    writer.add_value_length(config.d_kv)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_relative_attn_buckets_count(config.relative_attention_num_buckets)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("t5")
    writer.add_token_list([f"t{index}" for index in range(config.vocab_size)])


def decoded_twin(model: T5EncoderModel, values: dict) -> T5EncoderModel:
    """Fill an encoder with decoded values."""
    model.load_state_dict(values, strict=False)
    model.tie_weights()
    return model
