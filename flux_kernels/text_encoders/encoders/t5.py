"""T5's encoder, of FLUX.1, Chroma and Stable Diffusion 3.

Source: gguf-py's tensor_mapping.py (MODEL_ARCH.T5ENCODER), and the modules of transformers' T5EncoderModel.
"""

from __future__ import annotations

from typing import Any

from ...errors import GGUFError
from ...gguf.conventions import KeyValues
from ...models.architecture import Mark
from ..encoder import TextEncoder
from ..facts import EncoderFacts

# Layer norm epsilon of every T5, where the file does not say.
_EPSILON = 1e-6
# Tokens that FLUX.1 and T5 v1.1 use; readers that ask for it only reserve memory by it.
_CONTEXT = 512
_ATTENTION, _FEED_FORWARD = "layer.0.SelfAttention", "layer.1.DenseReluDense"
_FIRST = "encoder.block.0."


def _read_config(facts: EncoderFacts) -> dict[str, Any]:
    """Return the arguments of transformers' T5Config.

    Key-values are asked only for what no tensor says.
    """
    vocab, d_model = facts.matrix("shared.weight")
    buckets, heads = facts.matrix(f"{_FIRST}{_ATTENTION}.relative_attention_bias.weight")
    inner, _ = facts.matrix(f"{_FIRST}{_ATTENTION}.q.weight")
    gated = f"{_FIRST}{_FEED_FORWARD}.wi_0.weight" in facts.shapes
    d_ff, _ = facts.matrix(f"{_FIRST}{_FEED_FORWARD}.{'wi_0' if gated else 'wi'}.weight")
    if inner % heads:
        raise GGUFError(f"The file has {heads} heads and {inner} rows of q; rows are whole heads. The file is damaged.")
    return {
        "vocab_size": vocab,
        "d_model": d_model,
        "d_kv": inner // heads,
        "d_ff": d_ff,
        "num_layers": facts.block_count(),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "layer_norm_epsilon": facts.epsilon(_EPSILON),
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def _written_keys(config: Any) -> KeyValues:
    return {
        "context_length": ("UINT32", _CONTEXT),
        "embedding_length": ("UINT32", config.d_model),
        "feed_forward_length": ("UINT32", config.d_ff),
        "block_count": ("UINT32", config.num_layers),
        "vocab_size": ("UINT32", config.vocab_size),
        "attention.head_count": ("UINT32", config.num_heads),
        "attention.key_length": ("UINT32", config.d_kv),
        "attention.value_length": ("UINT32", config.d_kv),
        "attention.layer_norm_epsilon": ("FLOAT32", config.layer_norm_epsilon),
        "attention.layer_norm_rms_epsilon": ("FLOAT32", config.layer_norm_epsilon),
        "attention.relative_buckets_count": ("UINT32", config.relative_attention_num_buckets),
    }


T5 = TextEncoder(
    name="T5 encoder",
    covers="the T5 encoders of FLUX.1 pipelines (T5 v1.1 XXL and its relatives)",
    gguf_names=("t5encoder", "t5"),
    model_class="T5EncoderModel",
    model_type="t5",
    mark=r"encoder\.block\..*",
    blocks=("enc.blk", "encoder.block"),
    in_block={
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
    },
    # An encoder without gate has one input projection.
    in_block_without={"ffn_gate": {"ffn_up": f"{_FEED_FORWARD}.wi"}},
    outside={"token_embd.weight": "shared.weight", "enc.output_norm.weight": "encoder.final_layer_norm.weight"},
    table="shared.weight",
    twins={"encoder.embed_tokens.weight": "shared.weight"},
    # The decoder and the output head of a whole T5.
    unused=r"dec\.|decoder\.|output\.weight|lm_head\.",
    prefixes=("text_encoders.t5xxl.transformer.", "t5xxl.transformer.", "text_encoder_2."),
    read_config=_read_config,
    written_keys=_written_keys,
    checked_keys={
        "embedding_length": "d_model",
        "feed_forward_length": "d_ff",
        "block_count": "num_layers",
        "attention.head_count": "num_heads",
        "attention.key_length": "d_kv",
        "attention.relative_buckets_count": "relative_attention_num_buckets",
    },
    largest=("T5 XXL", 24),
    example="pipe.text_encoder_2",
    exact=r".*\.relative_attention_bias\.weight",
    relatives=(
        Mark(
            "UMT5, the text encoder of Wan: every block has its own relative attention bias",
            rf"encoder\.block\.1\.{_ATTENTION}\.relative_attention_bias\.weight",
        ),
    ),
    never=("decoder",),
)
