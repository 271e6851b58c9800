"""The forward pass of a transformer in stages, so that measuring can start at any block.

Stage 0 embeds the inputs, stages 1 to n are the blocks, stage n + 1 projects to the velocity. All of it is the model's own
forward pass: it is run up to a block and left there, and taken up again with the blocks before replaced by what they gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FormatError
from ..models.model_class import architecture_of_model
from ..models.names import block_of
from .state_inputs import velocity_of


@dataclass(frozen=True)
class Hidden:
    """Hold what goes into a block.

    Attributes:
        inputs: the model's keyword arguments.
        arguments: of the next block, None behind the last.
        named: its keyword arguments.
        outputs: list of blocks -> what its last block that ran gave.
    """

    inputs: Mapping[str, Any]
    arguments: tuple[Any, ...] | None
    named: Mapping[str, Any]
    outputs: Mapping[str, Any] = field(default_factory=dict)

    def tokens(self) -> Tensor:
        """Return what the last block gave: text and image tokens together, [batch, tokens, width]."""
        given = list(self.outputs.values())[-1]
        parts = [part for part in (given if isinstance(given, tuple) else (given,)) if part is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class _Reached(Exception):
    """Leave a forward pass in front of a block."""

    def __init__(self, arguments: tuple[Any, ...], named: dict[str, Any]):
        super().__init__()
        self.arguments, self.named = arguments, named


class Stages:
    """Run a transformer stage by stage.

    Args:
        model: the transformer, in eval mode. It is not changed.

    Raises:
        FormatError: where the model is of no known architecture.
    """

    def __init__(self, model: nn.Module):
        architecture = architecture_of_model(model)
        if architecture is None:
            raise FormatError(f"Blocks are known of transformers that flux_kernels loads, not of a {type(model).__name__}.")
        self.model = model
        self._lists: list[str] = [theirs for _, theirs in architecture.blocks]
        self._blocks: list[tuple[str, nn.Module]] = [
            (name, block) for name in self._lists for block in model.get_submodule(name).children()
        ]
        self.last = len(self._blocks) + 1
        # Lists of which every block gets what the one before gave, and all else unchanged; known once inputs were seen.
        self._alike: set[str] | None = None

    def stage_of(self, module: str) -> int:
        """Return the stage that a module (or parameter) of the model belongs to; 0 for all outside the blocks."""
        block = block_of(f"{module}.")
        if block is None:
            return 0
        before = self._lists[: self._lists.index(block[0])]
        return 1 + block[1] + sum(name in before for name, _ in self._blocks)

    def embed(self, inputs: Mapping[str, Any]) -> Hidden:
        """Run stage 0 on the transformer's keyword arguments."""
        if self._alike is None:
            self._alike = self._look(inputs)
        return self._taken_up(Hidden(inputs, None, {}), 1)

    def block(self, stage: int, hidden: Hidden) -> Hidden:
        """Run the block of stage 1 to n."""
        name, block = self._blocks[stage - 1]
        given = block(*(hidden.arguments or ()), **hidden.named)
        outputs = {**hidden.outputs, name: given}
        behind = Hidden(hidden.inputs, None, {}, outputs)
        if stage == len(self._blocks):
            return behind
        arguments = _passed_on(hidden, given) if self._blocks[stage][0] == name and name in (self._alike or ()) else None
        return self._taken_up(behind, stage + 1) if arguments is None else Hidden(hidden.inputs, *arguments, outputs)

    def velocity(self, hidden: Hidden) -> Tensor:
        """Run the last stage; return the velocity, [batch, ...]."""
        with self._replaced(hidden.outputs, self.last):
            return velocity_of(self.model(**hidden.inputs, return_dict=False))

    def _taken_up(self, hidden: Hidden, stage: int) -> Hidden:
        """Run the model to where a block begins, the blocks before replaced by what they gave."""
        with self._replaced(hidden.outputs, stage):
            try:
                self.model(**hidden.inputs, return_dict=False)
            except _Reached as reached:
                # In the last list, of those before only the shapes count: what they gave is in its arguments.
                is_last = self._blocks[stage - 1][0] == self._blocks[-1][0]
                last = {name: given for name, given in hidden.outputs.items() if name == self._blocks[-1][0]}
                outputs = {**_light(hidden.outputs), **last} if is_last else hidden.outputs
                return Hidden(hidden.inputs, reached.arguments, reached.named, outputs)
        raise FormatError(f"The forward pass of {type(self.model).__name__} does not reach its block of stage {stage}.")

    def _look(self, inputs: Mapping[str, Any]) -> set[str]:
        """Run the model once; return the lists of blocks between which only what a block gives changes."""
        unlike: set[str] = set()
        # List and identities of the arguments of the block before, which its frame keeps alive.
        before: list[tuple[str, list[Any]]] = []

        def look(name: str) -> Any:
            def hook(_block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
                changing = {"hidden_states", "encoder_hidden_states"}
                kept = [*arguments[1:], *(value for key, value in named.items() if key not in changing)]
                if before and before[0][0] == name and not _same(before[0][1], kept):
                    unlike.add(name)
                before[:] = [(name, kept)]

            return hook

        hooks = [block.register_forward_pre_hook(look(name), with_kwargs=True) for name, block in self._blocks]
        try:
            self.model(**inputs, return_dict=False)
        finally:
            for hook in hooks:
                hook.remove()
        return {name for name, _ in self._blocks} - unlike

    @contextmanager
    def _replaced(self, outputs: Mapping[str, Any], stage: int) -> Iterator[None]:
        """Let the blocks before a stage give what is known of their list, and the stage's own leave the pass."""
        own: list[nn.Module] = []
        try:
            for at, (name, block) in enumerate(self._blocks[:stage], start=1):
                own.append(block)
                # An attribute of the instance comes before the class's method.
                block.forward = _leave if at == stage else _giving(outputs[name])
            yield
        finally:
            for block in own:
                del block.forward


def _leave(*arguments: Any, **named: Any) -> None:
    raise _Reached(arguments, named)


def _giving(output: Any) -> Any:
    return lambda *_arguments, **_named: output


def _passed_on(hidden: Hidden, given: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments of the next block of a list: what a block gives takes the place of what it got.

    A tensor takes the first argument's place; the two of a pair, text and image, those of `encoder_hidden_states` and
    `hidden_states`. None where the block's arguments are called otherwise.
    """
    arguments, named = hidden.arguments or (), dict(hidden.named)
    if isinstance(given, Tensor):
        if arguments:
            return (given, *arguments[1:]), named
        if "hidden_states" in named:
            return arguments, {**named, "hidden_states": given}
    elif (
        isinstance(given, tuple)
        and len(given) == 2
        and not arguments
        and {"hidden_states", "encoder_hidden_states"} <= {*named}
    ):
        return arguments, {**named, "encoder_hidden_states": given[0], "hidden_states": given[1]}
    return None


def _same(some: list[Any], others: list[Any]) -> bool:
    """Tell whether two lists hold the same objects, not equal ones."""
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


def _light(outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return outputs as zeros of their shapes that take no memory."""

    def shape_of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.new_zeros(()).expand(value.shape)
        return tuple(map(shape_of, value)) if isinstance(value, tuple) else value

    return {name: shape_of(value) for name, value in outputs.items()}
