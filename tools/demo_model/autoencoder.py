"""The small AutoencoderKL: 64 x 64 RGB to 16 channels of 8 x 8, as FLUX's own does at scale 8."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .pictures import Digits, draw
from .prompts import COLOURS

KL_WEIGHT = 5e-4
_LEARNING_RATE = 2e-3


class Latents(NamedTuple):
    """Hold encoded pictures: normalised float16 [count, 16, 8, 8], labels and colours int64 [count]."""

    values: torch.Tensor
    labels: torch.Tensor
    colours: torch.Tensor


def build() -> AutoencoderKL:
    """Build the untrained autoencoder, 0.88 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
    )


def train(
    vae: AutoencoderKL, digits: Digits, *, steps: int, batch: int, seed: int, report: Callable[[int, float], None]
) -> float:
    """Train reconstruction with a light pull to the unit normal; return the mean loss of 50 last steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.05)
    losses: list[float] = []
    for step in range(steps):
        pick = torch.randint(len(digits.labels), (batch,), generator=generator)
        pictures = draw(digits.pixels[pick], torch.randint(len(COLOURS), (batch,), generator=generator), generator)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pictures).latent_dist
            latents = posterior.mean.float() + posterior.std.float() * torch.randn(posterior.mean.shape, generator=generator)
            decoded = vae.decode(latents).sample
        error = decoded.float() - pictures
        kl = posterior.kl().float().mean() / latents[0].numel()
        loss = error.abs().mean() + F.mse_loss(decoded.float(), pictures) + KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        report(step + 1, sum(losses[-50:]) / len(losses[-50:]))
    return sum(losses[-50:]) / len(losses[-50:])


@torch.inference_mode()
def encode(vae: AutoencoderKL, digits: Digits, *, copies: int, seed: int, report: Callable[[int], None]) -> Latents:
    """Encode every digit `copies` times in random colours and places; set scale and shift in the config."""
    generator = torch.Generator().manual_seed(seed)
    values, colours = [], []
    for _ in range(copies):
        for pixels in digits.pixels.split(128):
            chosen = torch.randint(len(COLOURS), (len(pixels),), generator=generator)
            pictures = draw(pixels, chosen, generator)
            with torch.autocast("cpu", torch.bfloat16):
                values.append(vae.encode(pictures).latent_dist.mean.float())
            colours.append(chosen)
            report(len(pixels))
    latents = torch.cat(values)
    shift, scale = latents.mean().item(), 1 / latents.std().item()
    vae.register_to_config(shift_factor=round(shift, 5), scaling_factor=round(scale, 5))
    normalised = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return Latents(normalised.half(), digits.labels.repeat(copies), torch.cat(colours))


@torch.inference_mode()
def peak_signal_to_noise(vae: AutoencoderKL, digits: Digits, *, seed: int) -> float:
    """Measure reconstruction of 128 freshly drawn digits in dB."""
    generator = torch.Generator().manual_seed(seed)
    pick = torch.randint(len(digits.labels), (128,), generator=generator)
    pictures = draw(digits.pixels[pick], torch.randint(len(COLOURS), (128,), generator=generator), generator)
    error = F.mse_loss(vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1), pictures)
    return -10 * torch.log10(error / 4).item()
