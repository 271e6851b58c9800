"""A tiny random pipeline for each class that draws from text, as folders in the diffusers layout.

Nothing is downloaded. Parts and transformers fit each other: text encoders of width 32, VAEs that shrink by 8, transformers of few blocks. Tokenizers of
CLIP and T5 are the embedded model's; the others know bytes and a few special tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

from flux_kernels.formats import Packed, get_format
from flux_kernels.generation.embedded import embedded_model_path
from flux_kernels.layers.linear import GGUFLinear
from flux_kernels.models import save_gguf
from flux_kernels.torch_backend.reference import dequantize

from ..conftest import random_packed
from ..models.cases import CASES

WIDTH = 32
_LAYERS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "hidden_size": WIDTH}
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# As Qwen's, with content as text or as a list of texts.
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_tokenizer() -> transformers.Qwen2Tokenizer:
    """Make a tokenizer of Qwen's class whose tokens are bytes."""
    vocabulary = {character: number for number, character in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary |= {token: len(vocabulary) + number for number, token in enumerate(_SPECIAL)}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], extra_special_tokens=list(_SPECIAL))
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def _embedded_tokenizer(part: str) -> Any:
    kind = {"tokenizer": "CLIPTokenizer", "tokenizer_2": "T5TokenizerFast"}[part]
    return getattr(transformers, kind).from_pretrained(embedded_model_path() / part)


def _t5() -> transformers.T5EncoderModel:
    config = transformers.T5Config(
        d_model=2 * WIDTH, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=len(_embedded_tokenizer("tokenizer_2"))
    )
    return transformers.T5EncoderModel(config)


def _clip(kind: str = "CLIPTextModelWithProjection") -> Any:
    tokenizer = _embedded_tokenizer("tokenizer")
    config = transformers.CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        eos_token_id=tokenizer.eos_token_id,
    )
    return getattr(transformers, kind)(config)


def _text_config(layers: int) -> dict[str, Any]:
    return {**_LAYERS, "num_hidden_layers": layers, "vocab_size": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _qwen3(layers: int) -> transformers.Qwen3ForCausalLM:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_text_config(layers)))


# Rotary parts of time, height and width: half of a head of 16.
_ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": WIDTH, "patch_size": 14}


def _qwen2_5_vl() -> Any:
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_text_config(2), "rope_parameters": _ROPE}, vision_config={**_VISION, "fullatt_block_indexes": [0]}
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl() -> Any:
    # The deepest of the twelve layers that the pipeline takes has number 35.
    text = {**_text_config(36), "rope_parameters": _ROPE}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config={**_VISION, "deepstack_visual_indexes": [0]})
    return transformers.Qwen3VLModel(config)


def _mistral3() -> Any:
    text = {"model_type": "mistral", **_text_config(31)}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.Mistral3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    return transformers.Mistral3ForConditionalGeneration(config)


_FOUR = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 8}


def _kl() -> diffusers.AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    scaling = {"scaling_factor": 0.9, "shift_factor": 0.1}
    return diffusers.AutoencoderKL(**_FOUR, **blocks, **scaling, latent_channels=16)


def _kl_flux2() -> diffusers.AutoencoderKLFlux2:
    return diffusers.AutoencoderKLFlux2(**_FOUR, latent_channels=32)


def _kl_qwen_image() -> diffusers.AutoencoderKLQwenImage:
    return diffusers.AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)


def _clip_and_t5(t5: str) -> dict[str, Callable[[], Any]]:
    number = t5.removeprefix("text_encoder")
    return {t5: _t5, f"tokenizer{number}": lambda: _embedded_tokenizer("tokenizer_2")}


_CLIP_TOKENIZER = {"tokenizer": lambda: _embedded_tokenizer("tokenizer")}
_TWO_CLIPS = {"text_encoder": _clip, "text_encoder_2": _clip, "tokenizer_2": lambda: _embedded_tokenizer("tokenizer")}


