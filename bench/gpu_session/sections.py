"""The sections, in order of what they decide, each with its limit in seconds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from bench.gpu_session import ceilings, geforce, host, int8, profiled, rates, step, sweep, tuning, two_stage
from bench.gpu_session.session import Session
from bench.record import ROOT
from flux_kernels.formats import FORMATS

_TESTS = "tests/gpu/test_on_gpu.py"  # the others need diffusers
_WORKERS = 12  # pytest processes: cores are 16, and each takes a CUDA context
_CUBLAS = "nvjet"
_TABLE = ("Q4_K", "Q8_0", "Q6_K")
_COMMON = ("Q5_K", "Q3_K", "Q2_K", "Q4_0", "Q5_0", "Q4_1", "Q5_1", "IQ4_NL", "IQ4_XS")
_PEERS = {  # file of rows -> providers
    "peers": (
        *("dequantize", "diffusers", "bitsandbytes nf4", "bitsandbytes int8", "bitsandbytes int8 no outliers"),
        *("quanto int8", "vllm-gguf-plugin triton", "vllm-gguf-plugin"),
    ),
    "peers_compiled": ("diffusers compiled", "torchao fp8 dynamic", "torchao int8 dynamic", "sdnq int8"),
    "peers_autotuned": ("gemlite int8 weight-only", "gemlite int8 dynamic"),
}


@dataclass(frozen=True)
class Section:
    """Name one part of the session: its limit in seconds, what runs it, decides, and took on an H200."""

    name: str
    seconds: float
    run: Callable[[Session], None]
    decides: str
    took: float | None = None


def correctness(session: Session) -> None:
    """Run the tests that a bare machine can, in parallel, into the log and a JUnit file."""
    report = f"--junitxml={session.out / 'junit.xml'}"
    wanted = ["-m", "gpu and not slow", _TESTS, "--no-header", "-p", "no:cacheprovider", report]
    if session.dry:
        from bench.gpu_session.dry import tests

        tests(session, [*wanted, *(["-k", "Q4_K"] if session.reduced else [])])
        return
    check([sys.executable, "-m", "pytest", "-v", "--tb=line", *wanted, "-n", str(_WORKERS), "--dist", "worksteal"])


def linears(session: Session) -> None:
    """Time every call of a step, the rows of the README's table."""
    _linears(session, "Q4_K" if session.reduced else ",".join(_TABLE), "torch,ours exact,ours int8,dequantize", "linear")


def other_linears(session: Session) -> None:
    """Time every call of a step in the types that the README's table leaves out, those of files first."""
    names = [*_COMMON, *(name for name in FORMATS if name not in (*_TABLE, *_COMMON))]
    _linears(session, "Q5_K" if session.reduced else ",".join(names), "torch,ours exact", "linear_others")


def _linears(session: Session, formats: str, providers: str, file: str, **more: object) -> None:
    options = ["--formats", formats, "--providers", providers, "--resume", "--write", str(session.out / f"{file}.csv")]
    if session.dry:
        from bench.gpu_session.dry import module

        module("bench.run", [*options, "--repeats", "1", *(["--calls", "2"] if session.reduced else [])])
        return
    check([sys.executable, "-m", "bench.run", *options, "--repeats", "10"], **more)


def peers(session: Session) -> None:
    """Time other libraries, those that compile nothing first, from the folder FLUX_KERNELS_PEERS."""
    if session.dry:
        print("peers run on a GPU alone")
        return
    paths = filter(None, [os.environ.get("PYTHONPATH"), os.environ.get("FLUX_KERNELS_PEERS")])
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join(paths))
    for file, others in _PEERS.items():
        _linears(session, "Q4_K,Q8_0", ",".join(("torch", "ours exact", "ours int8", *others)), file, env=environment)


def ncu(session: Session) -> None:
    """Read the hardware counters of each kernel once."""
    if session.dry:
        profiled.main(["--out", str(session.out)], dry=True)
        return
    if shutil.which("ncu") is None:
        print("ncu is not installed")
        return
    with (session.out / "ncu.csv").open("w") as file:
        check(profiled.command(session.out, [sys.executable]), stdout=file)


def racecheck(session: Session) -> None:
    """Look for races in shared memory with compute-sanitizer, in a few small kernels."""
    if session.dry or shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not run here")
        return
    tests = ["-m", "pytest", "-v", "-x", _TESTS, "-k", "racecheck", "-p", "no:cacheprovider"]
    command = ["compute-sanitizer", "--tool", "racecheck", "--target-processes", "all", sys.executable, *tests]
    done = subprocess.run(command, cwd=ROOT, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout)
    racing = racing_kernels(done.stdout)
    print(f"hazards in kernels of ours: {', '.join(racing) or 'none'}")
    if done.returncode or racing:
        raise RuntimeError(f"exit code {done.returncode}, races in {racing}")


def racing_kernels(text: str) -> list[str]:
    """Return the kernels in which racecheck saw races, without cuBLAS's.

    Those wait by means that it does not follow: on an H200 it reported four in torch's own product of the reference.
    """
    named = re.findall(r"Race reported between \w+ access at (\w+)", text)
    return sorted({name for name in named if not name.startswith(_CUBLAS)})


def check(command: list[str], **more) -> None:
    """Run a command in the repository's root; raise where it fails."""
    done = subprocess.run(command, cwd=ROOT, check=False, **more)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode} of {' '.join(command[:6])}")


SECTIONS = (
    Section("ceilings", 15, ceilings.run, "what the card does at best; whether int8 has a rival in cuBLAS", 2),
    Section("correctness", 75, correctness, "whether anything else is worth a look", 43),
    Section("two_stage", 25, two_stage.run, "rows at a time, bias, scratch", 14),
    Section("int8", 15, int8.run, "what scales in the loop cost, and the bound without them", 6),
    Section("sweep", 40, sweep.run, "up to how many rows fused decoding wins", 24),
    Section("small_m", 20, sweep.run_small_m, "the tile for one to eight rows", 8),
    Section("geforce", 30, geforce.run, "whether GeForce's default may decode in the product", 7),
    Section("tuning", 25, tuning.run, "the card's record", 10),
    Section("step", 120, step.run, "gaps between kernels, host time, the whole step", 86),
    Section("host", 15, host.run, "what a launch costs with a driver", 2),
    Section("linears", 50, linears, "the README's rows", 29),
    Section("ncu", 35, ncu, "stall reasons, L2 rates", 17),
    Section("rates", 15, rates.run, "whether the model counts with the right rates", 2),
    Section("peers", 160, peers, "whom a user would otherwise take"),
    Section("other_linears", 100, other_linears, "the other types' rows", 46),
    Section("racecheck", 45, racecheck, "races that no result shows", 13),
    Section("step_q6_k", 60, lambda session: step.run(session, ("Q6_K",)), "the type of most quality files", 44),
    Section("step_512", 60, lambda session: step.run(session, ("Q4_K",), "512x512"), "where the host's time shows", 40),
)
