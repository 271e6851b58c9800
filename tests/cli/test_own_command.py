"""What the commands tell people to type next is something that the shell can start."""

from __future__ import annotations

import sys

import pytest

from flux_kernels.cli._own_command import own_command


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Make a started `flux-kernels` in a virtual environment that was not activated."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    path = folder / "flux-kernels"
    path.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["venv/bin/flux-kernels", "demo"])
    return path


def test_off_the_path_it_is_named_as_it_was_started(program):
    assert own_command() == "venv/bin/flux-kernels"


def test_on_the_path_its_name_is_enough(program, monkeypatch):
    monkeypatch.setenv("PATH", str(program.parent))
    assert own_command() == "flux-kernels"


def test_another_installation_on_the_path_is_not_meant(program, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "flux-kernels").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(other))
    assert own_command() == "venv/bin/flux-kernels"


def test_a_module_that_was_started_is_started_again(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/flux_kernels/__main__.py"])
    monkeypatch.setattr(sys, "executable", "/an/env/bin/python")
    assert own_command() == "/an/env/bin/python -m flux_kernels"


def test_called_from_python_it_has_no_path(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    assert own_command() == "flux-kernels"
