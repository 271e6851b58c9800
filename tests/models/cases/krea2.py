"""Krea 2, from stable-diffusion.cpp: shapes of krea2.hpp, names of name_conversion.cpp.

diffusers converts no single file of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .case import Case, Published, Shapes


def _shapes(h: int, head: int, keys: int, mlp: int, layers: int, text: int, text_head: int, text_mlp: int) -> Shapes:
    shapes: Shapes = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"] = (rows, columns)
        shapes[f"{name}.bias"] = (rows,)

    def block(name: str, width: int, head: int, keys: int, mlp: int) -> None:
        shapes.update({f"{name}.prenorm.scale": (width,), f"{name}.postnorm.scale": (width,)})
        shapes.update({f"{name}.attn.qknorm.qnorm.scale": (head,), f"{name}.attn.qknorm.knorm.scale": (head,)})
        for layer, rows in {"wq": width, "wk": keys, "wv": keys, "gate": width, "wo": width}.items():
            shapes[f"{name}.attn.{layer}.weight"] = (rows, width)
        shapes[f"{name}.mlp.gate.weight"] = (mlp, width)
        shapes[f"{name}.mlp.up.weight"] = (mlp, width)
        shapes[f"{name}.mlp.down.weight"] = (width, mlp)

    linear("first", h, 64)
    linear("tmlp.0", h, 256)
    linear("tmlp.2", h, h)
    linear("tproj.1", 6 * h, h)
    for i in range(2):
        block(f"txtfusion.layerwise_blocks.{i}", text, text_head, text, text_mlp)
        block(f"txtfusion.refiner_blocks.{i}", text, text_head, text, text_mlp)
    shapes["txtfusion.projector.weight"] = (1, 12)
    shapes["txtmlp.0.scale"] = (text,)
    linear("txtmlp.1", h, text)
    linear("txtmlp.3", h, h)
    for i in range(layers):
        block(f"blocks.{i}", h, head, keys, mlp)
        shapes[f"blocks.{i}.mod.lin"] = (6 * h,)
    shapes |= {"last.norm.scale": (h,), "last.modulation.lin": (2, h)}
    linear("last.linear", 64, h)
    return shapes


def _config(
    heads: int, keys: int, head: int, mlp: int, layers: int, text: int, text_heads: int, text_mlp: int
) -> dict[str, Any]:
    return {
        "in_channels": 64,
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "intermediate_size": mlp,
        "timestep_embed_dim": 256,
        "text_hidden_dim": text,
        "num_text_layers": 12,
        "text_num_attention_heads": text_heads,
        "text_num_key_value_heads": text_heads,
        "text_intermediate_size": text_mlp,
        "num_layerwise_text_blocks": 2,
        "num_refiner_text_blocks": 2,
        "axes_dims_rope": {128: (32, 48, 48), 64: (16, 24, 24)}[head],
        "rope_theta": 1000.0,
        "norm_eps": 1e-5,
    }


_PREFIXES = {
    "first.": "img_in.",
    "tmlp.0.": "time_embed.linear_1.",
    "tmlp.2.": "time_embed.linear_2.",
    "tproj.1.": "time_mod_proj.",
    "txtmlp.0.": "txt_in.norm.",
    "txtmlp.1.": "txt_in.linear_1.",
    "txtmlp.3.": "txt_in.linear_2.",
    "txtfusion.": "text_fusion.",
    "blocks.": "transformer_blocks.",
    "last.": "final_layer.",
}
_PARTS = {
    ".attn.wq.": ".attn.to_q.",
    ".attn.wk.": ".attn.to_k.",
    ".attn.wv.": ".attn.to_v.",
    ".attn.wo.": ".attn.to_out.0.",
    ".attn.gate.": ".attn.to_gate.",
    ".qknorm.qnorm.": ".norm_q.",
    ".qknorm.knorm.": ".norm_k.",
    ".prenorm.": ".norm1.",
    ".postnorm.": ".norm2.",
    ".mlp.": ".ff.",
    ".scale": ".weight",
}


def _convert(checkpoint: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename by stable-diffusion.cpp's table from diffusers' names, read backwards."""
    converted = {}
    for name, value in checkpoint.items():
        prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
        renamed = _PREFIXES[prefix] + name[len(prefix) :]
        for ours, theirs in _PARTS.items():
            renamed = renamed.replace(ours, theirs)
        if renamed.endswith((".mod.lin", ".modulation.lin")):
            renamed = renamed.rpartition(".mod")[0] + ".scale_shift_table"
            value = value.reshape(-1, value.shape[-1] // 6) if value.ndim == 1 else value
        converted[renamed] = value
    return converted


def _inputs(generator: torch.Generator) -> dict[str, Any]:
    text = [[0.0, 0, 0]] * 5
    return {
        "hidden_states": torch.randn(1, 6, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 12, 256, generator=generator),
        "timestep": torch.tensor([0.7]),
        "position_ids": torch.tensor(text + [[0.0, i // 3, i % 3] for i in range(6)]),
        "encoder_attention_mask": torch.tensor([[True] * 4 + [False]]),
    }


# The model card: 12.9 billion parameters. Readers of the published files count 432 tensors, of which two [6144, 6144] are a
# hidden picture.
_FULL = (
    _shapes(6144, 128, 1536, 16384, 28, 2560, 128, 6912),
    _config(48, 12, 128, 16384, 28, 2560, 20, 6912),
    432 - 2,
    12_900_000_000 - 2 * 6144**2,
)

KREA2 = Case(
    name="Krea 2",
    gguf_name="flux",
    model_class="Krea2Transformer2DModel",
    shapes=_shapes(256, 64, 128, 512, 2, 256, 32, 512),
    config=_config(4, 2, 64, 512, 2, 256, 8, 512),
    convert=_convert,
    inputs=_inputs,
    published={
        "Krea 2 Turbo": Published(*_FULL, "krea2_turbo-Q4_K"),
        "Krea 2 Raw": Published(*_FULL, "Krea-2-Raw-Q4_K"),
    },
    plain=frozenset(
        (
            *("first.weight", "tmlp.0.weight", "tmlp.2.weight", "tproj.1.weight", "txtmlp.1.weight", "txtmlp.3.weight"),
            *("txtfusion.projector.weight", "last.modulation.lin", "last.linear.weight"),
        )
    ),
    extra={"last.up.weight": (256, 256), "last.down.weight": (256, 256)},
)
