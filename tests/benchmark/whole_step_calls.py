"""List every linear call of a FLUX.1-dev step: those inside the blocks, and the ten around them.

At 1024 x 1024 with 512 text tokens they are 504 calls and 59.51 TFLOP.
"""

from __future__ import annotations

from flux_kernels.benchmark.shapes import LATENT, POOLED, SINUSOID, TEXT_WIDTH
from flux_kernels.models.calls import TEXT, WIDTH, Call, image_tokens, step_calls


def around_calls(width: int = 1024, height: int = 1024, batch: int = 1) -> list[Call]:
    """List the calls outside the blocks, which published files keep in 16 bit: embedders and final layer."""
    image = batch * image_tokens(width, height)
    return [
        Call(image, WIDTH, LATENT, 1, "x_embedder"),
        Call(batch * TEXT, WIDTH, TEXT_WIDTH, 1, "context_embedder"),
        Call(batch, WIDTH, SINUSOID, 2, "timestep and guidance in"),
        Call(batch, WIDTH, POOLED, 1, "pooled text in"),
        Call(batch, WIDTH, WIDTH, 3, "timestep, guidance, text out"),
        Call(batch, 2 * WIDTH, WIDTH, 1, "norm_out"),
        Call(image, LATENT, WIDTH, 1, "proj_out"),
    ]


def whole_step(width: int = 1024, height: int = 1024, batch: int = 1) -> list[Call]:
    """List every linear call of one step, with its count."""
    return step_calls(width, height, batch) + around_calls(width, height, batch)
