"""Every linear call of one FLUX.1-dev step, as data: (M, N, K) with the number of calls.

They depend on picture size and batch. Source: the transformer's config (19 double and 38 single blocks, width 3072, MLP 12288, 512 text tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

# In each direction: the VAE shrinks by 8, the transformer takes 2 x 2 of what is left.
PIXELS_A_TOKEN = 16
WIDTH, MLP, TEXT, DOUBLE, SINGLE = 3072, 12288, 512, 19, 38


@dataclass(frozen=True)
class Call:
    """Name one kind of linear call: x [M, K] times w [N, K], `calls` times a step."""

    m: int
    n: int
    k: int
    calls: int
    where: str

    @property
    def flops(self) -> int:
        """Floating-point operations of one call."""
        return 2 * self.m * self.n * self.k


def image_tokens(width: int, height: int) -> int:
    """Return how many tokens a picture of so many pixels becomes."""
    return (width // PIXELS_A_TOKEN) * (height // PIXELS_A_TOKEN)


def step_calls(width: int = 1024, height: int = 1024, batch: int = 1) -> list[Call]:
    """List the calls inside the blocks and their modulation for one step.

    The embedders and the final layer are 0.1 % of it.
    """
    image, text = batch * image_tokens(width, height), batch * TEXT
    both = image + text
    return [
        Call(both, WIDTH, WIDTH + MLP, SINGLE, "single proj_out"),
        Call(both, MLP, WIDTH, SINGLE, "single proj_mlp"),
        Call(both, WIDTH, WIDTH, 3 * SINGLE, "single q, k, v"),
        Call(image, WIDTH, WIDTH, 4 * DOUBLE, "double q, k, v, out"),
        Call(image, MLP, WIDTH, DOUBLE, "double ff in"),
        Call(image, WIDTH, MLP, DOUBLE, "double ff out"),
        Call(text, WIDTH, WIDTH, 4 * DOUBLE, "text q, k, v, out"),
        Call(text, MLP, WIDTH, DOUBLE, "text ff in"),
        Call(text, WIDTH, MLP, DOUBLE, "text ff out"),
        Call(batch, 6 * WIDTH, WIDTH, 2 * DOUBLE, "double modulation"),
        Call(batch, 3 * WIDTH, WIDTH, SINGLE, "single modulation"),
    ]


STEPS = {
    "1024x1024": dict(width=1024, height=1024),
    "512x512": dict(width=512, height=512),
    "1360x768": dict(width=1360, height=768),
    "2048x2048": dict(width=2048, height=2048),
    "1024x1024 batch 2": dict(width=1024, height=1024, batch=2),
}
