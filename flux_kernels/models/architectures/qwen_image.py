"""Qwen-Image: drawing from text, Edit (2509 and 2511), Layered. Its makers' names are diffusers' own.

Source: diffusers' QwenImageTransformer2DModel; stable-diffusion.cpp's qwen_image.hpp.
"""

from __future__ import annotations

from typing import Any

from ...errors import GGUFError
from ..architecture import Architecture, Mark, Variant
from ..stored_shapes import StoredShapes
from .flux1 import default_rope

_TIME = "time_text_embed"
_ADDITION = f"{_TIME}.addition_t_embedding.weight"
# An empty tensor by which ComfyUI and stable-diffusion.cpp know Edit-2511: reference pictures are taken as of time 0.
_ZERO_TIME = "__index_timestep_zero__"
# Of a picture's side.
_PATCH = 2
# Numbers a token of the other model with these tensors.
_MAGE_FLOW = 128


def _config(stored: StoredShapes) -> dict[str, Any]:
    head_dim = stored.length("transformer_blocks.0.attn.norm_q.weight")
    width, in_channels = stored.matrix("img_in.weight")
    _, joint_dim = stored.matrix("txt_in.weight")
    outputs, _ = stored.matrix("proj_out.weight")
    if in_channels == _MAGE_FLOW:
        raise GGUFError(
            f"img_in takes {in_channels} numbers a token: this is Mage-Flow, which has Qwen-Image's tensors and counts positions "
            "otherwise; Qwen-Image takes 64. No model class of diffusers runs it."
        )
    layered = stored.has(_ADDITION)
    return {
        "in_channels": in_channels,
        "out_channels": outputs // (_PATCH * _PATCH),
        "num_layers": stored.blocks("transformer_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": stored.heads(width, head_dim),
        "joint_attention_dim": joint_dim,
        "zero_cond_t": stored.has(_ZERO_TIME),
        "use_additional_t_cond": layered,
        "use_layer3d_rope": layered,
    }


_SIZES = {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584}

QWEN_IMAGE = Architecture(
    name="Qwen-Image",
    covers="2512, Edit, Edit-2509, Edit-2511, Layered",
    gguf_name="qwen_image",
    mark=r"transformer_blocks\.[0-9]{1,6}\.img_mod\..*",
    relatives=(
        Mark("a Qwen-Image ControlNet", r"controlnet_(x_embedder|blocks)\..*"),
        Mark("Lens", r"transformer_blocks\.[0-9]{1,6}\.(img_mlp\.w1|attn\.img_qkv)\..*"),
    ),
    model_class="QwenImageTransformer2DModel",
    pipelines=(
        *("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", "QwenImageEditPipeline"),
        *("QwenImageEditPlusPipeline", "QwenImageEditInpaintPipeline", "QwenImageLayeredPipeline"),
    ),
    blocks=(("transformer_blocks", "transformer_blocks"),),
    counts={"transformer_blocks": "num_layers"},
    links=(),
    read_config=_config,
    untold={"patch_size": _PATCH, "guidance_embeds": False, "axes_dims_rope": default_rope},
    # Files of Qwen-Image, 2512, Edit and Edit-2509 have the same tensors. The scale is the pipelines' true_cfg_scale; steps,
    # scale and tokens are their defaults.
    variants=(
        Variant(
            "Qwen-Image-Layered",
            _SIZES | {"use_additional_t_cond": True},
            steps=50,
            guidance=4.0,
            size=(640, 640),
            from_text=False,
            pipelines=("QwenImageLayeredPipeline",),
        ),
        Variant(
            "Qwen-Image-Edit-2511",
            _SIZES | {"zero_cond_t": True},
            steps=50,
            guidance=4.0,
            from_text=False,
            pipelines=("QwenImageEditPlusPipeline",),
        ),
        Variant("Qwen-Image", _SIZES, steps=50, guidance=4.0, word=r"qwen[-_. ]?image(?!.*edit)"),
        Variant(
            "Qwen-Image-Edit",
            _SIZES,
            steps=50,
            guidance=4.0,
            word="edit",
            from_text=False,
            # 2509 has the second.
            pipelines=("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
        ),
    ),
    # ComfyUI-GGUF's tools do not know this model. Of these, stable-diffusion.cpp leaves img_in and txt_in alone.
    plain=("img_in.", "txt_in.", "time_text_embed.", "norm_out.", "proj_out."),
    flags={_ZERO_TIME: "zero_cond_t"},
    tokens={
        "*.img_mod.*": "batch",
        "*.txt_mod.*": "batch",
        "*.attn.add_*_proj": "text",
        "*.attn.to_add_out": "text",
        "*.txt_mlp.*": "text",
    },
)