@dataclass(frozen=True, eq=False)
class Tiny:
    """Describe a tiny pipeline.

    Attributes:
        case: name of the architecture.
        config: of the transformer, where it differs from the case's.
        vae: makes it.
        parts: the other parts besides the scheduler -> what makes them.
        more: arguments of the class that are no parts.
        dynamic: whether the scheduler shifts by the picture's size, as published ones do.
    """

    case: str
    config: Mapping[str, Any]
    vae: Callable[[], nn.Module]
    parts: Mapping[str, Callable[[], Any]]
    more: Mapping[str, Any]
    dynamic: bool = True


_QWEN = {"tokenizer": _byte_tokenizer}
_KLEIN = {"joint_attention_dim": 3 * WIDTH, "guidance_embeds": False}
_Z_IMAGE = {"dim": 384, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": WIDTH}
_KREA = {"text_hidden_dim": WIDTH, "text_num_attention_heads": 2, "text_num_key_value_heads": 2, "text_intermediate_size": 64}

TINY: Mapping[str, Tiny] = {
    "Flux2Pipeline": Tiny("FLUX.2", {"joint_attention_dim": 3 * WIDTH}, _kl_flux2, {"text_encoder": _mistral3, **_QWEN}, {}),
    "Flux2KleinPipeline": Tiny(
        "FLUX.2", _KLEIN, _kl_flux2, {"text_encoder": lambda: _qwen3(28), **_QWEN}, {"is_distilled": True}
    ),
    "ChromaPipeline": Tiny("Chroma", {"joint_attention_dim": 2 * WIDTH}, _kl, _clip_and_t5("text_encoder"), {}),
    "Krea2Pipeline": Tiny("Krea 2", _KREA, _kl_qwen_image, {"text_encoder": _qwen3_vl, **_QWEN}, {"is_distilled": True}),
    "ZImagePipeline": Tiny("Z-Image", _Z_IMAGE, _kl, {"text_encoder": lambda: _qwen3(2), **_QWEN}, {}),
    "QwenImagePipeline": Tiny(
        "Qwen-Image", {"joint_attention_dim": WIDTH}, _kl_qwen_image, {"text_encoder": _qwen2_5_vl, **_QWEN}, {}
    ),
    "StableDiffusion3Pipeline": Tiny(
        "Stable Diffusion 3",
        {"joint_attention_dim": 2 * WIDTH, "pooled_projection_dim": 2 * WIDTH},
        _kl,
        {**_TWO_CLIPS, **_CLIP_TOKENIZER, **_clip_and_t5("text_encoder_3")},
        {},
        dynamic=False,
    ),
}


def tiny_transformer(kind: str) -> nn.Module:
    """Build the random transformer of a pipeline class, in float32."""
    tiny = TINY[kind]
    return CASES[tiny.case].random_model(**tiny.config)


def write_packed(kind: str, path: Path) -> nn.Module:
    """Write the transformer as a GGUF file with packed blocks; return a model of what they decode to."""
    model, twin = tiny_transformer(kind), tiny_transformer(kind)
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for seed, (name, layer) in enumerate(list(twin.named_modules())):
        inside = any(name.startswith(f"{known}.") for known in lists)
        if isinstance(layer, nn.Linear) and inside and layer.in_features % 32 == 0:
            fmt = get_format("Q8_0" if layer.in_features % 256 else "Q4_K")
            rows = random_packed(fmt.name, layer.out_features, layer.in_features, seed)
            layer.weight.data = dequantize(Packed(rows, fmt))
            # Where rows do not lie together, torch's linear rounds once more: it adds the bias afterwards.
            layer.register_forward_pre_hook(lambda _layer, given: (given[0].contiguous(),))
            model.set_submodule(name, GGUFLinear.from_packed(rows, fmt, layer.bias, compute_dtype=torch.float32))
    save_gguf(model, path)
    return twin


def write_base(kind: str, folder: Path, **more: Any) -> Path:
    """Write a pipeline folder without its transformer.

    Args:
        kind: the class.
        folder: to write.
        more: arguments of the class that are no parts.
    """
    tiny = TINY[kind]
    torch.manual_seed(1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=tiny.dynamic)
    parts = {name: make() for name, make in tiny.parts.items()}
    pipeline = getattr(diffusers, kind)(
        scheduler=scheduler, vae=tiny.vae().eval(), transformer=None, **parts, **{**tiny.more, **more}
    )
    pipeline.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["transformer"] = ["diffusers", CASES[tiny.case].model_class]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
