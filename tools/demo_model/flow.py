"""Train the FluxTransformer2DModel: flow matching on latents, then guidance distillation."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel

from flux_kernels.files import written_whole

from .autoencoder import Latents
from .prompts import Request
from .text import LENGTH, PromptTable

GUIDANCE_RANGE = (1.0, 5.0)
_BASE_RATE, _DISTIL_RATE = 1.5e-3, 4e-4
_NO_DIGIT, _NO_COLOUR, _NOTHING = 0.04, 0.25, 0.08
_EMA = 0.997
_SAVE_EVERY = 50


class Plan(NamedTuple):
    """Say how long to train: flow-matching steps, then distillation steps, at one batch size."""

    base_steps: int
    distil_steps: int
    batch: int
    seed: int


class Batch(NamedTuple):
    """Hold a step's inputs: noisy, target float32 [b, 16, 64], sigma, guidance [b], prompt rows [b]."""

    noisy: torch.Tensor
    target: torch.Tensor
    sigma: torch.Tensor
    guidance: torch.Tensor
    rows: torch.Tensor


def build(seed: int) -> FluxTransformer2DModel:
    """Build the untrained transformer, 4.96 M parameters, with gates and output that start at zero."""
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=256,
        pooled_projection_dim=256,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )
    silent = [model.norm_out.linear, model.proj_out]
    silent += [linear for block in model.transformer_blocks for linear in (block.norm1.linear, block.norm1_context.linear)]
    silent += [block.norm.linear for block in model.single_transformer_blocks]
    for linear in silent:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return model


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Pack latents [b, 16, 8, 8] into tokens [b, 16, 64], in FluxPipeline's order."""
    b = latents.shape[0]
    return latents.view(b, 16, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, 16, 64)


def _image_ids() -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    return torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], 1)


