"""Compiled code of the shipped kernels, for cards that are not here: `bench.aot` in a process of its own.

A kernel that was decorated for the interpreter (as in the rest of this session) cannot be compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia", reason="Triton's NVIDIA backend compiles the kernels")

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> dict:
    """Run the report and return its JSON."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "bench.aot", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_wide_tiles_of_every_format_keep_the_invariants_on_every_card():
    """No spills, tensor cores, one decode per weight, asynchronous weight loads, shared memory within the card, ratchet."""
    report = run("--kernels", "wide")
    assert not report["problems"], "\n".join(report["problems"])
    from bench.aot.cards import CARDS
    from flux_kernels.formats import FORMATS

    assert {(row["format"], row["capability"]) for row in report["rows"]} == {(name, cap) for name in FORMATS for cap in CARDS}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_small_tiles_keep_the_invariants(dtype):
    report = run("--formats", "Q4_K,Q8_0", "--capabilities", "86,90", "--kernels", "medium,narrow", "--dtype", dtype)
    assert not report["problems"], "\n".join(report["problems"])


def test_the_other_kernels_keep_the_invariants():
    """The compute modes, unpack and small-M kernels: no spills, tensor cores where there are products."""
    kernels = "split_k,small_m,fp16,int8,int8_branch,int8_rows,dequantize,unpack_int8,unpack_int8_rows,row_largest"
    report = run("--formats", "Q4_K,Q8_0,Q6_K", "--capabilities", "86,90", "--kernels", kernels)
    assert not report["problems"], "\n".join(report["problems"])
    names = {"split_k", "small_m", "fp16_gemm", "int8_gemm", "int8_gemm_branch", "int8_gemm_rows", "dequantize"}
    names |= {"unpack_int8", "unpack_int8_rows", "row_largest"}
    assert {row["kernel"] for row in report["rows"]} == names


def test_branches_do_not_spill_where_the_default_tile_would():
    reports = [run("--formats", "IQ3_S", "--capabilities", "80", "--kernels", "wide_branch")]
    reports += [run("--formats", "Q5_1", "--capabilities", "120", "--kernels", "wide_branch")]
    reports += [run("--formats", "Q4_K", "--capabilities", "80", "--kernels", "fp16_branch")]
    problems = [problem for report in reports for problem in report["problems"]]
    assert not problems, "\n".join(problems)


def test_float32_activations_use_no_tensor_cores():
    """Triton's default for float32 is TF32, which the interpreter hides; IEEE products have no tensor-core instruction."""
    report = run("--formats", "Q4_K", "--capabilities", "86,90", "--kernels", "medium", "--dtype", "fp32")
    assert report["rows"]
    for row in report["rows"]:
        assert row["mma"] == ""
        assert row["loop_fp32"] > 0


def test_a_broken_invariant_is_found():
    """The gate is able to fail: a spilling, non-tensor-core, twice-decoding row is refused with one sentence each."""
    from bench.aot.invariants import problems
    from bench.aot.report import Row

    good = run("--formats", "Q8_0", "--capabilities", "86", "--kernels", "narrow")["rows"][0]
    bad = good | dict(spills=3, mma="", decodes_per_weight=2.0, loop_global=4, shared_bytes=10**6)
    found = problems(Row(**bad), good | dict(loop_instructions=good["loop_instructions"] / 1.06))
    assert len(found) == 6
    assert problems(Row(**good), good) == []
