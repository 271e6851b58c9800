"""The forward pass of a Flux transformer in stages, so that measuring can start at any block.

Stage 0 embeds the inputs, stages 1 to n are the blocks, stage n + 1 projects to the velocity. Running all of them is
FluxTransformer2DModel's own forward pass (without ControlNet and IP-Adapter inputs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..models.names import block_of

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

# The model's embedders take a timestep and a guidance of thousandths.
_THOUSAND = 1000


@dataclass(frozen=True)
class Hidden:
    """Hold what goes from block to block.

    Attributes:
        image: [batch, image tokens, width].
        text: [batch, text tokens, width].
        temb: [batch, width], the embedded timestep, guidance and pooled text.
        rope: cosines and sines, as `pos_embed` returns them.
    """

    image: Tensor
    text: Tensor
    temb: Tensor
    rope: tuple[Tensor, Tensor]

    def tokens(self) -> Tensor:
        """Return text and image tokens together, [batch, tokens, width]."""
        return torch.cat([self.text, self.image], dim=1)


class Stages:
    """Run a FluxTransformer2DModel stage by stage.

    Args:
        model: the transformer, in eval mode. It is not changed.
    """

    def __init__(self, model: FluxTransformer2DModel):
        self.model = model
        self.blocks: list[nn.Module] = [*model.transformer_blocks, *model.single_transformer_blocks]
        self.last = len(self.blocks) + 1

    def stage_of(self, module: str) -> int:
        """Return the stage that a module (or parameter) of the model belongs to."""
        block = block_of(f"{module}.")
        if block is not None:
            return 1 + block[1] + (len(self.model.transformer_blocks) if block[0] == "single_transformer_blocks" else 0)
        return self.last if module.startswith(("norm_out", "proj_out")) else 0

    def embed(self, inputs: Mapping[str, Any]) -> Hidden:
        """Run stage 0 on the transformer's keyword arguments."""
        model = self.model
        image = model.x_embedder(inputs["hidden_states"])
        timestep = inputs["timestep"].to(image.dtype) * _THOUSAND
        pooled, guidance = inputs["pooled_projections"], inputs.get("guidance")
        if guidance is None:
            temb = model.time_text_embed(timestep, pooled)
        else:
            temb = model.time_text_embed(timestep, guidance.to(image.dtype) * _THOUSAND, pooled)
        text = model.context_embedder(inputs["encoder_hidden_states"])
        rope = model.pos_embed(torch.cat((inputs["txt_ids"], inputs["img_ids"]), dim=0))
        return Hidden(image, text, temb, rope)

    def block(self, stage: int, hidden: Hidden) -> Hidden:
        """Run the block of stage 1 to n."""
        text, image = self.blocks[stage - 1](
            hidden_states=hidden.image,
            encoder_hidden_states=hidden.text,
            temb=hidden.temb,
            image_rotary_emb=hidden.rope,
        )
        return Hidden(image, text, hidden.temb, hidden.rope)

    def velocity(self, hidden: Hidden) -> Tensor:
        """Run the last stage; return the velocity of the image tokens, [batch, image tokens, channels]."""
        return self.model.proj_out(self.model.norm_out(hidden.image, hidden.temb))
