"""Time one step on one type of packed weights: all sides in turn, each where it passes the gate."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from ...compute import dtype_name
from ...formats import FORMATS
from ...generation.embedded import PIPELINE_KWARGS
from ...machine.clock import interleaved, percentiles
from ...machine.free_memory import free_bytes
from ...report.amounts import size_text
from ..memory import extra_peak
from ..names import OURS, TORCH, wrong
from ..providers import CANNOT_RUN, PROVIDERS, Unavailable, why
from .inputs import StepConfig, StepInputs, step_inputs
from .model import StepModel
from .weights import StepWeights, build, build_reference, make_layer, make_weights

TIMES = ("p20_ms", "p50_ms", "p80_ms")
COLUMNS = ("format", "provider", "what", "size", "dtype", "repeats", *TIMES, "peak_bytes", "weight_bytes", "error", "note")
EMBEDDED_BATCH = 4  # of 16 image tokens each: with fewer than 17 rows every mode runs as "exact"
DENOISED = f"{PIPELINE_KWARGS['width']}x{PIPELINE_KWARGS['height']} batch {EMBEDDED_BATCH}"
LARGEST_GATE = 0.5  # relative RMS error; unrelated outputs of equal size are 1.4 apart
_REUSED = "does not fit: one double and one single block's weights stand for all; bytes are the whole model's"
_OTHER_ORDER = "in a round of its own: both arrangements of the rows do not fit; the unquantized step took {:.1f} ms in it"


@dataclass(frozen=True)
class StepCase:
    """Say what is timed: the model's sizes, the picture's, and weights to quantize (None: random).

    With `at_once` each provider is checked on the first double and the first single block alone, whose oracle takes seconds where
    that of 57 blocks takes minutes, and its row is made as soon as it is timed, in turn with the unquantized step.
    """

    what: str
    size: str
    config: StepConfig
    width: int
    height: int
    batch: int
    text: int
    stored: Mapping[str, Tensor] | None = None
    at_once: bool = False


class Oracle:
    """Judge outputs by those of the float32 step on the same packed weights."""

    def __init__(self, weights: StepWeights, inputs: StepInputs):
        self.weights, self.inputs = weights, inputs
        self.exact, self.gate = cache(self._exact), cache(self._gate)

    def _exact(self, first_blocks_only: bool) -> Tensor:
        model = build_reference(self.weights, first_blocks_only=first_blocks_only)
        return run(model, self.inputs.to(torch.float32))

    def error(self, y: Tensor, first_blocks_only: bool = False) -> float:
        """Return the relative RMS error of a step's output."""
        return relative(y, self.exact(first_blocks_only))

    def _gate(self, of_layer: float, first_blocks_only: bool = False) -> float:
        """Return how far off a step may be: like a step whose packed layers are as far off as a call may be.

        That step runs in the dtype of the others, so what else rounds there is allowed too.
        """
        noisy = build_reference(self.weights, self.weights.dtype, of_layer, first_blocks_only)
        return min(LARGEST_GATE, self.error(run(noisy, self.inputs), first_blocks_only))


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
    """Yield a row for each provider, as soon as it is timed where the case says so.

    Where one memory cannot hold all, in two rounds, both with the unquantized step in turn.
    """
    progress(f"{case.what}, {name}: making weights")
    weights = make_weights(case.config, FORMATS[name], device, dtype, case.stored)
    inputs = step_inputs(case.config, case.width, case.height, case.batch, device, dtype, case.text)
    reuse, rounds = _plan(weights, inputs, providers, device)
    for index, group in enumerate(rounds):
        if index:
            weights.to_file_order()
        measured = _measure_round(case, weights, inputs, group, reuse, device, repeats, progress)
        if not index:
            yield from measured
            gc.collect()
            continue
        rows = list(measured)
        gc.collect()
        plain = next(row for row in rows if row["provider"] == TORCH)
        for row in rows:
            if row is not plain:
                note = _OTHER_ORDER.format(float(plain["p50_ms"])) if row["p50_ms"] and plain["p50_ms"] else row["note"]
                yield row | dict(note=note)


