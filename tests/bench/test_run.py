"""The benchmark's shapes, its correctness gate, and that it runs where there is no GPU."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from bench.run import one_of_each_height_first
from flux_kernels.benchmark import linears
from flux_kernels.benchmark.linears import is_broken, make_problem, measure, relative_errors, summary
from flux_kernels.benchmark.providers import PROVIDERS, Provider, default_providers
from flux_kernels.errors import BackendUnavailable
from flux_kernels.machine.clock import balanced_order, interleaved, percentiles
from flux_kernels.models.calls import STEPS, Call, step_calls

from ..benchmark.whole_step_calls import whole_step

CPU = torch.device("cpu")
NAMES = [name for name in PROVIDERS if "compiled" not in name and "torchao" not in name]  # those compile for a minute
SMALL = Call(20, 64, 256, 3, "a test")


def test_a_step_has_the_calls_and_operations_of_flux_dev():
    """59.51 TFLOP a step in all, of which embedders and final layer (10 of 504 calls) are under 0.2 %."""
    calls = step_calls()
    assert sum(call.calls for call in calls) == 504 - 10
    total = sum(call.flops * call.calls for call in calls)
    assert total == pytest.approx(59.51e12, rel=0.002)
    whole = whole_step()
    assert sum(call.calls for call in whole) == 504
    assert sum(call.flops * call.calls for call in whole) == pytest.approx(59.51e12, rel=1e-3)
    assert {call.m for call in step_calls(**STEPS["1360x768"])} == {4592, 4080, 512, 1}


def test_every_provider_gives_a_row_and_those_that_run_a_time():
    rows = list(measure("Q4_K", SMALL, NAMES, CPU, torch.float32, repeats=2))
    assert [row["provider"] for row in rows] == NAMES
    timed = {row["provider"] for row in rows if row["p50_ms"]}
    assert {"torch", "dequantize", "ours exact", "ours int8", "ours fp16_accumulate"} <= timed
    assert "need a GPU" in next(row["note"] for row in rows if row["provider"] == "ours fused")
    assert "ours exact" in summary(rows)
    assert all(float(row["max_error"]) > float(row["error"]) > 0 for row in rows if row["p50_ms"])


def test_both_errors_are_shares_of_the_right_outputs_rms():
    """An output off by 1 in one of n places of RMS r has errors 1/r at most and 1/r/sqrt(n) in RMS."""
    problem = make_problem("Q8_0", SMALL, CPU, torch.float32)
    x = torch.randn(SMALL.m, SMALL.k)
    right = PROVIDERS["torch"].make(problem)(x)
    wrong = right.clone()
    wrong[3, 5] += 1.0
    rms, largest = relative_errors(wrong, x, problem)
    expected = 1 / right.square().mean().sqrt().item()
    assert largest == pytest.approx(expected, rel=1e-3)
    assert rms == pytest.approx(expected / right.numel() ** 0.5, rel=1e-3)


def test_no_speed_is_reported_for_a_wrong_result(monkeypatch):
    wrong = Provider("wrong", lambda problem: lambda x: F.linear(x, torch.zeros(64, 256), problem.bias), 0.01, "base")
    monkeypatch.setitem(PROVIDERS, "wrong", wrong)
    (row,) = measure("Q8_0", SMALL, ["wrong"], CPU, torch.float32, repeats=2)
    assert row["p50_ms"] == "" and "wrong result" in row["note"]


def raising(error: Exception):
    def call(x):
        raise error

    return lambda problem: call


def test_a_side_of_ours_that_fails_is_a_row_and_a_status_and_the_others_stay(monkeypatch):
    """One kernel that a card refuses must not take the measurements of a rented hour along."""
    monkeypatch.setitem(PROVIDERS, "ours int8", Provider("ours int8", raising(RuntimeError("out of resource")), 0.02, "ours"))
    failed, other = measure("Q8_0", SMALL, ["ours int8", "torch"], CPU, torch.float32, repeats=2)
    assert failed["note"] == "failed: RuntimeError: out of resource" and is_broken(failed)
    assert failed["p50_ms"] == "" and other["p50_ms"] and not is_broken(other)


def test_a_mode_that_a_card_refuses_is_no_failure(monkeypatch):
    """A100 and H100 refuse fp16_accumulate, which is in the default list: no traceback ends the run."""
    refused = raising(BackendUnavailable("This card has no such unit."))
    monkeypatch.setitem(PROVIDERS, "ours fp16_accumulate", Provider("ours fp16_accumulate", refused, 0.02, "ours"))
    row, other = measure("Q8_0", SMALL, ["ours fp16_accumulate", "torch"], CPU, torch.float32, repeats=2)
    assert row["note"] == "This card has no such unit." and not is_broken(row)
    assert row["p50_ms"] == "" and other["p50_ms"]


def test_a_side_that_some_calls_leave_out_has_no_time_of_a_step():
    """The small-M kernel, timed at M = 1 alone, would read as a hundred times as fast as all calls."""

    def row(provider: str, m: int) -> dict:
        times = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), "1.0")
        return dict(format="Q4_K", size="", provider=provider, m=m, calls=1, repeats=3) | times

    text = summary([row("torch", 1), row("torch", 512), row("ours small_m", 1)])
    assert "torch" in text and "small_m" not in text


def test_every_other_library_cites_whose_call_it_is_and_rows_say_the_version():
    """Each says where its call is documented and whose version counts, installed or not."""
    others = [one for one in PROVIDERS.values() if one.group == "peer" or one.name.startswith("diffusers")]
    assert len(others) > 10 and all(one.source.startswith("https://") and one.package for one in others)
    ours, theirs = measure("Q8_0", SMALL, ["ours exact", "diffusers"], CPU, torch.float32, repeats=1)
    assert ours["note"] == "" and theirs["note"] == f"diffusers {version('diffusers')}"


def test_sides_that_run_the_same_code_are_timed_once_and_say_so():
    """Up to 16 rows the modes are exact mode's call: three times of it would be no three speeds."""
    names = ["torch", "ours exact", "ours fp16_accumulate", "ours int8"]
    few, many = (list(measure("Q8_0", Call(m, 64, 256, 1, "a test"), names, CPU, torch.float32, repeats=3)) for m in (16, 17))
    assert len({row["p50_ms"] for row in few[1:]}) == 1 and few[0]["p50_ms"] != few[1]["p50_ms"]
    assert [row["note"] for row in few] == ["", "", *["the same call as ours exact, timed once"] * 2]
    assert not any(row["note"] for row in many)
    alone = list(measure("Q8_0", Call(1, 64, 256, 1, "a test"), ["ours int8"], CPU, torch.float32, repeats=1))
    assert alone[0]["p50_ms"] and not alone[0]["note"]


