"""Measure what quantized tensors cost in the model's velocity, one at a time or a plan as a whole.

The velocity v is what the sampler integrates: a step moves the latent by dsigma * v. With states sampled evenly over the
steps of real runs, the expected squared error of a step over the expected squared step is

    cost = sum_s dsigma_s^2 * |dv_s|^2 / sum_s dsigma_s^2 * |v_s|^2

with mean squares over image tokens and channels, so that every picture counts alike whatever its size. Text tokens count
only by what they do to the image. MixedQuantFlux's metric (mean squared error of the last block's output, text included,
not normalized) comes from the same forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import FormatError
from ..mixed.cost import CostRow, JointRow
from ..mixed.file_layout import Options
from ..mixed.option import Option
from .file_tensors import FileTensor, file_tensors, quantized, replaced
from .stages import Hidden, Stages
from .states import State, batches

Importance = Mapping[str, tuple[Tensor, float]]
"""File tensor -> (sum of squares of each input channel [K], tokens)."""
# Relative error against the captured velocity above which the states are of another model.
_FOREIGN = 0.1
_RESAMPLES = 2000
# Channels up to which covariances are kept: FLUX.1-dev's 228 of 3072 take 8.6 GB, the 76 wider ones 59 GB more.
_CORRELATED = 4096


@dataclass(frozen=True)
class Errors:
    """Hold errors state by state, float64 [states].

    Attributes:
        velocity: mean squared error of the velocity, image tokens only.
        stack: mean squared error of the last block's output, text tokens included.
    """

    velocity: Tensor
    stack: Tensor


class Measurer:
    """Measure a model on captured states.

    Hidden states in front of the current block are kept for all of them. Memory, on top of the model: two hidden states a
    state (a third while measuring), and the float32 work of one block's weights.

    Args:
        model: a transformer of plain layers, on the device and in the dtype to measure in.
        items: captured states.
        importance: of the quantizers' weighting: "collect" for that of these states, None for none, or a ready one.
        covariance: whether to collect the inputs' covariance, float32 [K, K] a tensor of up to 4096 channels, to fit low-rank
            corrections to; wider ones are fitted to the importance.
        on_batch: called after each batch of the reference pass, (done, in all).

    Raises:
        FormatError: where the model has packed layers or the states were captured with another model.
    """

    def __init__(
        self,
        model: nn.Module,
        items: Sequence[State],
        *,
        importance: Importance | Literal["collect"] | None = "collect",
        covariance: bool = False,
        on_batch: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.model = model
        self.tensors: dict[str, FileTensor] = file_tensors(model)
        self.stages = Stages(model)
        parameter = next(model.parameters())
        self._batches = batches(items, parameter.device, parameter.dtype)
        self.count = len(items)
        self.weights = torch.tensor([state.dsigma**2 for state in items], dtype=torch.float64)
        self.covariance: dict[str, Tensor] = {}
        self.importance: Importance = {} if importance is None or importance == "collect" else importance
        # Hidden states of every batch where stage `_at` begins; nothing is kept before the first measurement.
        self._at, self._cache = self.stages.last + 1, list[Hidden]()
        with torch.inference_mode():
            # The first time, a look at the whole model, which is not to be counted in the sums.
            self.stages.embed(self._batches[0].inputs)
            self._reference(items, importance == "collect", covariance, on_batch)

    def _reference(self, items: Sequence[State], collect: bool, covariance: bool, on_batch: Callable[[int, int], None]) -> None:
        """Run the unquantized model once: velocities, last hidden states, importance, covariance."""
        sums = _Sums(self.model, self.tensors, covariance) if collect or covariance else None
        self._velocity: list[Tensor] = []
        self._stack: list[Tensor] = []
        for number, batch in enumerate(self._batches, start=1):
            hidden = self.stages.embed(batch.inputs)
            for stage in range(1, self.stages.last):
                hidden = self.stages.block(stage, hidden)
            self._stack.append(hidden.tokens())
            self._velocity.append(self.stages.velocity(hidden))
            on_batch(number, len(self._batches))
        if sums is not None:
            importance, self.covariance = sums.stop()
            self.importance = importance if collect else self.importance
        self.signal = self._by_state([velocity.double().square().flatten(1).mean(1) for velocity in self._velocity])
        captured = [torch.cat([items[index].velocity for index in batch.indices]) for batch in self._batches]
        error = self._by_state([_mse(a.to(b.device), b) for a, b in zip(captured, self._velocity, strict=True)])
        if error.mean() > _FOREIGN**2 * self.signal.mean():
            raise FormatError(
                f"The states were captured with another model: its velocities differ by "
                f"{math.sqrt(error.mean() / self.signal.mean()):.0%} from this one's. Capture anew (another --states-file)."
            )

    def changed(self, weights: Mapping[str, Tensor]) -> Errors:
        """Run the model with other weights of the blocks, by parameter name, from the first changed block on."""
        by_stage = _grouped(weights, self.stages.stage_of)
        return self._changed(by_stage, lambda stage: {name: weights[name] for name in by_stage.get(stage, ())})

    @torch.inference_mode()
    def _changed(self, changing: Iterable[int], weights_at: Callable[[int], Mapping[str, Tensor]]) -> Errors:
        """Run the model from the first stage that changes on; `weights_at` is called when a stage is reached.

        What lies outside the blocks (stage 0) is changed to the end: later blocks may use it too.
        """
        first = min((*changing, self.stages.last))
        with replaced(self.model, weights_at(0) if first == 0 else {}):
            if first == 0:
                hidden = [self.stages.embed(batch.inputs) for batch in self._batches]
            else:
                self._advance(first)
                hidden = self._cache
            for stage in range(max(first, 1), self.stages.last):
                with replaced(self.model, weights_at(stage)):
                    hidden = [self.stages.block(stage, state) for state in hidden]
            velocity = [self.stages.velocity(state) for state in hidden]
        return Errors(
            self._by_state([_mse(got, own) for got, own in zip(velocity, self._velocity, strict=True)]),
            self._by_state([_mse(state.tokens(), own) for state, own in zip(hidden, self._stack, strict=True)]),
        )

    def _advance(self, stage: int) -> None:
        """Bring the kept hidden states to where `stage` begins."""
        if stage < self._at:
            self._at, self._cache = 1, [self.stages.embed(batch.inputs) for batch in self._batches]
        for at in range(self._at, stage):
            self._cache = [self.stages.block(at, hidden) for hidden in self._cache]
        self._at = stage

    def _by_state(self, values: list[Tensor]) -> Tensor:
        by_state = torch.empty(self.count, dtype=torch.float64)
        for batch, value in zip(self._batches, values, strict=True):
            # A state of guidance without distillation is a batch of two.
            by_state[batch.indices] = value.cpu().view(len(batch.indices), -1).mean(1)
        return by_state

    def channel_weights(self, tensor: str) -> Tensor | None:
        """Return the mean square of each input channel of a tensor of the file, [K], None where unknown."""
        known = self.importance.get(tensor)
        return None if known is None else known[0] / max(known[1], 1)

    def weights_of(self, options: Options) -> dict[str, tuple[Tensor, Tensor]]:
        """Quantize tensors of the file; return parameter -> (decoded weights, squared weight error).

        Tensors in a plain type (F16, BF16, F32) count as unquantized and are left out.
        """
        weights: dict[str, tuple[Tensor, Tensor]] = {}
        for name, option in self.known(options).items():
            channels, covariance = self.channel_weights(name), self.covariance.get(name)
            weights |= quantized(self.model, self.tensors[name], option, channels, covariance)
        return weights

    def measure_one(self, tensor: str, option: Option) -> CostRow:
        """Measure one tensor in one option, all others unquantized."""
        weights = self.weights_of({tensor: option})
        errors = self.changed({name: weight for name, (weight, _) in weights.items()})
        signal = sum(self.model.get_parameter(name).double().square().sum().item() for name in weights)
        return CostRow(
            tensor=tensor,
            option=option,
            cost=velocity_cost(errors.velocity, self.signal, self.weights),
            mfq_cost=errors.stack.mean().item(),
            bytes=option.nbytes(self.tensors[tensor].shape),
            error_weight_rms=math.sqrt(sum(error.item() for _, error in weights.values()) / signal) if signal else 0.0,
        )

    def joint_errors(self, options: Options) -> Errors:
        """Run the model with all of these tensors quantized; one block's weights are decoded at a time."""
        by_stage = _grouped(self.known(options), lambda name: self.stages.stage_of(self.tensors[name].module))

        def weights_at(stage: int) -> dict[str, Tensor]:
            weights = self.weights_of({name: options[name] for name in by_stage.get(stage, ())})
            return {name: weight for name, (weight, _) in weights.items()}

        return self._changed(by_stage, weights_at)

    def known(self, options: Options) -> dict[str, Option]:
        """Return what counts as quantized, not plain types; raise FormatError for tensors of another model."""
        foreign = [name for name in options if name not in self.tensors]
        if foreign:
            raise FormatError(
                f"The model's file has no matrix {foreign[0]!r} to measure. It has {', '.join(list(self.tensors)[:3])}, ..."
            )
        return {name: option for name, option in options.items() if not option.is_plain}

    def measure_joint(self, options: Options, states: str = "") -> JointRow:
        """Measure a plan as a whole, with a bootstrap interval over the states."""
        errors = self.joint_errors(options)
        low, high = bootstrap(errors.velocity, self.signal, self.weights)
        cost = velocity_cost(errors.velocity, self.signal, self.weights)
        return JointRow(dict(options), cost, errors.stack.mean().item(), low, high, states)

    def effort(self, tensor: str) -> int:
        """Return how many stages one measurement of a tensor runs: a measure of its time."""
        return self.stages.last + 1 - self.stages.stage_of(self.tensors[tensor].module)


