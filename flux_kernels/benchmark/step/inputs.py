"""The sizes of a FLUX.1 transformer, and random inputs for one of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ...models.calls import DOUBLE, SINGLE, TEXT, WIDTH, image_tokens
from ..shapes import LATENT, POOLED, TEXT_WIDTH


@dataclass(frozen=True)
class StepConfig:
    """Hold a transformer's sizes under the names of its config in diffusers; defaults are FLUX.1-dev's."""

    num_layers: int = DOUBLE
    num_single_layers: int = SINGLE
    num_attention_heads: int = 24
    attention_head_dim: int = WIDTH // 24
    in_channels: int = LATENT
    joint_attention_dim: int = TEXT_WIDTH
    pooled_projection_dim: int = POOLED
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> StepConfig:
        """Take what it needs of a config.json."""
        return cls(**{field.name: config[field.name] for field in fields(cls)})

    @property
    def width(self) -> int:
        """Return the width of both streams."""
        return self.num_attention_heads * self.attention_head_dim


FLUX_DEV = StepConfig()


@dataclass(frozen=True)
class StepInputs:
    """Hold the inputs of one step: image [B, T, latent], text [B, S, width], pooled [B, pooled].

    Time and guidance are [B]. `positions` is [S + T, 3]: index, row and column of each token; text tokens have zeros.
    """

    image: Tensor
    text: Tensor
    pooled: Tensor
    time: Tensor
    guidance: Tensor
    positions: Tensor

    def to(self, dtype: torch.dtype) -> StepInputs:
        """Cast all but the positions."""
        cast = {name: tensor.to(dtype) for name, tensor in vars(self).items()}
        return StepInputs(**cast | dict(positions=self.positions))


def step_inputs(
    config: StepConfig, width: int, height: int, batch: int, device: torch.device, dtype: torch.dtype, text: int = TEXT
) -> StepInputs:
    """Make random inputs for a picture in pixels: unit latents, text features, middle of the schedule."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    rows, columns = height // 16, width // 16
    grid = torch.zeros(rows, columns, 3)
    grid[..., 1], grid[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    return StepInputs(
        image=normal(batch, image_tokens(width, height), config.in_channels),
        text=normal(batch, text, config.joint_attention_dim),
        pooled=normal(batch, config.pooled_projection_dim),
        # Times 1000 both are exact in bfloat16; 3500 is not, and its sinusoids in float32 would be those of another guidance.
        time=torch.full((batch,), 0.5, device=device, dtype=dtype),
        guidance=torch.full((batch,), 4.0, device=device, dtype=dtype),
        positions=torch.cat([torch.zeros(text, 3), grid.flatten(0, 1)]).to(device),
    )