def _plan(weights: StepWeights, inputs: StepInputs, providers: list[str], device: torch.device) -> tuple[bool, list[list[str]]]:
    """Tell whether the unquantized model must reuse blocks, and which providers go in which round."""
    largest = max(problem.weight.n * problem.weight.k for problem in weights.packed.values())
    tokens = inputs.positions.shape[0] * inputs.image.shape[0]
    # Decoding's intermediates; activations of about 10 widths.
    working = 32 * largest + 160 * tokens * weights.config.width
    free, whole = free_bytes(device), weights.nbytes(unquantized=True)
    reuse = free is not None and whole + working > free
    second = [name for name in providers if not name.startswith(OURS) and name not in (TORCH, "dequantize")]
    planes = any(problem.weight.planes for problem in weights.packed.values())
    if not planes or not any(_is_there(name, weights) for name in second):
        return reuse, [providers]
    if free is None or weights.nbytes() + working + (0 if reuse else whole) <= free:
        return reuse, [providers]
    return reuse, [[name for name in providers if name not in second], [TORCH, *second]]


def _is_there(provider: str, weights: StepWeights) -> bool:
    """Tell whether a provider makes a layer of the smallest weight: else a round for it would be wasted."""
    try:
        make_layer(provider, min(weights.packed.values(), key=lambda problem: problem.weight.data.nbytes), "")
    except Unavailable:
        return False
    return True


def is_ours_to_mend(provider: str, problem: Exception) -> bool:
    """Tell whether a failure is this library's error; another library's is a result, its row's note."""
    return provider.startswith(OURS) and not isinstance(problem, CANNOT_RUN)


def _unquantized(config: StepConfig, stored: Mapping[str, Tensor]) -> StepModel:
    """Return the float32 model of the weights that were quantized."""
    model = StepModel(config)
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    return model


def _measure_round(case, weights, inputs, providers, reuse, device, repeats, progress) -> Iterator[dict]:
    oracle = Oracle(weights.first_blocks() if case.at_once else weights, inputs)
    rows: dict[str, dict] = {}
    work: dict[str, Callable[[], Tensor]] = {}
    unquantized = (
        None if case.stored is None else run(_unquantized(case.config, case.stored).to(device), inputs.to(torch.float32))
    )
    for provider in providers:
        progress(f"{case.what}, {weights.fmt.name}: checking {provider}")
        rows[provider], model = _checked(case, weights, oracle, provider, reuse, device, unquantized)
        if model is not None:
            work[provider] = partial(run, model, inputs)
        if not case.at_once:
            continue
        if model is not None:
            progress(f"{case.what}, {weights.fmt.name}: timing {provider}")
            rows[provider] |= timed(interleaved(work, repeats, device)[provider])
            work = {name: call for name, call in work.items() if name == TORCH}
            del model
        yield rows[provider]
    if not case.at_once:
        progress(f"{case.what}, {weights.fmt.name}: timing")
        for provider, times in interleaved(work, repeats, device).items():
            rows[provider] |= timed(times)
        work.clear()
        yield from rows.values()


def _checked(case, weights, oracle: Oracle, provider: str, reuse: bool, device, unquantized) -> tuple[dict, StepModel | None]:
    """Return a provider's row, and its model where its output is right."""
    inputs, first_only = oracle.inputs, reuse and provider == TORCH
    row = new_row(weights.fmt.name, provider, case.what, case.size, dtype_name(weights.dtype))
    row["weight_bytes"] = weights.nbytes(unquantized=provider == TORCH)
    row["note"] = f"{size_text(weights.nbytes(unquantized=True))} {_REUSED}" if first_only else ""
    try:
        model = build(weights, provider, first_only)
        y = run(model, inputs)
        extra = extra_peak(partial(run, model, inputs), device)
        checked = run(build(oracle.weights, provider), inputs) if case.at_once else y
        error, gate = oracle.error(checked, first_only), oracle.gate(PROVIDERS[provider].gate, first_only)
    except Exception as problem:
        if is_ours_to_mend(provider, problem):
            raise
        return row | dict(note=why(problem)), None
    row["error"] = f"{error:.3g}"
    if unquantized is not None:
        row["note"] = f"{relative(y, unquantized):.2%} off the unquantized model's output"
    # Also for NaN.
    if not (error <= gate and y.isfinite().all()):
        return row | dict(note=wrong(error, gate)), None
    row["peak_bytes"] = "" if extra is None else row["weight_bytes"] + extra
    return row, model


def new_row(format: str, provider: str, what: str, size: str, dtype: str = "", note: str = "") -> dict:
    """Return a row of a whole run whose other columns are empty."""
    named = dict(format=format, provider=provider, what=what, size=size, dtype=dtype, note=note)
    return dict.fromkeys(COLUMNS, "") | named


def timed(times: list[float]) -> dict:
    """Return the columns of some runs' milliseconds."""
    return dict(zip(TIMES, (f"{value:.3f}" for value in percentiles(times)))) | dict(repeats=len(times))