def velocity_cost(error: Tensor, signal: Tensor, weights: Tensor) -> float:
    """Return sum(weights * error) / sum(weights * signal), all [states]."""
    return ((weights * error).sum() / (weights * signal).sum()).item()


def bootstrap(error: Tensor, signal: Tensor, weights: Tensor, *, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile bootstrap interval of `velocity_cost` over the states, the same for a `seed`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(error), (_RESAMPLES, len(error)), generator=generator)
    costs = (weights * error)[drawn].sum(1) / (weights * signal)[drawn].sum(1)
    ends = torch.quantile(costs, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=costs.dtype))
    return ends[0].item(), ends[1].item()


def _grouped(names: Iterable[str], stage_of: Callable[[str], int]) -> dict[int, list[str]]:
    by_stage: dict[int, list[str]] = {}
    for name in names:
        by_stage.setdefault(stage_of(name), []).append(name)
    return by_stage


def _mse(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() - b.double()).square().flatten(1).mean(1)


class _Sums:
    """Add up squares of the input channels of the file's tensors while the model runs, or all products."""

    def __init__(self, model: torch.nn.Module, tensors: Mapping[str, FileTensor], covariance: bool):
        self._covariance = covariance
        self._counts: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}
        self._products: dict[str, Tensor] = {}
        self._hooks = [
            model.get_submodule(tensor.module).register_forward_pre_hook(self._hook(name)) for name, tensor in tensors.items()
        ]

    def _hook(self, name: str) -> Callable[[torch.nn.Module, tuple[Any, ...]], None]:
        def add(_module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0].detach().reshape(-1, arguments[0].shape[-1])
            self._counts[name] = self._counts.get(name, 0) + x.shape[0]
            self._sums[name] = self._sums.get(name, 0) + x.double().square().sum(0).cpu()
            if self._covariance and x.shape[1] <= _CORRELATED:
                self._products[name] = self._products.get(name, 0) + (x.float().T @ x.float()).cpu()

        return add

    def stop(self) -> tuple[Importance, dict[str, Tensor]]:
        """Remove the hooks; return importance and covariances (mean products of channels), where wanted."""
        for hook in self._hooks:
            hook.remove()
        importance = {name: (sums.float(), float(self._counts[name])) for name, sums in self._sums.items()}
        return importance, {name: products / self._counts[name] for name, products in self._products.items()}
