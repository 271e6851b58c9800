"""FLUX.1's transformer in plain torch, with linear layers of the caller's choice: one whole step without diffusers.

Module names are those of diffusers' FluxTransformer2DModel, so that weights and name patterns fit both; a test compares
the two. Source: diffusers' FluxTransformer2DModel, read for the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...flux.calls import MLP, WIDTH
from ..shapes import SINUSOID
from .inputs import FLUX_DEV, StepConfig, StepInputs

MakeLinear = Callable[[str, int, int], nn.Module]  # (name, N, K) -> the layer
_EPS, _THETA, _MAX_PERIOD = 1e-6, 1e4, 1e4
_MLP_RATIO = MLP // WIDTH


def rotary(positions: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [tokens, head size] of the rotary angles: neighbours form a pair, each axis has its share of them."""
    angles = []
    for axis, size in enumerate(axes):
        rates = _THETA ** -(torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size)
        angles.append(torch.outer(positions[:, axis].double(), rates).repeat_interleave(2, dim=1))
    whole = torch.cat(angles, dim=1)
    return whole.cos().float(), whole.sin().float()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
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


class Modulation(nn.Module):
    """Map the embedding of time, guidance and text to `parts` vectors [B, 1, width]."""

    def __init__(self, make: MakeLinear, name: str, width: int, parts: int):
        super().__init__()
        self.parts, self.linear = parts, make(f"{name}.linear", parts * width, width)

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(embedding)).unsqueeze(1).chunk(self.parts, dim=-1)


