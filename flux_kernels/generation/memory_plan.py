"""Choose how to spread a pipeline over GPU and CPU memory, by arithmetic on bytes.

`generate` and `inspect` use the same.

Of every part of the pipeline four numbers count: the bytes of its weights, those of its largest layer, those of its largest
matrix once decoded, and the bytes of the activations that are alive at once while it runs. The activations follow from the
sizes of the picture:

- transformer: (image + text tokens) x LIVE_WIDTHS hidden widths. Counted on the CPU, allocation by allocation: 18.0.
- VAE: pixels x LIVE_VAE_WIDTHS x the channels that reach full resolution (256). Counted: 3.0, and one more for the
  workspace of a convolution library.
- T5: tokens x LIVE_WIDTHS hidden widths, and SCORE_BYTES for each attention score. Counted: 0.4 to 0.8 of that,
  by the release of transformers.

SLACK covers what a GPU's allocator cannot reuse. A step of the transformer alone, 1024 x 1024 on an H200, peaked at 7.45 GB in
Q4_K and 13.59 GB in Q8_0 where this arithmetic says 7.50 and 13.42 (bench/results/nvidia-h200/step.csv); a pipeline was not
measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

GIB = 2**30
# Of a card's memory; the rest is the desktop's.
USABLE = 0.95
# CUDA context and library workspaces; a measured amount of free memory is already without them.
CONTEXT_BYTES = GIB // 2
# Activations alive at once, in hidden widths a token: residual, q, k, v, MLP in and out, modulated copies.
LIVE_WIDTHS = 20
LIVE_VAE_WIDTHS = 4
# Position bias, scores and their softmax, alive at the same time.
SCORE_BYTES = 12
# Of the activations.
SLACK = 1.1
# Layers on the GPU at once under group offload: one computes while the next arrives.
PREFETCH = 2
# Side of a tile of the VAE of FLUX.1, where tiling is on.
TILE_PIXELS = 1024

OFFLOADS = {
    "none": "everything on the GPU (or on the CPU where there is no GPU)",
    "model": "one model at a time on the GPU: text encoders, transformer, VAE",
    "group": "one layer at a time, the next one arriving while it computes",
    "sequential": "one layer at a time, nothing ahead: slowest, least memory",
    "auto": "the first of these that fits the GPU's free memory",
}
"""What `offload` may be, in the order in which "auto" tries them."""

MODES = tuple(name for name in OFFLOADS if name != "auto")


@dataclass(frozen=True)
class Part:
    """Say what one model of a pipeline needs, in bytes.

    Attributes:
        name: as in the pipeline ("transformer", "text_encoder_2", "vae", ...).
        weights: all parameters and buffers.
        layer: parameters of its largest layer.
        working: activations alive at once while it runs, a decoded matrix included.
    """

    name: str
    weights: int
    layer: int
    working: int


@dataclass(frozen=True)
class MemoryPlan:
    """Hold what was chosen and why.

    Attributes:
        offload: a key of OFFLOADS other than "auto".
        tile_vae: whether the VAE must decode the picture in tiles.
        fits: whether the choice fits, by this arithmetic.
        needs: offload -> bytes of GPU memory, with the VAE as chosen.
        sentence: the choice in words, with its numbers.
    """

    offload: str
    tile_vae: bool
    fits: bool
    needs: dict[str, int]
    sentence: str


def transformer_working(width: int, tokens: int, *, batch: int = 1, itemsize: int = 2, decoded: int = 0) -> int:
    """Return the bytes of a transformer's activations, and of a decoded matrix.

    Args:
        width: of a hidden state, in channels.
        tokens: of image and text.
        batch: pictures at once.
        itemsize: bytes of an activation.
        decoded: bytes of the matrix.
    """
    return round(batch * tokens * LIVE_WIDTHS * width * itemsize * SLACK) + decoded


def text_working(width: int, heads: int, tokens: int, *, batch: int = 1, itemsize: int = 2, decoded: int = 0) -> int:
    """Return the bytes of a text encoder's activations."""
    return transformer_working(width, tokens, batch=batch, itemsize=itemsize, decoded=decoded) + round(
        batch * heads * tokens**2 * SCORE_BYTES * SLACK
    )


def vae_working(channels: int, width: int, height: int, *, batch: int = 1, itemsize: int = 2) -> int:
    """Return the bytes of a VAE's activations; `channels` reach full resolution."""
    return round(batch * width * height * LIVE_VAE_WIDTHS * channels * itemsize * SLACK)


