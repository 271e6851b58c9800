"""Run tests/aot/compiled, each part in a process whose kernels can be compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia", reason="Triton's NVIDIA backend compiles the kernels")

from bench.aot.sweep.cases import KERNELS

ROOT = Path(__file__).parents[2]
# Parts of about the same time, for two workers: starting a process costs as much as three cases.
SWEEP = [
    ("narrow", "wide"),
    ("medium", "small_m", "dequantize"),
    ("split_k", "unpack_int8", "narrow_branch", "wide_branch", "small_m_branch", "fp16_branch"),
    ("fp16", "unpack_int8_rows", "quantize_activation", "int8", "int8_rows", "int8_branch", "int8_rows_branch"),
]


def run(*arguments: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *arguments]
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_parts_are_all_kernels():
    assert sorted(kernel for part in SWEEP for kernel in part) == sorted(KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("part", SWEEP, ids="-".join)
def test_every_kernel_with_every_format(part):
    run("tests/aot/compiled/test_sweep.py", "-k", " or ".join(f"[{kernel}-" for kernel in part))


@pytest.mark.parametrize("names", [("hidden",), ("planted", "card")], ids="-".join)
def test_compiled(names):
    run(*(f"tests/aot/compiled/test_{name}.py" for name in names))
