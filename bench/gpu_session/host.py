"""Measure a call's cost to the host, driver included: calls are issued into an idle queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import nn

from bench.gpu_session.session import Session, timed
from bench.launch_cost import CASES, entered
from bench.record import RESULTS, read_csv
from flux_kernels.machine.clock import balanced_order

KEY = ("case", "m", "entry")
_N = _K = 3072
_CALLS = 60  # whose launches, up to five each, fit the driver's queue of about a thousand
_ROUNDS = 15
# Of x at most: enough for the same launches, few enough that the card is never behind the host.
_MOST_ROWS = 640
# Without the mode that data-center cards refuse.
_CASES = {name: (compute, min(m, _MOST_ROWS)) for name, (compute, m) in CASES.items() if compute != "fp16_accumulate"}


def run(session: Session) -> None:
    """Write host.csv."""
    table = session.table("host", KEY)
    with torch.no_grad():
        calls = {key: call for key, call in _calls(session) if not table.has(_key(*key))}
        times: dict[tuple, list[float]] = {key: [] for key in calls}
        for call in calls.values():
            _issue(call)
        for turn in range(1 if session.dry else _ROUNDS):
            for index in balanced_order(len(calls), turn):
                key = list(calls)[index]
                times[key].append(_issue(calls[key]))
    for key, milliseconds in times.items():
        table.add(_key(*key) | timed(milliseconds, _predicted(key[0])) | dict(note=""))


def _key(case: str, m: int, entry: str) -> dict:
    return dict(case=case, m=m, entry=entry)


def _calls(session: Session) -> Iterator[tuple[tuple, Callable[[], object]]]:
    packed, bias = session.weights("Q4_K", _N, _K)[0], session.bias(_N)
    plain = nn.Linear(_K, _N, device=session.device, dtype=torch.bfloat16).requires_grad_(False)
    x = session.activations(_MOST_ROWS, _K)
    yield ("nn.Linear", _MOST_ROWS, "layer"), lambda x=x: plain(x)
    for name, (compute, m) in _CASES.items():
        x = session.activations(m, _K)
        for entry in ("layer", "function"):
            yield (name, m, entry), entered(x, packed, bias, compute, entry)


def _issue(call: Callable[[], object]) -> float:
    """Return the host's milliseconds a call."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(_CALLS):
        call()
    took = time.perf_counter() - started
    torch.cuda.synchronize()
    return 1e3 * took / _CALLS


def _predicted(case: str) -> float:
    """Return the stand-in driver's recorded milliseconds for an H100; the driver's part is not in them."""
    rows = [row for row in read_csv(RESULTS / "launch_cost.csv") if row["card"] == "H100" and row["case"] == case]
    return float(rows[-1]["us"]) / 1e3
