"""Commands that README, documentation and messages give are parsed by the program they are for."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

import flux_kernels as fk
from flux_kernels import install_hints
from flux_kernels.generation.base_pipeline import check_base
from flux_kernels.install_hints import PIPELINE_DOWNLOAD, install_command
from flux_kernels.models.architectures.flux1 import FLUX1

ROOT = Path(fk.__file__).parents[1]
TEXTS = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / ".github").rglob("*.yml")),
    *(*(ROOT / "docs").rglob("*.md"), *(ROOT / "flux_kernels").rglob("*.py")),
]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys() | {""}


def commands(start: str) -> list[str]:
    """Return the commands beginning with `start` in all texts: lines of their own, or between backticks."""
    lines = []
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        lines += re.findall(rf"(?m)^ {{4,}}({start} [^\n]*?)(?:\s{{2,}}#.*)?$", text)
        lines += re.findall(rf"`({start} [^`\n]*)`", text)
    return lines


def downloaded(command: str, monkeypatch) -> dict:
    """Parse a command by the installed hf; return what it would download."""
    from huggingface_hub.cli import download, hf

    asked: dict = {}

    def record(**given):
        asked.update(given)
        return "nowhere"

    monkeypatch.setattr(download, "snapshot_download", record)
    monkeypatch.setattr(download, "hf_hub_download", record)
    hf.app.main(shlex.split(command)[1:], standalone_mode=False)
    return asked


def test_the_download_leaves_the_transformer_out_whatever_its_file_is_called(monkeypatch):
    """All patterns arrive: `--exclude` of this hf takes one value.

    A second would be the name of a file.
    """
    asked = downloaded(PIPELINE_DOWNLOAD, monkeypatch)
    assert asked["repo_id"] == "black-forest-labs/FLUX.1-dev"
    assert asked["ignore_patterns"] == ["transformer/*", "flux1-dev*", "*.sft", "ae.safetensors"]
    assert not asked.get("allow_patterns")


def test_every_download_in_a_text_is_that_one(monkeypatch, tmp_path):
    """README's line, and the one in the message of a base folder that is not there."""
    downloads = commands("hf download")
    assert downloads
    assert set(downloads) == {PIPELINE_DOWNLOAD}
    with pytest.raises(FileNotFoundError) as error:
        check_base(tmp_path / "missing", FLUX1)
    assert f"`{PIPELINE_DOWNLOAD}`" in str(error.value)


def test_every_pip_line_can_be_run_in_a_clone():
    """Nothing is installed from an index under this package's name.

    Each extra is one that pyproject.toml has.
    """
    lines = [line for line in commands("pip install") if "libggml" not in line and "triton" not in line]
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line)
        assert "-e" in words, line
        target = re.fullmatch(r"\.(?:\[(.*)\])?", words[words.index("-e") + 1])
        assert target, line
        assert set((target[1] or "").split(",")) <= EXTRAS, line
        assert words[words.index("-c") + 1] == "constraints.txt"


@pytest.mark.parametrize("extra", sorted(EXTRAS - {"test"}))
def test_a_checkout_installs_from_itself(extra):
    """The command works from any folder, and pip takes it apart as it stands."""
    words = shlex.split(install_command(extra))
    assert words[:3] == ["pip", "install", "-c"]
    assert Path(words[3]).is_file()
    assert words[5] == f"{ROOT}[{extra}]" if extra else words[5] == str(ROOT)


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_an_installed_package_names_what_an_extra_needs(extra, monkeypatch, tmp_path):
    """Where no checkout is, the packages themselves are named, those of extras in extras included."""
    monkeypatch.setattr(install_hints, "_PACKAGE", tmp_path / "flux_kernels")
    words = shlex.split(install_command(extra))
    assert words[:2] == ["pip", "install"] and not any("flux" in word for word in words)
    names = {re.match(r"[\w-]+", word)[0].lower() for word in words[2:]}
    expected = {"plan": {"scipy", "matplotlib"}, "bench": {"gguf"}, "test": {"scipy", "gguf", "pytest"}, "": {"torch"}}
    assert names >= expected.get(extra, set())
    from packaging.requirements import Requirement

    assert all(Requirement(word) for word in words[2:])


def test_flux_kernels_commands_of_the_readme_exist():
    """Every `flux-kernels NAME --option` in an indented line names a command and options that it has."""
    from typer.main import get_command

    from flux_kernels.cli import app

    known = get_command(app).commands
    lines = [line for line in commands("flux-kernels") if not line.startswith("flux-kernels ...")]
    assert len(lines) >= 12
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        name = next((word for word in words if not word.startswith("-")), None)
        if name is None:
            continue
        assert name in known, line
        options = {option for parameter in known[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
        used = {word.partition("=")[0] for word in words[words.index(name) + 1 :] if word.startswith("--")}
        assert used <= options | {"--help"}, line


def test_modules_that_the_texts_run_exist():
    """`python -m NAME` of this repository: a module, or a folder that can be run."""
    names = {match for line in commands("python -m") for match in re.findall(r"python -m ([\w.]+)", line)}
    ours = [ROOT.joinpath(*name.split(".")) for name in names if name.split(".")[0] in ("bench", "tools", "flux_kernels")]
    assert ours
    assert not [path for path in ours if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file()]
