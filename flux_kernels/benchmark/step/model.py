"""FLUX.1's transformer in plain torch: one whole step without diffusers.

Module names are those of diffusers' FluxTransformer2DModel, so that weights and name patterns fit both; a test compares
the two. Source: diffusers' FluxTransformer2DModel, read for the arithmetic.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.calls import MLP, WIDTH
from ..shapes import SINUSOID
from .inputs import FLUX_DEV, StepConfig, StepInputs

Angles = tuple[Tensor, Tensor]
_EPS, _THETA, _MAX_PERIOD = 1e-6, 1e4, 1e4
_MLP_RATIO = MLP // WIDTH


def rotary(positions: Tensor, axes: tuple[int, ...]) -> Angles:
    """Return cosine and sine [tokens, head size]: neighbours form a pair, each axis has its share."""
    angles = []
    for axis, size in enumerate(axes):
        rates = _THETA ** -(torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size)
        angles.append(torch.outer(positions[:, axis].double(), rates).repeat_interleave(2, dim=1))
    whole = torch.cat(angles, dim=1)
    return whole.cos().float(), whole.sin().float()


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turn every pair of x [B, heads, tokens, head size] by its angle, in float32."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], dim=-1).flatten(-2)
    return (x.float() * angles[0] + turned.float() * angles[1]).to(x.dtype)


def sinusoid(values: Tensor) -> Tensor:
    """Embed values [B] as cosines and sines of falling frequency, float32 [B, 256]."""
    half = SINUSOID // 2
    rates = torch.exp(-math.log(_MAX_PERIOD) / half * torch.arange(half, dtype=torch.float32, device=values.device))
    angles = values[:, None].float() * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def normalized(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalize over the width, then scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=_EPS) * (1 + scale) + shift


def _chain(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _modulation(width: int, parts: int) -> nn.Sequential:
    return _chain(silu=nn.SiLU(), linear=nn.Linear(width, parts * width))


def _vectors(modulation: nn.Module, embedding: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Map the embedding of time, guidance and text to `parts` vectors [B, 1, width]."""
    return modulation(embedding).unsqueeze(1).chunk(parts, dim=-1)


def _embedder(k: int, width: int) -> nn.Sequential:
    return _chain(linear_1=nn.Linear(k, width), silu=nn.SiLU(), linear_2=nn.Linear(width, width))


def _feed_forward(width: int) -> nn.Sequential:
    """Make a double block's MLP, numbered as diffusers does it."""
    first = _chain(proj=nn.Linear(width, _MLP_RATIO * width), gelu=nn.GELU("tanh"))
    return _chain(net=nn.Sequential(first, nn.Identity(), nn.Linear(_MLP_RATIO * width, width)))


class Attention(nn.Module):
    """Attend jointly over both streams with weights of their own (double), or over their concatenation."""

    to_add_out: nn.Module

    def __init__(self, config: StepConfig, double: bool):
        super().__init__()
        self.head = config.attention_head_dim
        layers = ("to_q", "to_k", "to_v") + (("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out") if double else ())
        for layer in layers:
            self.add_module(layer, nn.Linear(config.width, config.width))
        if double:
            self.to_out = nn.ModuleList([nn.Linear(config.width, config.width)])
        for norm in ("norm_q", "norm_k") + (("norm_added_q", "norm_added_k") if double else ()):
            self.add_module(norm, nn.RMSNorm(self.head, eps=_EPS))

    def forward(self, x: Tensor, angles: Angles, text: Tensor | None = None) -> Tensor:
        """Return the heads' results [B, tokens, width], text tokens first, before any projection."""
        q, k, v = self._heads(x, self.to_q, self.to_k, self.to_v, self.norm_q, self.norm_k)
        if text is not None:
            projections = (self.add_q_proj, self.add_k_proj, self.add_v_proj, self.norm_added_q, self.norm_added_k)
            q, k, v = (torch.cat(pair, dim=2) for pair in zip(self._heads(text, *projections), (q, k, v)))
        mixed = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v)
        return mixed.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor, to_q, to_k, to_v, norm_q, norm_k) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer in (to_q, to_k, to_v))
        return norm_q(q), norm_k(k), v


