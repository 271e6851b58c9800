"""Qwen3, of FLUX.2-klein and Z-Image.

Source: gguf-py's tensor_mapping.py (MODEL_ARCH.QWEN3), llama.cpp's convert_hf_to_gguf.py (Qwen3Model; it permutes no rows), and the
modules of transformers' Qwen3ForCausalLM.
"""

from __future__ import annotations

from typing import Any

from ...errors import GGUFError
from ...gguf.conventions import KeyValues
from ...gguf.spec import shown
from ..encoder import TextEncoder
from ..facts import EncoderFacts

# Layer norm epsilon of every Qwen3, where the file does not say.
_EPSILON = 1e-6
_TABLE, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_FIRST = "model.layers.0."
_NO_SCALING = ("none", "default")


def _read_config(facts: EncoderFacts) -> dict[str, Any]:
    """Return the arguments of transformers' Qwen3Config.

    Key-values are asked only for what no tensor says: the base of rotary positions, the context and the epsilon.
    """
    vocab, hidden = facts.matrix(_TABLE)
    width = facts.vector(f"{_FIRST}self_attn.q_norm.weight")
    queries, keys = (facts.matrix(f"{_FIRST}self_attn.{kind}_proj.weight")[0] for kind in "qk")
    heads, shared = facts.heads(queries, width, "q"), facts.heads(keys, width, "k")
    if heads % shared or width % 2:
        raise GGUFError(
            f"The file has {heads} heads of q and {shared} of k, of width {width}; each head of k serves as many of q, and widths are "
            "even. The file is damaged."
        )
    scaling = facts.key_value("rope.scaling.type")
    if scaling is not None and scaling not in _NO_SCALING:
        raise GGUFError(
            f"The file scales its rotary positions ({shown(str(scaling))}), which is not read. Take a file of the model as it was "
            "published, without longer context."
        )
    base = facts.required("rope.freq_base", "a number above 1", 1, 1e12)
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": facts.matrix(f"{_FIRST}mlp.gate_proj.weight")[0],
        "num_hidden_layers": facts.block_count(),
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": width,
        "max_position_embeddings": int(facts.required("context_length", "a positive number", 0, 2**31)),
        "rms_norm_eps": facts.epsilon(_EPSILON),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(f"{base:.7g}")},
        "tie_word_embeddings": _OUTPUT not in facts.shapes,
        "use_cache": False,
    }


def _written_keys(config: Any) -> KeyValues:
    kind = config.rope_parameters["rope_type"]
    if kind != "default":
        raise GGUFError(f"The model scales its rotary positions ({kind}), which is not written. Set them to the default first.")
    return {
        "context_length": ("UINT32", config.max_position_embeddings),
        "embedding_length": ("UINT32", config.hidden_size),
        "feed_forward_length": ("UINT32", config.intermediate_size),
        "block_count": ("UINT32", config.num_hidden_layers),
        "attention.head_count": ("UINT32", config.num_attention_heads),
        "attention.head_count_kv": ("UINT32", config.num_key_value_heads),
        "attention.key_length": ("UINT32", config.head_dim),
        "attention.value_length": ("UINT32", config.head_dim),
        "attention.layer_norm_rms_epsilon": ("FLOAT32", config.rms_norm_eps),
        "rope.freq_base": ("FLOAT32", config.rope_parameters["rope_theta"]),
    }


QWEN3 = TextEncoder(
    name="Qwen3 model",
    covers="Qwen3 models without experts (FLUX.2-klein, Z-Image)",
    gguf_names=("qwen3",),
    model_class="Qwen3ForCausalLM",
    model_type="qwen3",
    mark=r"model\.layers\.[0-9]+\.self_attn\.q_norm\.weight",
    # Gemma 3 and OLMo 2 have norms behind attention and feed-forward, mixtures have experts.
    lacks=r".*(post_attention_norm|post_ffw_norm|(pre|post)_feedforward_layernorm|_exps|experts).*",
    blocks=("blk", "model.layers"),
    in_block={
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    outside={"token_embd.weight": _TABLE, "output_norm.weight": "model.norm.weight", "output.weight": _OUTPUT},
    table=_TABLE,
    read_config=_read_config,
    written_keys=_written_keys,
    checked_keys={
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "block_count": "num_hidden_layers",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "rope.dimension_count": "head_dim",
    },
    largest=("Qwen3-32B", 64),
    example="pipe.text_encoder of FLUX.2-klein",
)