def velocity(
    model: FluxTransformer2DModel, batch: Batch, table: PromptTable, rows: torch.Tensor, guidance: torch.Tensor
) -> torch.Tensor:
    """Predict velocity float32 [b, 16, 64] for the prompts in `rows`, computing in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        out = model(
            batch.noisy,
            table.tokens[rows],
            table.pooled[rows],
            batch.sigma,
            _image_ids(),
            torch.zeros(LENGTH, 3),
            guidance=guidance,
            return_dict=False,
        )[0]
    return out.float()


def _choose_rows(digits: torch.Tensor, colours: torch.Tensor, table: PromptTable, generator: torch.Generator) -> torch.Tensor:
    """Pick a prompt for each picture, leaving out digit, colour or both now and then."""
    luck = torch.rand(4, len(digits), generator=generator).tolist()
    rows = []
    for index, (digit, colour) in enumerate(zip(digits.tolist(), colours.tolist(), strict=True)):
        nothing, without_digit, without_colour, choice = (values[index] for values in luck)
        request = Request(
            None if without_digit < _NO_DIGIT or nothing < _NOTHING else digit,
            None if (without_colour < _NO_COLOUR and without_digit >= _NO_DIGIT) or nothing < _NOTHING else colour,
        )
        group = table.rows[request]
        rows.append(group[int(choice * len(group))])
    return torch.tensor(rows)


def draw_batch(latents: Latents, table: PromptTable, size: int, generator: torch.Generator) -> Batch:
    """Draw pictures, prompts, noise levels (70 % logit-normal, 30 % uniform) and guidance for one step."""
    pick = torch.randint(len(latents.labels), (size,), generator=generator)
    clean = pack(latents.values[pick].float())
    noise = torch.randn(clean.shape, generator=generator)
    uniform = torch.rand(size, generator=generator)
    sigma = torch.where(torch.rand(size, generator=generator) < 0.7, torch.randn(size, generator=generator).sigmoid(), uniform)
    level = sigma.view(-1, 1, 1)
    low, high = GUIDANCE_RANGE
    rows = _choose_rows(latents.labels[pick], latents.colours[pick], table, generator)
    return Batch(
        torch.lerp(clean, noise, level),
        noise - clean,
        sigma,
        low + (high - low) * torch.rand(size, generator=generator),
        rows,
    )


@torch.no_grad()
def _guided(teacher: FluxTransformer2DModel, batch: Batch, table: PromptTable) -> torch.Tensor:
    """Compute the teacher's guided prediction [b, 16, 64]; the empty prompt's rows stay plain."""
    ones = torch.ones_like(batch.guidance)
    nothing = torch.full_like(batch.rows, table.rows[Request(None, None)][0])
    without = velocity(teacher, batch, table, nothing, ones)
    asked = velocity(teacher, batch, table, batch.rows, ones)
    return without + batch.guidance.view(-1, 1, 1) * (asked - without)


def _rate(step: int, plan: Plan) -> float:
    if step < plan.base_steps:
        progress = step / plan.base_steps
        fall = 1.0 if progress < 0.5 else 0.5 + 0.5 * math.cos(math.pi * (progress - 0.5) / 0.5)
        return _BASE_RATE * min(1.0, (step + 1) / 50) * max(fall, 0.02)
    progress = (step - plan.base_steps) / max(1, plan.distil_steps)
    return _DISTIL_RATE * max(0.5 + 0.5 * math.cos(math.pi * progress), 0.02)


class _State:
    """Hold all a run needs to go on: model, running average, teacher, optimizer, step and loss."""

    def __init__(self, plan: Plan) -> None:
        self.model, self.average, self.teacher = (build(plan.seed) for _ in range(3))
        self.average.requires_grad_(False)
        self.teacher.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        self.step, self.loss, self.seconds = 0, float("nan"), 0.0

    def save(self, path: Path) -> None:
        parts = {name: getattr(self, name).state_dict() for name in ("model", "average", "teacher", "optimizer")}
        with written_whole(path) as part:
            torch.save({**parts, "step": self.step, "loss": self.loss, "seconds": self.seconds}, part)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for name in ("model", "average", "teacher", "optimizer"):
            getattr(self, name).load_state_dict(saved[name])
        self.step, self.loss, self.seconds = saved["step"], saved["loss"], saved["seconds"]

    def begin_distillation(self) -> None:
        self.teacher.load_state_dict(self.average.state_dict())
        self.model.load_state_dict(self.average.state_dict())

    def blend(self) -> None:
        keep = min(_EMA, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(now, 1 - keep)


def _advance(state: _State, plan: Plan, latents: Latents, table: PromptTable) -> float:
    """Take one step and return its loss; steps have seeds of their own, so a resumed run repeats."""
    generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + state.step)
    batch = draw_batch(latents, table, plan.batch, generator)
    distilling = state.step >= plan.base_steps
    target = _guided(state.teacher, batch, table) if distilling else batch.target
    for group in state.optimizer.param_groups:
        group["lr"] = _rate(state.step, plan)
    loss = F.mse_loss(velocity(state.model, batch, table, batch.rows, batch.guidance), target)
    state.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
    state.optimizer.step()
    state.step += 1
    state.blend()
    return loss.item()


def train(
    plan: Plan, latents: Latents, table: PromptTable, checkpoint: Path, report: Callable[[int, float], None]
) -> tuple[FluxTransformer2DModel, float, float]:
    """Train, from `checkpoint` where it exists; return the averaged model, last base loss, seconds."""
    state = _State(plan)
    if checkpoint.exists():
        state.load(checkpoint)
    total = plan.base_steps + plan.distil_steps
    began = time.monotonic() - state.seconds
    while state.step < total:
        if state.step == plan.base_steps:
            state.begin_distillation()
        distilling = state.step >= plan.base_steps
        loss = _advance(state, plan, latents, table)
        if not distilling:
            state.loss = loss if math.isnan(state.loss) else 0.98 * state.loss + 0.02 * loss
        report(state.step, loss if distilling else state.loss)
        state.seconds = time.monotonic() - began
        if state.step % _SAVE_EVERY == 0 or state.step == total:
            state.save(checkpoint)
    return state.average, state.loss, state.seconds