class DoubleBlock(nn.Module):
    """Attend over both streams, then pass each through its MLP."""

    def __init__(self, config: StepConfig):
        super().__init__()
        self.norm1, self.norm1_context = _modulation(config.width, 6), _modulation(config.width, 6)
        self.attn = Attention(config, double=True)
        self.ff, self.ff_context = _feed_forward(config.width), _feed_forward(config.width)

    def forward(self, text: Tensor, image: Tensor, embedding: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        of_image, of_text = _vectors(self.norm1, embedding, 6), _vectors(self.norm1_context, embedding, 6)
        mixed = self.attn(normalized(image, *of_image[:2]), angles, normalized(text, *of_text[:2]))
        # Slices of one tensor: contiguous, as every linear wants them and diffusers makes them.
        mixed_text, mixed_image = mixed[:, : text.shape[1]].contiguous(), mixed[:, text.shape[1] :].contiguous()
        image = _second_half(image, self.attn.to_out[0](mixed_image), of_image, self.ff)
        text = _second_half(text, self.attn.to_add_out(mixed_text), of_text, self.ff_context)
        return text, image


def _second_half(x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...], mlp: nn.Module) -> Tensor:
    gate, shift_mlp, scale_mlp, gate_mlp = modulation[2:]
    x = x + gate * attended
    return x + gate_mlp * mlp(normalized(x, shift_mlp, scale_mlp))


class SingleBlock(nn.Module):
    """Attend and run the MLP side by side over the concatenated streams, and project both together."""

    def __init__(self, config: StepConfig):
        super().__init__()
        width = config.width
        self.norm = _modulation(width, 3)
        self.attn = Attention(config, double=False)
        self.proj_mlp, self.proj_out = nn.Linear(width, _MLP_RATIO * width), nn.Linear((1 + _MLP_RATIO) * width, width)

    def forward(self, x: Tensor, embedding: Tensor, angles: Angles) -> Tensor:
        shift, scale, gate = _vectors(self.norm, embedding, 3)
        y = normalized(x, shift, scale)
        mlp = F.gelu(self.proj_mlp(y), approximate="tanh")
        return x + gate * self.proj_out(torch.cat([self.attn(y, angles), mlp], dim=-1))


class StepModel(nn.Module):
    """Run one step: the whole transformer. `linears` names the layers that others can take the place of."""

    def __init__(self, config: StepConfig = FLUX_DEV):
        super().__init__()
        width = config.width
        self.config = config
        inputs = dict(timestep_embedder=SINUSOID, guidance_embedder=SINUSOID, text_embedder=config.pooled_projection_dim)
        self.time_text_embed = nn.ModuleDict({name: _embedder(k, width) for name, k in inputs.items()})
        self.context_embedder = nn.Linear(config.joint_attention_dim, width)
        self.x_embedder = nn.Linear(config.in_channels, width)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_layers))
        self.norm_out = _modulation(width, 2)
        self.proj_out = nn.Linear(width, config.in_channels)

    def linears(self) -> dict[str, nn.Linear]:
        """Return every linear layer by its name, in the order of their use."""
        return {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}

    def forward(self, inputs: StepInputs) -> Tensor:
        """Return the predicted velocity [B, image tokens, latent]."""
        time, guidance = (sinusoid(1000 * value).to(inputs.pooled.dtype) for value in (inputs.time, inputs.guidance))
        embedded = zip(self.time_text_embed.values(), (time, guidance, inputs.pooled), strict=True)
        of_time, of_guidance, of_text = (embedder(value) for embedder, value in embedded)
        embedding = of_time + of_guidance + of_text
        text, image = self.context_embedder(inputs.text), self.x_embedder(inputs.image)
        angles = rotary(inputs.positions, self.config.axes_dims_rope)
        for double in self.transformer_blocks:
            text, image = double(text, image, embedding, angles)
        tokens, both = text.shape[1], torch.cat([text, image], dim=1)
        for single in self.single_transformer_blocks:
            both = single(both, embedding, angles)
        scale, shift = _vectors(self.norm_out, embedding, 2)
        return self.proj_out(normalized(both[:, tokens:], shift, scale))
