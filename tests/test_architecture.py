"""The structure: which module may import which, what importing needs, and the rules of the layout."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flux_kernels

PACKAGE = Path(flux_kernels.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# Layers from the bottom up; a module may import from its own layer and from those before it.
LAYERS = [
    ("errors", "_triton", "gpu_clock", "clock"),
    ("formats", "compute", "low_rank"),
    ("reference", "random_rows", "kernels", "gguf_spec", "gguf_header", "libggml", "tensor_check"),
    ("low_precision", "cpu_threads", "cpu_decode", "cpu_linear", "tune_candidates", "tune_compile", "tune"),
    ("torch_backend",),
    ("backends",),
    ("ops", "packing", "gguf_file", "gguf_write"),
    ("eager", "lazy_weight", "layer_row_scale"),
    ("linear", "embedding"),
    (
        "footprint",
        "pinned",
        "swap_report",
        "takeover",
        "calibration",
        "fidelity",
        "fidelity_table",
        "outliers",
        "runs",
        "fused_linear",
    ),
    ("fuse",),
    ("diffusers_guard", "swap_plan"),
    ("swap",),
    ("flux", "t5"),
]
CORE = (
    "errors",
    "_triton",
    "gpu_clock",
    "clock",
    "random_rows",
    "tune_candidates",
    "tune_compile",
    "tune",
    "formats",
    "compute",
    "low_rank",
    "reference",
    "low_precision",
    "libggml",
    "cpu_decode",
    "cpu_linear",
    "cpu_threads",
    "torch_backend",
    "kernels",
    "backends",
    "eager",
    "ops",
    "packing",
    "lazy_weight",
    "layer_row_scale",
    "linear",
    "embedding",
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
TOP = len(LAYERS)  # integrations, mixed, cli and what else users touch: may import everything


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Return the absolute names a file imports, wherever in the file."""
    package = ["flux_kernels", *path.relative_to(PACKAGE).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = ".".join(part for part in (base, node.module) if part)
            found |= {stem} if node.module else {f"{stem}.{alias.name}" for alias in node.names}
            if stem == "flux_kernels":
                found |= {f"{stem}.{alias.name}" for alias in node.names}
    return found


def own(path: Path) -> set[str]:
    """Return the modules of this package that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("flux_kernels.")}


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != PACKAGE or path.name != "__init__.py"], ids=str)
def test_imports_point_downwards(path):
    mine = RANK.get(module_of(path), TOP)
    for other in own(path):
        assert RANK.get(other, TOP) <= mine, f"{module_of(path)} must not import {other}"


def test_kernels_know_no_format_by_name():
    for path in (PACKAGE / "kernels").glob("*.py"):
        names = {name.split(".")[-1] for name in imports(path) if name.startswith("flux_kernels.formats.")}
        assert all(name.startswith("_") or name in ("BlockFormat", "formats", "SLICE", "SUPERBLOCK") for name in names)


def test_the_core_imports_torch_and_triton_only():
    for path in FILES:
        if module_of(path) in CORE:
            outside = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names
            assert outside <= {"torch", "flux_kernels", "triton", "libggml"}, path


def test_triton_is_imported_in_one_place():
    users = [path.name for path in FILES if any(name.split(".")[0] == "triton" for name in imports(path))]
    assert users == ["_triton.py"]


def test_no_file_is_named_for_nothing():
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "common", "misc")]


def test_files_stay_short():
    assert not [path.name for path in FILES if len(path.read_text().splitlines()) > 350]


def test_every_lazy_name_is_public():
    assert set(flux_kernels._LAZY) <= set(flux_kernels.__all__)


BARE = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)

sys.meta_path.insert(0, Blocker())
import torch

def no_cuda(*args, **kwargs):
    raise AssertionError("CUDA was touched")

torch.cuda.is_available = torch.cuda.get_device_capability = torch.cuda.current_device = torch.cuda._lazy_init = no_cuda
import flux_kernels as fk

assert not [name for name in sys.modules if name.split(".")[0] in {blocked!r}]
torch.cuda.is_available = lambda: False
model = torch.nn.Sequential(torch.nn.Linear(256, 32))
report = fk.swap_linear(model, format="Q8_0")
assert model(torch.randn(2, 256)).shape == (2, 32) and len(report.swapped) == 1
"""
BLOCKED = (
    "triton",
    "gguf",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "libggml",
    "typer",
    "rich",
    "safetensors",
    "numpy",
)


def test_the_package_works_with_torch_alone():
    """Import, quantize, swap and run with everything else blocked and no CUDA call at import."""
    command = [sys.executable, "-c", BARE.format(blocked=BLOCKED)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
