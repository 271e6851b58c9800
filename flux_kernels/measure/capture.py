"""Capture states: what the transformer is given at one random step of each run of the pipeline."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError
from ..generation.embedded import EMBEDDED_PROMPTS, PIPELINE_KWARGS
from ..mixed.world import World
from .measured_model import open_pipeline
from .request import SIZES, STATES, Progress, Request, Size
from .state_inputs import call_inputs, clone, velocity_of
from .states import State, States

_POLL_SECONDS = 0.5
# What transformers call the noise level.
_TIMES = ("timestep", "t")


def captured_states(request: Request, world: World, model: nn.Module, sha256: str, progress: Progress) -> States:
    """Return the states of the file, which is written first where it is missing.

    The first process captures them, the others wait for the file.

    Raises:
        FormatError: where the file holds states of another model, or others than the request asks for.
    """
    path = request.states_path
    if not path.exists() and world.rank == 0:
        States(_capture_for(request, model, progress), request.source.name, sha256).save(path)
    while not path.exists():
        progress("waiting for the first process to capture states", 0, 0)
        time.sleep(_POLL_SECONDS)
    states = States.load(path)
    if states.source_sha256 != sha256:
        raise FormatError(
            f"{path} was captured with another model ({states.model}, sha256 {states.source_sha256[:12]}..., this one has "
            f"{sha256[:12]}...). Remove it to capture anew, or choose another --states-file."
        )
    unlike = states.unlike(request.count, request.prompts, request.sizes, request.steps, request.seed)
    if unlike:
        raise FormatError(
            f"{path} is there already and holds {unlike}. Leave the options of capturing out to measure on it, or give another "
            "--out (or --states-file) to capture anew."
        )
    return states


def _capture_for(request: Request, model: nn.Module, progress: Progress) -> list[State]:
    pipeline, settings = open_pipeline(request.source, model)
    if request.steps is not None:
        settings["num_inference_steps"] = request.steps
    own_sizes = [(PIPELINE_KWARGS["width"], PIPELINE_KWARGS["height"])] if request.source.embedded else SIZES
    count = request.count or STATES
    return capture(
        pipeline,
        request.prompts or EMBEDDED_PROMPTS,
        count,
        settings=settings,
        sizes=request.sizes or own_sizes,
        seed=request.seed or 0,
        on_state=lambda done: progress("capturing states", done, count),
    )


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
    """Draw `count` pictures up to a random step each; return the transformer's inputs and output there.

    Prompts and sizes are drawn at random without repeating one before all had their turn; steps likewise, so that they are
    spread evenly over the run. Every picture has noise of its own, seeded with `seed`, `seed` + 1, ...

    Args:
        pipeline: around the unquantized transformer, such as a FluxPipeline.
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
    times: list[Tensor] = []

    def keep(model: nn.Module, arguments: tuple, named: dict[str, Any], output: Any) -> None:
        tensors, others = call_inputs(model, arguments, named)
        time = next(tensors[name] for name in _TIMES if name in tensors)
        if not times or not torch.equal(times[-1], time):
            times.append(time)
        # A step with guidance may call twice, the prompt's call first.
        if len(times) == step + 1 and not kept:
            kept.update(inputs=tensors, others=others, velocity=clone(velocity_of(output)))
            # The pipeline's own switch: the steps that remain are not run.
            pipeline._interrupt = True

    hook = pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        with torch.inference_mode():
            # By name: the first argument of some pipelines is a picture.
            pipeline(prompt=prompt, generator=torch.Generator("cpu").manual_seed(seed), output_type="latent", **settings)
    finally:
        hook.remove()
    sigmas = pipeline.scheduler.sigmas
    return State(
        inputs=kept["inputs"],
        others=kept["others"],
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


def read_prompts(path: Path) -> list[str]:
    """Read a prompts file: one a line; empty lines and lines that begin with # do not count."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise FormatError(f"{path} holds no prompts. Write one a line.")
    return prompts
