"""Compiled code of what the library launches, for cards that are not here, and its record.

`bench.aot` runs in a process of its own.

A kernel that was decorated for the interpreter (as in the rest of this session) cannot be compiled.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia", reason="Triton's NVIDIA backend compiles the kernels")

ROOT = Path(__file__).parents[1]
# Tritons: the oldest that pyproject.toml allows, and that of constraints.txt
OLDEST, PINNED = "3.6.0", "3.7.1"


def python(*arguments: str) -> subprocess.CompletedProcess:
    """Run Python at the root without Triton's interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def run(*arguments: str) -> dict:
    """Run the report and return its JSON."""
    done = python("-m", "bench.aot", "--json", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_versions_are_the_project_s():
    assert f'"triton>={OLDEST.removesuffix(".0")};' in (ROOT / "pyproject.toml").read_text()
    assert f"triton=={PINNED};" in (ROOT / "constraints.txt").read_text()


def test_no_tile_ships_that_was_not_compiled():
    """Every kernel that the tables launch on every card has a row under both Tritons."""
    done = python("-m", "bench.aot", "--list", "--tritons", f"{PINNED},{OLDEST}", "--check")
    run_them = f"python -m bench.aot.versions {PINNED} {OLDEST} -- --missing --write ..."
    assert done.returncode == 0, f"{done.stdout[-4000:]}\nRun: {run_them}"


CALLS = """
from itertools import product

from bench.aot.launches import DTYPES, launched, launches
from flux_kernels.compute import WEIGHT_ONLY_M
from flux_kernels.models.calls import STEPS, step_calls
from flux_kernels.formats import FORMATS
from flux_kernels.kernels.choice import default_choice

calls = {(call.m, call.n, call.k) for step in STEPS.values() for call in step_calls(**step)}
calls |= {(4096, 3072, 64), (512, 3072, 4096), (4096, 64, 3072), (512, 10240, 4096)}  # embedders, last projection, T5
for capability in (86, 90):
    compiled = {(one.name, one.format, one.dtype, one.tile) for one in launches(capability)}
    anywhere = {(name, tile) for name, format, _, tile in compiled if format == "any"}
    for name in ("Q4_K", "Q8_0"):
        for m, n, k in calls:
            fmt, modes = FORMATS[name], ("exact", "int8") if m > WEIGHT_ONLY_M else ("exact",)
            if k % fmt.block_size:
                continue
            for compute, dtype, branch in product(modes, DTYPES, (False, True)):
                choice = default_choice(compute, fmt, m, n, k, divmod(capability, 10), DTYPES[dtype], branch)
                for one in launched(compute, fmt, (m, n, k), dtype, branch, choice):
                    known = {(one.name, name, dtype, one.tile), (one.name, name, "any", one.tile)} & compiled
                    if not known and (one.name, one.tile) not in anywhere:
                        print(capability, m, n, k, one.name, name, dtype, one.tile)
"""


def test_the_calls_of_a_flux_step_launch_nothing_else():
    """The calls of a FLUX step launch kernels and tiles that the report lists, whatever M, N and K.

    Of every picture size, the embedders and T5.
    """
    done = python("-c", CALLS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stdout, done.stdout


def test_recorded_rows_keep_the_invariants():
    """Every row of both Tritons keeps the invariants.

    No spills, shared memory within the card, tensor cores, one decode per weight, and so on.
    """
    from bench.aot.invariants import problems
    from bench.aot.recorder import read_record
    from bench.aot.report import Row

    kinds = {field.name: dict(int=int, float=float, str=str)[field.type] for field in fields(Row)}
    rows = [Row(**{name: kind(row[name]) for name, kind in kinds.items()}) for row in read_record().values()]
    assert {row.dtype for row in rows} == {"bf16", "fp16", "fp32", "any"}
    broken = [problem for row in rows for problem in problems(row, None)]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    "kernels", ["fused_gemm", "fused_gemm_branch,small_m_codes,dequantize", "fp16_gemm,int8_gemm,int8_gemm_rows"]
)
def test_compiled_rows_are_the_recorded_ones(kernels):
    """A sample compiled now keeps the invariants and the ratchet against its rows."""
    report = run(
        "--kernels", kernels, "--formats", "Q4_K,Q8_0", "--capabilities", "86,90", "--rows", "512,1", "--dtypes", "bf16"
    )
    assert not report["problems"], "\n".join(report["problems"])
    assert {row["kernel"] for row in report["rows"]} == set(kernels.split(","))


def test_float32_activations_have_no_fused_tile():
    """A fused tile would need more shared memory than a GeForce has, or spill.

    The kernels that are launched instead use no tensor cores.
    """
    kernels = "fused_gemm,fused_gemm_branch,split_k,small_m,dequantize"
    report = run("--formats", "Q6_K", "--capabilities", "86,90", "--kernels", kernels, "--dtypes", "fp32")
    assert not report["problems"], "\n".join(report["problems"])
    assert {row["kernel"] for row in report["rows"]} == {"small_m", "dequantize"}
    assert all(row["mma"] == "" for row in report["rows"])


def test_a_broken_invariant_is_found():
    """The gate is able to fail: a row that breaks rules is refused with one sentence each.

    It spills, uses no tensor core, and decodes twice.
    """
    from bench.aot.invariants import problems
    from bench.aot.report import Row

    good = run("--formats", "Q8_0", "--capabilities", "86", "--kernels", "fused_gemm", "--dtypes", "bf16", "--rows", "16")[
        "rows"
    ]
    good = next(row for row in good if row["k"] > 64)
    bad = good | dict(spills=3, mma="", decodes_per_weight=2.0, loop_global=4, shared_bytes=10**6)
    broken = problems(Row(**bad), good | dict(loop_instructions=good["loop_instructions"] / 1.06))
    assert len(broken) == 6
    assert problems(Row(**good), good) == []
    slow = good | dict(kernel="small_m", format="Q8_0", tile="64x256 warps 4", instructions_per_weight=99.0)
    assert "99.0 instructions per weight" in problems(Row(**slow), None)[0]
    rounded = good | dict(dtype="fp32", mma="HMMA.1688.F32.TF32", decodes_per_weight=0.0)
    assert "rounds float32 products" in problems(Row(**rounded), None)[0]


def hash_of(path: Path, text: str) -> str:
    """Return the hash of the kernel in a module of this text."""
    from triton.runtime.jit import JITFunction

    from bench.aot.code_of import code_of

    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.inner = JITFunction(module.inner)
    return code_of(JITFunction(module.outer), (("K", 3072),))


def test_a_row_is_out_of_date_when_its_kernel_changes_and_only_then(tmp_path):
    """What a kernel calls and the constants it names count; comments, docstrings and lines above do not."""
    code = "STEP = 16\n\ndef inner(x):\n    return x + STEP\n\ndef outer(x):\n    return inner(x) * 2\n"
    first = hash_of(tmp_path / "first.py", code)
    same = code.replace("def outer(x):\n", 'def outer(x):\n    """Double."""\n    # twice\n').replace("STEP =", "\n\nSTEP =")
    assert hash_of(tmp_path / "same.py", same) == first
    changes = [("STEP = 16", "STEP = 32"), ("x + STEP", "x - STEP"), ("* 2", "* 3")]
    others = {hash_of(tmp_path / f"other{i}.py", code.replace(*change)) for i, change in enumerate(changes)}
    assert len(others | {first}) == 4


def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    """Rows are kept as they come, and `--missing` compiles what the file lacks.

    Or what it has from another state of the source.
    """
    path = tmp_path / "record.csv"
    options = ("--formats", "Q8_0", "--capabilities", "86", "--kernels", "dequantize", "--k", "3072", "--write", str(path))
    assert len(run(*options, "--dtypes", "bf16")["rows"]) == 1
    assert {row["dtype"] for row in run(*options, "--missing")["rows"]} == {"fp16", "fp32"}
    header, first, *others = path.read_text().splitlines()
    assert len(others) == 2
    other_source = first[: first.rindex(",")] + ",000000000000"
    path.write_text("\n".join([header, other_source, others[0]]) + "\n")
    assert {row["dtype"] for row in run(*options, "--missing")["rows"]} == {first.split(",")[4], others[1].split(",")[4]}
    assert sorted(path.read_text().splitlines()) == sorted([header, first, *others])
