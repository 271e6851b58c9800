"""Small random models of every architecture, with inputs for ComfyUI's class and diffusers'."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

_TWO = {"num_layers": 2, "num_attention_heads": 2}
_GROUPED = {"num_key_value_heads": 1, "intermediate_size": 768, "text_hidden_dim": 640, "text_intermediate_size": 1792}
_PICTURE = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 256}
_POSITIONS = {"pos_embed_max_size": 8, "sample_size": 16, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}
# Arguments of diffusers' classes. Of SD3, ComfyUI takes the number of blocks from the width, 64 channels each.
SMALL: dict[str, dict[str, Any]] = {
    "FLUX.1": _TWO | dict(num_single_layers=2, joint_attention_dim=256, pooled_projection_dim=768, guidance_embeds=True),
    "FLUX.2": _TWO | dict(num_single_layers=2, joint_attention_dim=512),
    "Chroma": dict(num_layers=1, num_single_layers=1, joint_attention_dim=256),
    "Krea 2": _TWO | _GROUPED,
    "Qwen-Image": dict(num_layers=1),
    "Z-Image": dict(n_layers=2, cap_feat_dim=256),
    "Wan": _TWO | _PICTURE | dict(ffn_dim=512),
    "Stable Diffusion 3": _POSITIONS
    | dict(num_layers=4, num_attention_heads=4, joint_attention_dim=512, caption_projection_dim=256, pooled_projection_dim=256),
}


def draw(*shape: int) -> Tensor:
    """Draw normal numbers, the same for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def tokens(latent: Tensor, patch: int = 2) -> Tensor:
    """Return [1, C, H, W] as tokens [1, H*W/p^2, C*p^2], channels before the patch's pixels."""
    return nn.functional.unfold(latent, patch, stride=patch).transpose(1, 2)


def places(height: int, width: int, axes: int = 3) -> Tensor:
    """Return the position of each token: 0, row, column, 0, ..."""
    return torch.tensor([[0.0, i, j, *(0.0,) * (axes - 3)] for i in range(height) for j in range(width)])


def calls(name: str) -> tuple[dict[str, Any], Callable[[Any], Tensor]]:
    """Return the arguments of diffusers' forward, and what calls ComfyUI's on the same inputs."""
    x, t, guidance = draw(1, 16, 8, 4), torch.tensor([0.75]), torch.tensor([3.5])
    ours: dict[str, Any] = {"hidden_states": tokens(x), "timestep": t}
    if name in ("FLUX.1", "Chroma"):
        c, y = draw(1, 5, 256), draw(1, 768)
        ours |= dict(encoder_hidden_states=c, img_ids=places(4, 2), txt_ids=torch.zeros(5, 3))
        if name == "Chroma":
            return ours, lambda model: tokens(model(x, t, c, torch.zeros(1)))
        ours |= dict(pooled_projections=y, guidance=guidance)
        return ours, lambda model: tokens(model(x, t, c, y=y, guidance=guidance))
    if name == "FLUX.2":
        wide, c = draw(1, 128, 4, 3), draw(1, 5, 512)
        ours |= dict(hidden_states=tokens(wide, 1), encoder_hidden_states=c, guidance=guidance, img_ids=places(4, 3, 4))
        ours["txt_ids"] = torch.tensor([[0.0, 0, 0, i] for i in range(5)])
        return ours, lambda model: tokens(model(wide, t, c, guidance=guidance), 1)
    if name == "Krea 2":
        c = draw(1, 5, 12, 640)
        ours |= dict(encoder_hidden_states=c, position_ids=torch.cat((torch.zeros(5, 3), places(4, 2))))
        return ours, lambda model: tokens(model(x, t, c.flatten(2)))
    if name == "Qwen-Image":
        c = draw(1, 5, 3584)
        ours |= dict(encoder_hidden_states=c, encoder_hidden_states_mask=torch.ones(1, 5).bool(), img_shapes=[[(1, 4, 2)]])
        return ours, lambda model: tokens(model(x[:, :, None], t, c)[:, :, 0])
    if name == "Z-Image":
        c = draw(1, 40, 256)
        return dict(x=[x[0][:, None]], t=1 - t, cap_feats=[c[0]]), lambda model: -model(x, t, c, 40)
    t = 1000 * t
    if name == "Wan":
        # diffusers splits text from picture at 512 tokens from the end.
        video, c, picture = draw(1, 36, 3, 8, 6), draw(1, 512, 4096), draw(1, 257, 1280)
        ours = dict(hidden_states=video, timestep=t, encoder_hidden_states=c, encoder_hidden_states_image=picture)
        return ours, lambda model: model(video, t, c, clip_fea=picture)
    c, y = draw(1, 5, 512), draw(1, 256)
    ours = dict(hidden_states=x, timestep=t, encoder_hidden_states=c, pooled_projections=y)
    return ours, lambda model: model(x, t, context=c, y=y)


def random_model(row: Any) -> nn.Module:
    """Build the small model with weights that bfloat16 holds."""
    torch.manual_seed(0)
    model = getattr(diffusers, row.model_class)(**SMALL[row.name]).eval()
    for name, value in model.named_parameters():
        norm = "norm" in name and name.endswith("weight") and value.ndim == 1
        nn.init.normal_(value, 1.0 if norm else 0.0, 0.1 if value.ndim < 2 or "table" in name else value[0].numel() ** -0.5)
        value.data = value.data.bfloat16().float()
    return model
