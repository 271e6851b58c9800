"""Read digits of generated pictures with a tiny model that learns from real handwriting alone."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .pictures import Digits, draw
from .prompts import COLOURS, PALETTE

_HIDDEN = 96
_BATCH = 128


def features(pictures: torch.Tensor) -> torch.Tensor:
    """Reduce pictures [n, 3, 64, 64] in -1..1 to brightness float32 [n, 256] in 0..1 on a 16 x 16 grid."""
    return F.avg_pool2d((pictures.amax(1, keepdim=True) + 1) / 2, 4).flatten(1)


def train(digits: Digits, *, steps: int, seed: int, report: Callable[[int, float], None]) -> dict[str, np.ndarray]:
    """Train a 256-96-10 perceptron on freshly drawn digits; returns its weights as float16 arrays."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(256, _HIDDEN), nn.ReLU(), nn.Dropout(0.2), nn.Linear(_HIDDEN, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        pick = torch.randint(len(digits.labels), (_BATCH,), generator=generator)
        colours = torch.randint(len(COLOURS), (_BATCH,), generator=generator)
        loss = F.cross_entropy(model(features(draw(digits.pixels[pick], colours, generator))), digits.labels[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        report(step + 1, loss.item())
    arrays = {"hidden.weight": model[0].weight, "hidden.bias": model[0].bias}
    arrays |= {"out.weight": model[3].weight, "out.bias": model[3].bias}
    return {name: value.detach().numpy().astype(np.float16) for name, value in arrays.items()}


def read(weights: dict[str, np.ndarray], pictures: torch.Tensor) -> torch.Tensor:
    """Read the digits int64 [n] on pictures [n, 3, 64, 64] in -1..1."""
    w = {name: torch.from_numpy(value.astype(np.float32)) for name, value in weights.items()}
    hidden = F.relu(features(pictures) @ w["hidden.weight"].T + w["hidden.bias"])
    return (hidden @ w["out.weight"].T + w["out.bias"]).argmax(1)


def read_colours(pictures: torch.Tensor) -> torch.Tensor:
    """Name the colours int64 [n] of pictures [n, 3, 64, 64] by the nearest palette direction."""
    light = (pictures + 1) / 2
    weight = light.amax(1, keepdim=True) ** 4
    mean = (light * weight).sum((2, 3)) / weight.sum((2, 3))
    palette = torch.tensor([PALETTE[name] for name in COLOURS], dtype=torch.float32) / 255
    return torch.cdist(_chroma(mean), _chroma(palette)).argmin(1)


def _chroma(rgb: torch.Tensor) -> torch.Tensor:
    """Take lightness out of colours [n, 3] and scale to unit length; greys become the zero vector."""
    centred = rgb - rgb.mean(1, keepdim=True)
    length = centred.norm(dim=1, keepdim=True)
    return torch.where(length < 0.12, torch.zeros_like(centred), centred / length.clamp(min=1e-6))