class TwoLinears(nn.Module):
    """Hold an embedder: linear, SiLU, linear."""

    def __init__(self, make: MakeLinear, name: str, width: int, k: int):
        super().__init__()
        self.linear_1, self.linear_2 = make(f"{name}.linear_1", width, k), make(f"{name}.linear_2", width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class LinearGelu(nn.Module):
    """Hold the first half of an MLP: linear, GELU."""

    def __init__(self, proj: nn.Module):
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Hold a double block's MLP, numbered as diffusers does it."""

    def __init__(self, make: MakeLinear, name: str, width: int):
        super().__init__()
        first = LinearGelu(make(f"{name}.net.0.proj", _MLP_RATIO * width, width))
        self.net = nn.ModuleList([first, nn.Identity(), make(f"{name}.net.2", width, _MLP_RATIO * width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class Attention(nn.Module):
    """Hold joint attention: of both streams with weights of their own (double), or of their concatenation."""

    to_add_out: nn.Module

    def __init__(self, make: MakeLinear, name: str, config: StepConfig, double: bool):
        super().__init__()
        self.head = config.attention_head_dim
        plain = ("to_q", "to_k", "to_v") + (("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out") if double else ())
        for layer in plain:
            self.add_module(layer, make(f"{name}.{layer}", config.width, config.width))
        if double:
            self.to_out = nn.ModuleList([make(f"{name}.to_out.0", config.width, config.width)])
        for norm in ("norm_q", "norm_k") + (("norm_added_q", "norm_added_k") if double else ()):
            self.add_module(norm, nn.RMSNorm(self.head, eps=_EPS))

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], text: Tensor | None = None) -> Tensor:
        """Return the heads' results [B, tokens, width], text tokens first; double blocks pass them to `out`."""
        q, k, v = self._heads(x, self.to_q, self.to_k, self.to_v, self.norm_q, self.norm_k)
        if text is not None:
            projections = (self.add_q_proj, self.add_k_proj, self.add_v_proj, self.norm_added_q, self.norm_added_k)
            q, k, v = (torch.cat(pair, dim=2) for pair in zip(self._heads(text, *projections), (q, k, v)))
        mixed = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v)
        return mixed.transpose(1, 2).flatten(2)

    def out(self, mixed: Tensor, text: bool = False) -> Tensor:
        """Project one stream's part of the heads' results (double blocks)."""
        return self.to_add_out(mixed) if text else self.to_out[0](mixed)

    def _heads(self, x: Tensor, to_q, to_k, to_v, norm_q, norm_k) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (layer(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer in (to_q, to_k, to_v))
        return norm_q(q), norm_k(k), v


class DoubleBlock(nn.Module):
    """Attend over both streams, then pass each through its MLP."""

    def __init__(self, make: MakeLinear, name: str, config: StepConfig):
        super().__init__()
        self.norm1 = Modulation(make, f"{name}.norm1", config.width, 6)
        self.norm1_context = Modulation(make, f"{name}.norm1_context", config.width, 6)
        self.attn = Attention(make, f"{name}.attn", config, double=True)
        self.ff = FeedForward(make, f"{name}.ff", config.width)
        self.ff_context = FeedForward(make, f"{name}.ff_context", config.width)

    def forward(self, text: Tensor, image: Tensor, embedding: Tensor, angles) -> tuple[Tensor, Tensor]:
        of_image, of_text = self.norm1(embedding), self.norm1_context(embedding)
        mixed = self.attn(normalized(image, *of_image[:2]), angles, normalized(text, *of_text[:2]))
        # Slices of one tensor: contiguous, as every linear wants them and diffusers makes them.
        mixed_text, mixed_image = mixed[:, : text.shape[1]].contiguous(), mixed[:, text.shape[1] :].contiguous()
        image = _second_half(image, self.attn.out(mixed_image), of_image, self.ff)
        text = _second_half(text, self.attn.out(mixed_text, text=True), of_text, self.ff_context)
        return text, image


def _second_half(x: Tensor, attended: Tensor, modulation: tuple[Tensor, ...], mlp: nn.Module) -> Tensor:
    gate, shift_mlp, scale_mlp, gate_mlp = modulation[2:]
    x = x + gate * attended
    return x + gate_mlp * mlp(normalized(x, shift_mlp, scale_mlp))


class SingleBlock(nn.Module):
    """Attend and run the MLP side by side over the concatenated streams, and project both together."""

    def __init__(self, make: MakeLinear, name: str, config: StepConfig):
        super().__init__()
        width = config.width
        self.norm = Modulation(make, f"{name}.norm", width, 3)
        self.attn = Attention(make, f"{name}.attn", config, double=False)
        self.proj_mlp = make(f"{name}.proj_mlp", _MLP_RATIO * width, width)
        self.proj_out = make(f"{name}.proj_out", width, (1 + _MLP_RATIO) * width)

    def forward(self, x: Tensor, embedding: Tensor, angles) -> Tensor:
        shift, scale, gate = self.norm(embedding)
        y = normalized(x, shift, scale)
        mlp = F.gelu(self.proj_mlp(y), approximate="tanh")
        return x + gate * self.proj_out(torch.cat([self.attn(y, angles), mlp], dim=-1))


class TimeTextEmbedding(nn.Module):
    """Sum the embeddings of time, guidance and pooled text."""

    def __init__(self, make: MakeLinear, config: StepConfig):
        super().__init__()
        name, width = "time_text_embed", config.width
        self.timestep_embedder = TwoLinears(make, f"{name}.timestep_embedder", width, SINUSOID)
        self.guidance_embedder = TwoLinears(make, f"{name}.guidance_embedder", width, SINUSOID)
        self.text_embedder = TwoLinears(make, f"{name}.text_embedder", width, config.pooled_projection_dim)

    def forward(self, time: Tensor, guidance: Tensor, pooled: Tensor) -> Tensor:
        time, guidance = (sinusoid(1000 * value).to(pooled.dtype) for value in (time, guidance))
        return self.timestep_embedder(time) + self.guidance_embedder(guidance) + self.text_embedder(pooled)


class StepModel(nn.Module):
    """Run one step: the whole transformer, its linear layers made by `make` in the order of their use."""

    def __init__(self, make: MakeLinear, config: StepConfig = FLUX_DEV):
        super().__init__()
        width = config.width
        self.config = config
        self.time_text_embed = TimeTextEmbedding(make, config)
        self.context_embedder = make("context_embedder", width, config.joint_attention_dim)
        self.x_embedder = make("x_embedder", width, config.in_channels)
        self.transformer_blocks = nn.ModuleList(
            DoubleBlock(make, f"transformer_blocks.{i}", config) for i in range(config.num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(make, f"single_transformer_blocks.{i}", config) for i in range(config.num_single_layers)
        )
        self.norm_out = Modulation(make, "norm_out", width, 2)
        self.proj_out = make("proj_out", config.in_channels, width)

    def forward(self, inputs: StepInputs) -> Tensor:
        """Return the predicted velocity [B, image tokens, latent]."""
        embedding = self.time_text_embed(inputs.time, inputs.guidance, inputs.pooled)
        text, image = self.context_embedder(inputs.text), self.x_embedder(inputs.image)
        angles = rotary(inputs.positions, self.config.axes_dims_rope)
        for double in self.transformer_blocks:
            text, image = double(text, image, embedding, angles)
        tokens, both = text.shape[1], torch.cat([text, image], dim=1)
        for single in self.single_transformer_blocks:
            both = single(both, embedding, angles)
        scale, shift = self.norm_out(embedding)
        return self.proj_out(normalized(both[:, tokens:], shift, scale))
