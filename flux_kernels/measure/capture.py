"""Capture states: run the pipeline on prompts, and keep what the transformer was given at one random step of each run."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError
from .states import PER_PICTURE, SHARED, State

Size = tuple[int, int]  # width, height in pixels


def capture(
    pipeline: Any,
    prompts: Sequence[str],
    count: int,
    *,
    settings: Mapping[str, Any],
    sizes: Sequence[Size],
    seed: int = 0,
    on_state: Callable[[int], None] = lambda done: None,
) -> list[State]:
    """Draw `count` pictures up to a random step each, and return the transformer's inputs and output there.

    Prompts and sizes are drawn at random without repeating one before all had their turn; steps likewise, so that they are
    spread evenly over the run. Every picture has noise of its own, seeded with `seed`, `seed` + 1, ...

    Args:
        pipeline: a FluxPipeline around the unquantized transformer.
        prompts: to choose from.
        count: of states.
        settings: arguments of the pipeline call, `num_inference_steps` among them.
        sizes: (width, height) in pixels, to choose from.
        seed: of the choices and of the first picture's noise.
        on_state: called after each state with the number of states so far.

    Raises:
        FormatError: where there are no prompts or no sizes, or `count` is not positive.
    """
    if not prompts or not sizes or count < 1:
        raise FormatError(f"capture needs prompts, sizes and a count, got {len(prompts)}, {len(sizes)} and {count}.")
    choice = random.Random(seed)
    steps = settings["num_inference_steps"]
    plan = zip(_turns(choice, prompts, count), _turns(choice, sizes, count), _turns(choice, range(steps), count), strict=True)
    states: list[State] = []
    for number, (prompt, size, step) in enumerate(plan):
        call = {**settings, "width": size[0], "height": size[1]}
        states.append(_capture_one(pipeline, prompt, step, seed + number, call))
        on_state(len(states))
    return states


def _turns(choice: random.Random, options: Sequence[Any], count: int) -> list[Any]:
    """Return `count` options in random order, each as often as any other, give or take one."""
    taken: list[Any] = []
    while len(taken) < count:
        taken += choice.sample(options, len(options))
    return taken[:count]


def _capture_one(pipeline: Any, prompt: str, step: int, seed: int, settings: dict[str, Any]) -> State:
    kept: dict[str, Any] = {}
    calls = 0

    def keep(_module: nn.Module, _arguments: tuple, given: dict[str, Any], output: Any) -> None:
        nonlocal calls
        if calls == step:
            kept["inputs"] = {name: _clone(given[name]) for name in (*PER_PICTURE, *SHARED) if given.get(name) is not None}
            kept["velocity"] = _clone(output[0])
            pipeline._interrupt = True  # the pipeline's own switch: the steps that remain are not run
        calls += 1

    hook = pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        with torch.inference_mode():
            pipeline(prompt, generator=torch.Generator("cpu").manual_seed(seed), output_type="latent", **settings)
    finally:
        hook.remove()
    sigmas = pipeline.scheduler.sigmas
    return State(
        inputs=kept["inputs"],
        velocity=kept["velocity"],
        prompt=prompt,
        seed=seed,
        width=settings["width"],
        height=settings["height"],
        step=step,
        steps=settings["num_inference_steps"],
        sigma=sigmas[step].item(),
        dsigma=(sigmas[step] - sigmas[step + 1]).item(),
    )


def _clone(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU that is no inference tensor."""
    with torch.inference_mode(False):
        return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach().to("cpu", copy=True))


def read_prompts(path: Path) -> list[str]:
    """Read a prompts file: one a line; empty lines and lines that begin with # do not count."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise FormatError(f"{path} holds no prompts. Write one a line.")
    return prompts
