"""What the sides and the kinds of runs are called: in rows, in sentences, and in figures."""

from __future__ import annotations

from typing import NamedTuple

from ..report.plot_style import BLUE, GREEN, INK, ORANGE, RED

# Begins the name of every side of this library; a compute mode or an algorithm follows
OURS = "ours "
TORCH, DIFFUSERS, EXACT = "torch", "diffusers", "ours exact"
WRONG, FAILED = "wrong result: ", "failed: "  # begin the notes of sides that gave a wrong result or raised


class Side(NamedTuple):
    """Name one side for people, and its colour and mark in every figure."""

    label: str
    color: str
    mark: str


class Kind(NamedTuple):
    """Name one kind of whole run: as the subject of a sentence, and as the title of a panel."""

    subject: str
    title: str


SIDES = {
    TORCH: Side("not quantized (torch)", INK, "s"),
    DIFFUSERS: Side("diffusers' GGUF layers", ORANGE, "^"),
    "diffusers compiled": Side("diffusers' layers, compiled", "#a85f00", "v"),
    "dequantize": Side("decode, then multiply", "#9a8f00", "D"),
    EXACT: Side("flux_kernels exact", BLUE, "o"),
    "ours fp16_accumulate": Side("flux_kernels fp16_accumulate", GREEN, "d"),
    "ours int8": Side("flux_kernels int8", RED, "X"),
}
KINDS = {
    "step": Kind("One whole step", "one step of FLUX.1-dev"),
    "embedded step": Kind("One step of the tiny embedded model", "one step of the tiny embedded model"),
    "denoising": Kind("A denoising run of the embedded model", "pictures of the tiny embedded model"),
    "denoising, model offload": Kind(
        "A denoising run of the embedded model with model offload", "the same, with model offload"
    ),
}
STEP, EMBEDDED_STEP, DENOISING, OFFLOADED = KINDS


def wrong(error: float, gate: float) -> str:
    """Return the note of a side whose relative error is larger than it may be."""
    return f"{WRONG}relative error {error:.2g}, at most {gate:.2g}"


def label(provider: str) -> str:
    """Return a side's name for people."""
    return SIDES[provider].label if provider in SIDES else provider


def way_of(provider: str) -> str:
    """Return the compute mode or algorithm of one of our sides, and the name of another as it is."""
    return provider.removeprefix(OURS)