def tiled(working: int, width: int, height: int) -> int:
    """Return the bytes of a VAE's activations when it decodes in tiles."""
    return round(working * min(1.0, TILE_PIXELS**2 / (width * height)))


def gpu_bytes(parts: Iterable[Part]) -> dict[str, int]:
    """Return offload -> bytes of GPU memory at the peak."""
    parts = list(parts)
    return {
        "none": sum(part.weights for part in parts) + max(part.working for part in parts),
        "model": max(part.weights + part.working for part in parts),
        "group": max(min(PREFETCH * part.layer, part.weights) + part.working for part in parts),
        "sequential": max(part.layer + part.working for part in parts),
    }


def plan_memory(parts: Iterable[Part], free: int, width: int, height: int) -> MemoryPlan:
    """Choose the first offload that fits; the VAE decodes in tiles only where nothing fits otherwise.

    Args:
        parts: the pipeline's models; the one named "vae" may be tiled.
        free: bytes of GPU memory that are free (`torch.cuda.mem_get_info()[0]`, or `free_on_card`).
        width: of the picture, in pixels.
        height: of the picture, in pixels.
    """
    parts = list(parts)
    small = [
        Part(part.name, part.weights, part.layer, tiled(part.working, width, height)) if part.name == "vae" else part
        for part in parts
    ]
    for tile_vae, tried in ((False, parts), (True, small)):
        needs = gpu_bytes(tried)
        fitting = next((mode for mode in MODES if needs[mode] <= free), None)
        if fitting:
            break
    offload, fits = fitting or MODES[-1], fitting is not None
    tile_vae = tile_vae and small != parts
    return MemoryPlan(offload, tile_vae, fits, needs, _sentence(offload, tile_vae, fits, needs, free, tried))


def free_on_card(card_gib: float) -> int:
    """Return the bytes that a card of so many GiB has free for a pipeline."""
    return int(card_gib * GIB * USABLE) - CONTEXT_BYTES


def _sentence(offload: str, tile_vae: bool, fits: bool, needs: Mapping[str, int], free: int, parts: Iterable[Part]) -> str:
    largest = max(parts, key=lambda part: part.weights + part.working).name
    words = {
        "none": "everything at once",
        "model": f"the largest model alone ({largest})",
        "group": "one layer and the next",
        "sequential": "one layer at a time",
    }
    tried = MODES[: MODES.index(offload) + 1]
    numbers = ", ".join(f"{words[mode]} needs {needs[mode] / GIB:.1f}" for mode in tried)
    text = f"{free / GIB:.1f} GiB of GPU memory are free; {numbers} GiB: offload {offload}"
    if tile_vae:
        text += ", and the VAE decodes in tiles"
    if not fits:
        text += ". That is more than is free, so it may run out of memory: take a smaller --width and --height"
    return f"{text}."


# Parameters of the published models that go with the transformer in a FLUX.1 pipeline.
_CLIP_PARAMETERS, _VAE_PARAMETERS, _T5_PARAMETERS = 123_060_480, 83_819_683, 4_762_310_656
T5_WIDTH, _T5_HEADS, _T5_TABLE, TEXT_TOKENS = 4096, 64, 32128 * 4096, 512
_CLIP_TABLE, _CLIP_WIDTH, _CLIP_HEADS, _CLIP_TOKENS = 49408 * 768, 768, 12, 77
_VAE_CHANNELS, _VAE_LAYER = 256, 512 * 512 * 9


def companions(width: int, height: int, t5_bits: float = 16.0) -> list[Part]:
    """Return the other parts of a FLUX.1 pipeline for one picture, its T5 at so many bits per weight."""
    return [
        Part("text_encoder", 2 * _CLIP_PARAMETERS, 2 * _CLIP_TABLE, text_working(_CLIP_WIDTH, _CLIP_HEADS, _CLIP_TOKENS)),
        Part(
            "text_encoder_2",
            round(_T5_PARAMETERS * t5_bits / 8),
            round(_T5_TABLE * t5_bits / 8),
            text_working(T5_WIDTH, _T5_HEADS, TEXT_TOKENS),
        ),
        Part("vae", 2 * _VAE_PARAMETERS, 2 * _VAE_LAYER, vae_working(_VAE_CHANNELS, width, height)),
    ]
