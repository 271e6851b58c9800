"""Time the whole step for each provider: eager and as a CUDA graph, with profile and memory.

What is checked is the first double and the first single block, against float32 on the same packed weights.
"""

from __future__ import annotations

import gc
import gzip
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from bench.aot.model import Model
from bench.gpu_session.predict import modelled_ms, moved_ms, product_ms, read_ms, two_stage_ms
from bench.gpu_session.session import Session, timed
from flux_kernels.benchmark.names import WRONG, way_of
from flux_kernels.benchmark.providers import CANNOT_RUN, PROVIDERS
from flux_kernels.benchmark.step.inputs import step_inputs
from flux_kernels.benchmark.step.jobs import true_size
from flux_kernels.benchmark.step.timing import Oracle
from flux_kernels.benchmark.step.timing import run as run_step
from flux_kernels.benchmark.step.weights import StepWeights, build, make_weights
from flux_kernels.compute import WEIGHT_ONLY_M
from flux_kernels.formats import FORMATS
from flux_kernels.machine.gpu_clock import GpuClock, Replay
from flux_kernels.machine.tune_compile import one_line
from flux_kernels.models.calls import Call, step_calls

KEY = ("format", "provider", "size", "what")
_PROVIDERS = ("torch", "ours exact", "ours int8", "dequantize")
_FORMATS = ("Q4_K", "Q8_0")
_ROUNDS = 5
_ATTENTION_TFLOP = 14.9  # of a 1024 x 1024 step, not ours
_ROWS_SHOWN = 25


def run(session: Session, formats: tuple[str, ...] = _FORMATS, size: str = "1024x1024") -> None:
    """Write step.csv, and a profiler's table and trace for each provider."""
    table = session.table("step", KEY)
    for format in formats[:1] if session.reduced else formats:
        # A short dry run goes through all providers once: in the section that has the default types.
        wanted = _PROVIDERS[:2] if session.reduced and formats != _FORMATS else _PROVIDERS
        missing = [provider for provider in wanted if not table.has(_key(format, provider, size, "graph"))]
        if missing and not session.late():
            _format(session, table, format, size, missing)
            gc.collect()
            torch.cuda.empty_cache()


def _key(format: str, provider: str, size: str, what: str) -> dict:
    return dict(format=format, provider=provider, size=size, what=what)


def _format(session: Session, table, format: str, size: str, providers: list[str]) -> None:
    # With the text tokens there are enough rows for the same choices.
    case = true_size("128x128" if session.dry else size)
    config = replace(case.config, num_layers=1, num_single_layers=1) if session.dry else case.config
    weights = make_weights(config, FORMATS[format], session.device, torch.bfloat16)
    inputs = step_inputs(config, case.width, case.height, case.batch, session.device, torch.bfloat16, case.text)
    oracle = Oracle(weights.first_blocks(), inputs)
    for provider in providers:
        if session.late():
            return
        try:
            _provider(session, table, weights, oracle, provider, size)
        except (*CANNOT_RUN, RuntimeError, ValueError) as problem:
            table.add(_row(_key(format, provider, size, "graph"), [], None, one_line(problem)))
        gc.collect()


def _provider(session: Session, table, weights: StepWeights, oracle: Oracle, provider: str, size: str) -> None:
    format = weights.fmt.name
    error, gate = _checked(session, oracle, provider)
    model = build(weights, provider)
    call = partial(run_step, model, oracle.inputs)
    call()
    torch.cuda.reset_peak_memory_stats()
    predicted = predicted_ms(session.rates, format, provider, size)
    session.expected += (4 * _ROUNDS * predicted + 3000) / 1e3
    columns = dict(error=f"{error:.3g}", gate=f"{gate:.3g}")
    if not error <= gate and not session.dry:
        table.add(_row(_key(format, provider, size, "graph"), [], predicted, WRONG.strip(": "), **columns))
        return
    rounds = 1 if session.dry else _ROUNDS
    clock = GpuClock(session.device)
    eager = [clock.milliseconds(call) for _ in range(rounds)]
    columns["peak_gb"] = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"
    table.add(_row(_key(format, provider, size, "eager"), eager, predicted, "", **columns))
    _profile(session, call, f"{format}_{provider.replace(' ', '_')}_{size}")
    with Replay(call, session.device) as replay:
        times = [clock.milliseconds(replay) for _ in range(rounds)]
    table.add(_row(_key(format, provider, size, "graph"), times, predicted, "", **columns))


def _checked(session: Session, oracle: Oracle, provider: str) -> tuple[float, float]:
    """Return the error of the first blocks, and the most it may be."""
    y = run_step(build(oracle.weights, provider), oracle.inputs)
    if session.dry:
        return 0.0, 1.0
    return oracle.error(y), oracle.gate(PROVIDERS[provider].gate)


def _profile(session: Session, call: Callable[[], object], name: str) -> None:
    """Write the profiler's table of kernels by GPU time, and the trace."""
    # What torch.profiler.profile uses, without importing torch's compiler first, which takes seconds; kernels are Kineto's to see.
    with torch.autograd.profiler.profile(use_device=None if session.dry else "cuda", use_kineto=True) as profiler:
        call()
        torch.cuda.synchronize()
    by = "self_cpu_time_total" if session.dry else "self_device_time_total"
    text = profiler.key_averages().table(sort_by=by, row_limit=_ROWS_SHOWN, max_name_column_width=70)
    (session.out / f"{name}.profile.txt").write_text(text)
    trace = session.out / f"{name}.trace.json"
    profiler.export_chrome_trace(str(trace))
    with trace.open("rb") as plain, gzip.open(session.out / f"{name}.trace.json.gz", "wb", 6) as packed:
        shutil.copyfileobj(plain, packed)
    trace.unlink()


def predicted_ms(rates: Model, format: str, provider: str, size: str) -> float:
    """Predict a step: the sum of its calls and attention at the products' rate."""
    case = true_size(size)
    calls = step_calls(case.width, case.height, case.batch)
    linears = sum(call.calls * _call_ms(rates, format, provider, call) for call in calls)
    tokens = case.batch * (case.width * case.height // 256 + case.text)
    attention = _ATTENTION_TFLOP * (tokens / 4608) ** 2 / rates.bf16_tflops * 1e3
    return linears + attention


def _call_ms(rates: Model, format: str, provider: str, call: Call) -> float:
    shape = call.m, call.n, call.k
    if provider == "torch":
        return product_ms(rates, *shape)
    if call.m <= WEIGHT_ONLY_M:
        return read_ms(rates, format, call.n, call.k)
    modelled = None if provider == "dequantize" else modelled_ms(rates, way_of(provider), format, *shape)
    if modelled is not None:
        return modelled
    if provider == "ours int8":
        return product_ms(rates, *shape, speed=1.2) + moved_ms(rates, call.n * call.k * 2 + 3 * call.m * call.k)
    decoded = two_stage_ms(rates, format, *shape)
    # Decoding in torch writes and reads float32 several times over.
    return decoded + (moved_ms(rates, 40 * call.n * call.k) if provider == "dequantize" else 0.0)


def _row(key: dict, times: list[float], predicted: float | None, note: str, **more: str) -> dict:
    checked = {name: more.get(name, "") for name in ("error", "gate", "peak_gb")}
    return key | timed(times, predicted, 3) | checked | dict(note=note)
