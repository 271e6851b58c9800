"""Captured states: inputs of the transformer from real denoising runs, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FormatError
from ..files import file_sha256, written_whole
from .state_inputs import as_arguments

SCHEMA = "flux_kernels.states/1"
# Of a token.
_LATENT_PIXELS = 4
# Tokens that run together, at most; a larger picture runs alone.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass(frozen=True)
class State:
    """Hold one sampled step of one denoising run.

    Attributes:
        inputs: tensors of the transformer's call (see state_inputs.py), those without the batch first are of all pictures of
            one size.
        velocity: what the unquantized transformer returned, [batch, image tokens, channels] for most.
        prompt: of the picture.
        seed: of its noise.
        width: in pixels.
        height: in pixels.
        step: index of the sampled step.
        steps: of the whole run.
        sigma: noise level at the step.
        dsigma: how far the step moves sigma, positive.
        others: arguments of the call that are no tensors.
    """

    inputs: dict[str, Tensor]
    velocity: Tensor
    prompt: str
    seed: int
    width: int
    height: int
    step: int
    steps: int
    sigma: float
    dsigma: float
    others: dict[str, Any] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return all that is not a tensor."""
        left_out = ("inputs", "velocity") if self.others else ("inputs", "velocity", "others")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the inputs that all pictures of one size share: those without the batch first."""
        batch = self.velocity.shape[0]
        return tuple(name for name, tensor in self.inputs.items() if not tensor.dim() or tensor.shape[0] != batch)

    @property
    def runs_alone(self) -> bool:
        """Whether its inputs cannot be joined with those of another state."""
        return bool(self.others) or self.velocity.shape[0] != 1 or any("." in name for name in self.inputs)

    @property
    def tokens(self) -> int:
        """Number of image and text tokens of one picture; the text of inputs that run alone may be left out."""
        _, *sizes = self.velocity.shape
        # Latents [channels, ..., height, width] become tokens of 2 x 2.
        image = sizes[0] if len(sizes) == 2 else prod(sizes[1:]) // _LATENT_PIXELS
        text = self.inputs.get("encoder_hidden_states")
        return image + (0 if text is None else text.shape[1])


@dataclass
class States:
    """Hold captured states and what they were captured from.

    Attributes:
        items: the states.
        model: name of the model's file.
        source_sha256: of that file's bytes.
        sha256: of the states file, once saved or loaded.
    """

    items: list[State]
    model: str
    source_sha256: str
    sha256: str = field(default="", compare=False)

    def save(self, path: Path) -> None:
        """Write the states; the file is complete before it takes its name."""
        tensors = {}
        for number, state in enumerate(self.items):
            for name, tensor in {**state.inputs, "velocity": state.velocity}.items():
                tensors[f"{number}.{name}"] = tensor.contiguous().cpu()
        facts = dict(model=self.model, source_sha256=self.source_sha256, states=[state.facts() for state in self.items])
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as part:
            # One key: several have no fixed order.
            save_file(tensors, part, {SCHEMA: json.dumps(facts, ensure_ascii=False)})
        self.sha256 = file_sha256(path)

    @classmethod
    def load(cls, path: Path) -> States:
        """Read states; raise FormatError where the file holds none of this schema."""
        try:
            with safe_open(path, framework="pt") as stored:
                about = (stored.metadata() or {}).get(SCHEMA, "")
                tensors = {name: stored.get_tensor(name) for name in (stored.keys() if about else ())}
        except SafetensorError as error:
            raise FormatError(f"{path} is no file of captured states ({error}). Remove it; `measure` captures anew.") from None
        if not tensors:
            raise FormatError(f"{path} holds no captured states of the schema {SCHEMA}. Remove it; `measure` captures anew.")
        facts = json.loads(about)
        items = []
        for number, state in enumerate(facts["states"]):
            own = {name.removeprefix(f"{number}."): tensors[name] for name in tensors if name.startswith(f"{number}.")}
            items.append(State(own, own.pop("velocity"), **state))
        return cls(items, facts["model"], facts["source_sha256"], file_sha256(path))

    def unlike(
        self,
        count: int | None = None,
        prompts: Collection[str] | None = None,
        sizes: Collection[tuple[int, int]] = (),
        steps: int | None = None,
        seed: int | None = None,
    ) -> str | None:
        """Say in which way such a capture would give other states, or None; what is not given does not count."""
        if count is not None and len(self.items) != count:
            return f"{len(self.items)} states, not {count}"
        for state in self.items:
            if prompts is not None and state.prompt not in prompts:
                return f"states of another prompt, {state.prompt!r}"
            if sizes and (state.width, state.height) not in sizes:
                return f"states of {state.width}x{state.height} pixels"
            if steps is not None and state.steps != steps:
                return f"states of runs of {state.steps} steps, not {steps}"
        if seed is not None and self.items[0].seed != seed:
            return f"states from seed {self.items[0].seed} on, not {seed}"
        return None

    @property
    def prompts(self) -> list[str]:
        """The prompts of all states, each once."""
        return sorted({state.prompt for state in self.items})

    def summary(self) -> dict[str, Any]:
        """Return what a cost table says about its states."""
        sizes = sorted({f"{state.width}x{state.height}" for state in self.items})
        return dict(count=len(self.items), sha256=self.sha256, steps=self.items[0].steps, sizes=sizes)


@dataclass(frozen=True)
class Batch:
    """Hold states of one size that run together: their indices, and the transformer's keyword arguments."""

    indices: list[int]
    inputs: dict[str, Any]


def batches(items: Sequence[State], device: torch.device, dtype: torch.dtype) -> list[Batch]:
    """Group states of one size into batches, in an order that depends on the states alone."""
    groups: dict[tuple, list[int]] = {}
    for index, state in enumerate(items):
        ids = tuple(state.inputs[name].numpy().tobytes() for name in state.shared)
        shapes = tuple(sorted((name, tuple(tensor.shape)) for name, tensor in state.inputs.items()))
        groups.setdefault((ids, shapes, index if state.runs_alone else -1), []).append(index)
    limit = BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])
    parts = []
    for indices in groups.values():
        at_once = max(1, limit // items[indices[0]].tokens)
        for start in range(0, len(indices), at_once):
            part = indices[start : start + at_once]
            parts.append(Batch(part, _stack([items[index] for index in part], device, dtype)))
    return parts


def _stack(states: Sequence[State], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Return the keyword arguments of a call for states of one size."""
    first = states[0]
    stacked = {
        name: tensor if name in first.shared else torch.cat([state.inputs[name] for state in states])
        for name, tensor in first.inputs.items()
    }
    moved = {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in stacked.items()}
    return as_arguments(moved, first.others)
