"""The structure: which module may import which, what importing needs, and the rules of the layout."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flux_kernels
from flux_kernels.formats import FORMATS

PACKAGE = Path(flux_kernels.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(("flux_kernels", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in FILES
}
# From the bottom up; a module imports from its own folder and from those before it.
LAYERS = (
    *("errors", "version", "_triton", "files", "report", "formats", "gguf", "compute", "kernels", "torch_backend", "backends"),
    *("ops", "packing", "layers", "swap", "calibration", "models", "text_encoders", "install_hints", "machine", "source"),
)
# What users meet: any of them may import any of LAYERS, and these from those before them.
USES = ("integrations", "generation", "mixed", "convert", "plan", "measure", "benchmark", "cli", "__main__")
CORE = (
    *("errors", "_triton", "formats", "compute", "kernels", "torch_backend", "backends", "ops", "packing"),
    *("layers/eager", "layers/embedding", "layers/lazy_weight", "layers/linear", "layers/low_rank", "layers/row_scale"),
    *(
        "machine/clock",
        "machine/gpu_clock",
        "machine/random_rows",
        "machine/tune",
        "machine/tune_compile",
        "machine/tune_jobs",
    ),
)
RANK = {name: rank for rank, name in enumerate((*LAYERS, *USES))}
ROOT_MODULES = 12  # at most


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Return the absolute names a file imports, wherever in the file."""
    package = ["flux_kernels", *path.relative_to(PACKAGE).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            stem = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                whole = f"{stem}.{alias.name}"
                names.add(whole if not node.module or stem == "flux_kernels" or whole in MODULES else stem)
    return names


def own(path: Path) -> set[str]:
    """Return the modules of this package that a file imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("flux_kernels.")}


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != PACKAGE or path.name != "__init__.py"], ids=str)
def test_imports_point_downwards(path):
    for other in own(path):
        assert RANK[other] <= RANK[module_of(path)], f"{module_of(path)} must not import {other}"


def test_the_root_holds_few_modules():
    assert len(list(PACKAGE.glob("*.py"))) <= ROOT_MODULES and len(LAYERS) <= 25


@pytest.mark.parametrize("command", ["convert", "plan", "measure"])
def test_commands_that_make_files_import_none_of_each_other(command):
    others = {"convert", "plan", "measure"} - {command}
    assert not [path for path in (PACKAGE / command).glob("*.py") if own(path) & others]


def test_imports_make_no_circle():
    """Follow the imports of every module, those for type checkers and those inside functions too."""
    # Not the package's own file: the public names import from everywhere, and no module imports them (test above).
    edges = {
        name: imports(path) & MODULES.keys() - {"flux_kernels"} for name, path in MODULES.items() if name != "flux_kernels"
    }
    done: set[str] = set()

    def follow(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " imports ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(edges[name]):
                follow(other, (*way, name))
            done.add(name)

    for name in edges:
        follow(name, ())


ANY_DIGIT = re.compile(r"\\d|\.is(decimal|digit|numeric)\(")


def test_digits_in_names_are_ascii():
    """Names in files come from strangers, and `\\d` matches the digits of every script, which int() reads."""
    folders = ("gguf", "models", "text_encoders", "source", "mixed", "convert", "plan", "swap", "integrations")
    lines = {
        f"{path}: {line.strip()}"
        for folder in folders
        for path in (PACKAGE / folder).rglob("*.py")
        for line in path.read_text().splitlines()
        if ANY_DIGIT.search(line) and "isascii" not in line
    }
    assert not lines


def names_in(path: Path) -> set[str]:
    """Return every name that a file's code speaks, in capitals.

    Identifiers, attributes, modules, words of strings.

    Docstrings may name an example.
    """
    tree = ast.parse(path.read_text())
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    prose = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, scopes) and ast.get_docstring(node)}
    spoken = []
    for node in ast.walk(tree):
        for value in (value for _, value in ast.iter_fields(node) if isinstance(value, str)):
            if id(node) not in prose:
                spoken += re.findall(r"\w+", value)
    return {name.upper() for name in spoken}


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_know_no_format_by_name(path):
    """A format's name is no import, no key and no word of a message in kernels.

    What odd formats need stands in odd_tiles.csv, the rest in their rows.
    """
    assert not names_in(path) & FORMATS.keys()


def test_a_format_in_the_source_would_be_noticed(tmp_path):
    ways = {
        "Q4_K": 'TILES = {"Q4_K": 1}',
        "IQ1_S": "from ..formats import iq1_s",
        "Q8_0": "row = formats.q8_0.FORMAT",
        "Q6_K": "def f(q6_k): ...",
        "Q5_1": "f = lambda x: f'needs {x}, such as Q5_1'",
    }
    for name, code in ways.items():
        (tmp_path / "odd.py").write_text(f'"""Take Q2_K, say."""\n{code}\n')
        assert names_in(tmp_path / "odd.py") & FORMATS.keys() == {name}


def test_the_core_imports_torch_and_triton_only():
    for path in FILES:
        relative = path.relative_to(PACKAGE).with_suffix("")
        if {relative.parts[0], relative.as_posix()} & set(CORE):
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
