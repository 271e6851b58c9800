"""One run of `flux-kernels bench`: what is measured, in which order, and until when."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from ..errors import FormatError
from ..generation.base_pipeline import one_thread
from ..models.calls import STEPS, Call, step_calls
from ..models.variant_calls import MAIN_MODEL, variant_calls
from .ceilings import Ceilings, measure_ceilings
from .linears import measure
from .record import origin
from .shapes import reduced, size_name
from .whole_step import measure_steps, row_key

MAIN_SIZE = "1024x1024"
_LINEAR_SHARE = 0.6  # of the time, where the whole step is to be measured too

_PICTURE_SECONDS = 45.0  # what the embedded model's pictures of one type took on a 2-core CPU

Tell = Callable[[str, int], None]  # words on what is done now, and how many pieces of work are done since
OnRow = Callable[[str, dict], None]  # "linear" or "step", and the row


@dataclass(frozen=True)
class Plan:
    """Say what to measure.

    Attributes:
        formats: ggml types, by name.
        model: whose linear calls, by its name for options; whole steps are FLUX.1-dev's alone.
        providers: for the linear calls; the whole step has its own.
        sizes: names of `shapes.STEPS`.
        scale: M and N of the linear calls are divided by it.
        repeats: runs of each side, in turn.
        minutes: no piece of work is begun after this time; None: no limit.
        steps: whether whole runs are measured too: a step of each type, and pictures.
        denoise: for how many of the types the embedded model's pipeline is run too, which takes long for what it tells.
    """

    formats: Sequence[str]
    providers: Sequence[str]
    sizes: Sequence[str] = (MAIN_SIZE,)
    scale: int = 1
    repeats: int = 5
    minutes: float | None = None
    steps: bool = True
    denoise: int = 1
    model: str = MAIN_MODEL

    def step(self, size: str) -> list[Call]:
        """List the linear calls of one step of the model."""
        return variant_calls(self.model, **STEPS[size])

    def size_name(self, size: str) -> str:
        """Name a size in result rows: with the model where that is not FLUX.1-dev."""
        named = size_name(size, self.scale)
        return named if self.model == MAIN_MODEL else f"{self.model} {named}"

    def calls(self) -> list[tuple[str, str, Call]]:
        """List size, type and call of every comparison of linear calls."""
        return [(size, name, call) for size in self.sizes for name in self.formats for call in self.step(size)]

    @property
    def runs_whole(self) -> bool:
        """Whether whole runs are measured too: asked for, and known of the model."""
        return self.steps and self.model == MAIN_MODEL

    def whole_runs(self, device: torch.device) -> list[tuple[str, str, bool]]:
        """List size, type and whether it is of pictures for every whole run; a CPU has one size."""
        if not self.runs_whole:
            return []
        sizes = self.sizes if device.type != "cpu" else self.sizes[:1]
        steps = [(size, name, False) for size in sizes for name in self.formats]
        return steps + [(self.sizes[0], name, True) for name in self.formats[: self.denoise]]

    def work(self, device: torch.device) -> int:
        """Count the pieces of work that `Tell` reports."""
        return len(self.calls()) + len(self.whole_runs(device))


@dataclass
class Found:
    """Hold what one run measured; rows have their origin columns.

    Attributes:
        calls: how many comparisons of linear calls were asked for.
        calls_a_step: how many linear calls a step has.
        minutes: after how long nothing more was begun; None: no limit.
        calls_late: how many comparisons of linear calls were not begun in time.
        not_run: which whole runs were left out, and why.
    """

    origin: Mapping[str, str]
    ceilings: Ceilings
    linears: list[dict] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)
    calls: int = 0
    calls_a_step: int = len(step_calls())
    minutes: float | None = None
    calls_late: int = 0
    not_run: list[str] = field(default_factory=list)

    def left_out(self) -> list[str]:
        """Say in words what was not measured, and why."""
        lines = []
        if self.calls_late:
            lines.append(
                f"Time ran out: {self.calls_late} of {self.calls} shapes were not begun in {self.minutes:g} minutes. Types they "
                "belong to are not summed. A larger --minutes measures them."
            )
        return lines + ([f"Not run: {'; '.join(self.not_run)}."] if self.not_run else [])

    def whole(self, size: str) -> list[dict]:
        """Return the rows of a size, only of types whose every call was begun: others cannot be summed."""
        rows = [row for row in self.linears if row["size"] == size]
        calls: dict[str, set[str]] = {}
        for row in rows:
            calls.setdefault(row["format"], set()).add(row["where"])
        expected = self.calls_a_step
        return [row for row in rows if len(calls[row["format"]]) == expected]


def measure_all(plan: Plan, device: torch.device, dtype: torch.dtype, tell: Tell, on_row: OnRow) -> Found:
    """Measure the linear calls, then the whole steps; give every row to `on_row` as soon as it is there.

    A CPU works on one thread: the shapes are small there, and on a busy machine several would wait for each other most of the time.
    """
    with one_thread() if device.type == "cpu" else nullcontext():
        return _measure_all(plan, device, dtype, tell, on_row)


def _measure_all(plan: Plan, device: torch.device, dtype: torch.dtype, tell: Tell, on_row: OnRow) -> Found:
    started, limit = time.monotonic(), float("inf") if plan.minutes is None else 60 * plan.minutes
    tell("ceilings", 0)
    run = Found(origin(device), measure_ceilings(device, dtype), calls=len(plan.calls()), minutes=plan.minutes)
    run.calls_a_step = len(plan.step(plan.sizes[0]))
    if plan.steps and not plan.runs_whole:
        run.not_run.append(
            f"whole steps (timed of {MAIN_MODEL} alone; of {plan.model}, the linear calls of a step are added up)"
        )
    for kind, row in _linears(plan, run, device, dtype, tell, started + limit * (_LINEAR_SHARE if plan.runs_whole else 1)):
        on_row(kind, row)
    for kind, row in _steps(plan, run, device, tell, started + limit):
        on_row(kind, row)
    return run


def _linears(plan, run: Found, device, dtype, tell: Tell, end: float) -> Iterator[tuple[str, dict]]:
    for size, name, call in plan.calls():
        if time.monotonic() > end:
            run.calls_late += 1
            continue
        tell(f"{name} {call.where}", 0)
        named = plan.size_name(size)
        for row in measure(
            name, reduced(call, plan.scale), list(plan.providers), device, dtype, plan.repeats, run.ceilings, named
        ):
            run.linears.append(row | run.origin)
            yield "linear", run.linears[-1]
        tell(f"{name} {call.where}", 1)


def _steps(plan, run: Found, device, tell: Tell, end: float) -> Iterator[tuple[str, dict]]:
    # Seconds, of steps and of pictures.
    longest = {False: 0.0, True: _PICTURE_SECONDS}
    for size, name, pictures in plan.whole_runs(device):
        begun, words = time.monotonic(), f"{'denoising' if pictures else 'whole step'}, {name}, {size}"
        # Much work in one piece: it is begun only where there is time for the longest so far.
        if begun + longest[pictures] > end:
            run.not_run.append(f"{words} (no time was left)")
            continue
        done = {row_key(row) for row in run.steps} if pictures else ()
        options = dict(size=size, repeats=plan.repeats, denoising=pictures, done=done, progress=lambda text: tell(text, 0))
        try:
            for row in measure_steps([name], device, **options):
                run.steps.append(row)
                yield "step", row
        except FormatError as error:  # such as a type that nothing here quantizes: the other rows stay
            run.not_run.append(f"{words} ({error})")
        longest[pictures] = max(longest[pictures], time.monotonic() - begun)
        tell(f"whole step, {name}", 1)
