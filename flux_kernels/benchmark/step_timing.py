"""Time one step on one type of packed weights: all sides in turn, each only where its output passes the correctness gate."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..clock import interleaved, percentiles
from ..formats import FORMATS
from .memory import extra_peak, free_bytes
from .providers import PROVIDERS, Unavailable
from .step_model import StepConfig, StepInputs, StepModel, step_inputs
from .step_weights import StepWeights, build, build_reference, make_weights

COLUMNS = ("format", "provider", "what", "size", "p20_ms", "p50_ms", "p80_ms", "peak_bytes", "weight_bytes", "error", "note")
_LARGEST_GATE = 0.5  # unrelated outputs of equal size are 1.4 apart
_REUSED = "does not fit: one double and one single block's weights stand for all; bytes are the whole model's"
_OTHER_ORDER = "in a round of its own: both arrangements of the rows do not fit; the unquantized step took {:.1f} ms in it"


@dataclass(frozen=True)
class StepCase:
    """Say what is timed: the model's sizes, the picture's, and the weights to quantize (None: random packed ones)."""

    what: str
    size: str
    config: StepConfig
    height: int
    width: int
    batch: int
    text: int
    stored: Mapping[str, Tensor] | None = None


class Oracle:
    """Judge outputs by those of the float32 step on the same packed weights."""

    def __init__(self, weights: StepWeights, inputs: StepInputs):
        self.weights, self.inputs = weights, inputs.to(torch.float32)
        self.output = cache(self._output)

    def _output(self, noise: float, first_blocks_only: bool) -> Tensor:
        return run(build_reference(self.weights, noise, first_blocks_only), self.inputs)

    def error(self, y: Tensor, first_blocks_only: bool = False) -> float:
        """Return the relative RMS error of a step's output."""
        return relative(y, self.output(0.0, first_blocks_only))

    def gate(self, of_layer: float, first_blocks_only: bool = False) -> float:
        """Return how far off a step may be: as far as noise of the size that each layer is allowed takes the float32 step."""
        return min(_LARGEST_GATE, self.error(self.output(of_layer, first_blocks_only), first_blocks_only))


@torch.no_grad()
def run(model: StepModel, inputs: StepInputs) -> Tensor:
    """Run one step without a graph for gradients."""
    return model(inputs)


def relative(y: Tensor, reference: Tensor) -> float:
    """Return the RMS of the difference over that of the reference, computed in float64."""
    expected = reference.double()
    return ((y.double() - expected).norm() / expected.norm()).item()


def measure_format(
    case: StepCase,
    name: str,
    providers: list[str],
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    progress: Callable[[str], None],
) -> Iterator[dict]:
    """Yield a row for each provider; where one memory cannot hold all, in two rounds, both with the unquantized step in turn."""
    progress(f"{case.what}, {name}: making weights")
    weights = make_weights(case.config, FORMATS[name], device, dtype, case.stored)
    inputs = step_inputs(case.config, case.height, case.width, case.batch, device, dtype, case.text)
    reuse, rounds = _plan(weights, inputs, providers, device)
    for index, group in enumerate(rounds):
        if index:
            weights.to_file_order()
        rows = _measure_round(case, weights, inputs, group, reuse, device, repeats, progress)
        gc.collect()
        if not index:
            yield from rows
            continue
        beside = next(row for row in rows if row["provider"] == "torch")
        for row in rows:
            if row is not beside:
                said = _OTHER_ORDER.format(float(beside["p50_ms"])) if row["p50_ms"] and beside["p50_ms"] else row["note"]
                yield row | dict(note=said)


def _plan(weights: StepWeights, inputs: StepInputs, providers: list[str], device: torch.device) -> tuple[bool, list[list[str]]]:
    """Tell whether the unquantized model must reuse one block of each kind, and which providers go in which round."""
    largest = max(one.data.shape[0] * weights.fmt.row_weights(one.data.shape[1]) for one in weights.packed.values())
    tokens = inputs.positions.shape[0] * inputs.image.shape[0]
    working = 32 * largest + 160 * tokens * weights.config.width  # decoding's intermediates; activations of about 10 widths
    free, whole = free_bytes(device), weights.nbytes(unquantized=True)
    reuse = free is not None and whole + working > free
    second = [name for name in providers if not name.startswith("ours ") and name not in ("torch", "dequantize")]
    if not second or not any(one.planes for one in weights.packed.values()):
        return reuse, [providers]
    if free is None or weights.nbytes() + working + (0 if reuse else whole) <= free:
        return reuse, [providers]
    return reuse, [[name for name in providers if name not in second], ["torch", *second]]


def _measure_round(case, weights, inputs, providers, reuse, device, repeats, progress) -> list[dict]:
    oracle, models, rows = Oracle(weights, inputs), {}, {}
    for provider in providers:
        progress(f"{case.what}, {weights.fmt.name}: checking {provider}")
        first_only = reuse and provider == "torch"
        row = dict.fromkeys(COLUMNS, "") | dict(
            format=weights.fmt.name,
            provider=provider,
            what=case.what,
            size=case.size,
            weight_bytes=weights.nbytes(unquantized=provider == "torch"),
            note=f"{weights.nbytes(unquantized=True) / 1e9:.1f} GB {_REUSED}" if first_only else "",
        )
        rows[provider] = row
        try:
            model = build(weights, provider, first_only)
            y = run(model, inputs)
            extra = extra_peak(lambda model=model: run(model, inputs), device)
            error, gate = oracle.error(y, first_only), oracle.gate(PROVIDERS[provider].gate, first_only)
        except Unavailable as reason:
            row["note"] = str(reason)
            continue
        except torch.OutOfMemoryError:
            row["note"] = "out of memory"
            continue
        except Exception as problem:  # the failure of another library is a result: it becomes the row's note
            if provider.startswith("ours "):
                raise
            row["note"] = f"{type(problem).__name__}: {' '.join(str(problem).split())[:100]}"
            continue
        row["error"] = f"{error:.3g}"
        if error <= gate:  # also false for NaN
            models[provider] = model
            row["peak_bytes"] = "" if extra is None else row["weight_bytes"] + extra
        else:
            row["note"] = f"wrong result: relative error {error:.2g}, at most {gate:.2g}"
    progress(f"{case.what}, {weights.fmt.name}: timing")
    work = {provider: lambda model=model: run(model, inputs) for provider, model in models.items()}
    for provider, times in interleaved(work, repeats, device).items():
        rows[provider] |= dict(zip(("p20_ms", "p50_ms", "p80_ms"), (f"{value:.3f}" for value in percentiles(times))))
    return list(rows.values())