@pytest.mark.parametrize("count", range(3, 9))
def test_every_side_runs_after_every_other_equally_often(count):
    """What runs after a heavy side pays for it. Turns are complete after `count`, or twice an odd one."""
    turns = [balanced_order(count, turn) for turn in range(count * (1 + count % 2))]
    assert all(sorted(order) == list(range(count)) for order in turns)
    after = Counter(pair for order in turns for pair in pairwise(order))
    assert len(after) == count * (count - 1) and len(set(after.values())) == 1
    seen = []
    interleaved({str(i): lambda i=i: seen.append(i) for i in range(count)}, 2 * len(turns), CPU)
    assert seen[count : 2 * count] == turns[0] and seen[2 * count : 3 * count] == turns[1]
    assert not any(one == other for one, other in pairwise(seen[count:]))


def test_runs_alternate_and_percentiles_are_ordered():
    order = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, CPU)
    # One warm-up each.
    assert "".join(order) == "ab" * 4
    assert {len(runs) for runs in times.values()} == {3}
    assert percentiles([5.0, 1.0, 3.0, 2.0, 4.0])[1] == 3.0


def test_the_column_of_graphs_is_the_median_of_replays(monkeypatch):
    """A CPU has no graph; on a GPU sides of one call share it, one that cannot be captured has none."""
    (row,) = measure("Q8_0", SMALL, ["torch"], CPU, torch.float32, repeats=2)
    assert row["graph_ms"] == "" and list(row).index("graph_ms") == list(row).index("p80_ms") + 1
    replays = {"torch": None, "ours exact": [3.0, 1.0, 2.0]}
    monkeypatch.setattr(linears, "graph_replayed", lambda functions, *_: {name: replays[name] for name in functions})
    call = Call(1, 64, 256, 1, "a test")
    rows = measure("Q8_0", call, ["torch", "ours exact", "ours int8"], CPU, torch.float32, repeats=1)
    assert [row["graph_ms"] for row in rows] == ["", "2.0000", "2.0000"]


def test_single_algorithms_are_timed_where_they_could_be_chosen():
    def kernels(m: int, dtype=torch.bfloat16, capability=(8, 6)) -> set[str]:
        return {name for name in default_providers(m, dtype, capability) if PROVIDERS[name].group == "kernels"}

    assert kernels(1) == {"ours small_m", "ours fused"}
    assert kernels(512) == kernels(4608) == {"ours fused", "ours two_stage"}
    assert kernels(512, capability=(9, 0)) == {"ours fused", "ours two_stage"}
    assert kernels(4608, capability=(9, 0)) == {"ours two_stage"}
    assert kernels(512, torch.float32) == {"ours two_stage"}


def test_the_most_informative_sides_and_calls_come_first():
    names = default_providers(512, torch.bfloat16, (8, 6))
    assert names[:2] == ["torch", "ours exact"] and names[-1] in ("ours fused", "ours two_stage")
    assert not [name for name in names if PROVIDERS[name].group == "peer" or "compiled" in name]
    calls = one_of_each_height_first(step_calls())
    assert [call.m for call in calls[:4]] == [4608, 4096, 512, 1]
    assert sorted(map(str, calls)) == sorted(map(str, step_calls()))
