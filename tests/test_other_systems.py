"""Windows and macOS, as far as Linux can show.

What their Python lacks is asked for before it is used, and hidden here.
"""

from __future__ import annotations

import ast
import mmap
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flux_kernels as fk
from flux_kernels.files import write_whole
from flux_kernels.machine import silence, tune_compile

from .gguf_bytes import small

PACKAGE = Path(fk.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NO_WINDOWS = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
# Attributes that Windows' Python lacks (documentation of os, signal and mmap: "Availability: Unix"), by the files that ask first.
UNIX = {
    "os": {"fork", "getloadavg", "getuid", "geteuid", "pread", "register_at_fork", "sched_getaffinity", "statvfs", "sysconf"}
    | {"uname", "posix_fadvise", "killpg", "mkfifo", "nice", "wait4"},
    "signal": {"SIGALRM", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "alarm", "pause", "setitimer"},
    "mmap": {"MAP_PRIVATE", "MAP_SHARED", "PROT_READ", "PROT_WRITE", "MADV_DONTNEED"},
}
ASKED_FIRST = {
    "gguf/file.py": {"MAP_PRIVATE", "PROT_READ", "PROT_WRITE"},
    "machine/tune_compile.py": {"SIGALRM", "alarm"},
    "torch_backend/cpu_threads.py": {"register_at_fork"},
}


def unix_only(path: Path) -> set[str]:
    """Return the names of modules and attributes in a file that Windows lacks."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            used |= {alias.name for alias in node.names} & NO_WINDOWS
        elif isinstance(node, ast.ImportFrom) and not node.level:
            used |= {node.module} & NO_WINDOWS | {alias.name for alias in node.names} & UNIX.get(node.module, set())
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used |= {node.attr} & UNIX.get(node.value.id, set())
    return used


def test_what_windows_lacks_is_used_where_it_is_asked_for_only():
    """Each place of this list has a test that hides what it asks for.

    Those below, and the pool of tests/torch_backend/test_cpu_threads.py.
    """
    used = {path.relative_to(PACKAGE).as_posix(): unix_only(path) for path in FILES}
    assert {name: names for name, names in used.items() if names} == ASKED_FIRST


def test_sources_print_on_consoles_of_any_code_page():
    assert not [path for path in FILES if not path.read_bytes().isascii()]


def test_text_files_are_written_in_a_named_encoding():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "write_text":
                assert "encoding" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"


@pytest.fixture
def gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(small())
    return path


def test_a_gguf_file_is_mapped_without_unix_flags(gguf_file, monkeypatch):
    expected = {name: tensor.data.clone() for name, tensor in fk.read_gguf(gguf_file).tensors.items()}
    monkeypatch.setattr(sys, "platform", "win32")
    for name in UNIX["mmap"]:
        monkeypatch.delattr(mmap, name, raising=False)
    tensors = fk.read_gguf(gguf_file).tensors
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor.data, expected[name]) for name, tensor in tensors.items())


def test_a_file_that_windows_does_not_replace_is_named(tmp_path, monkeypatch):
    """And the new one does not stay beside it."""

    def refuse(source, target):
        raise PermissionError(13, "Access is denied", str(source), None, str(target))

    target = tmp_path / "model.gguf"
    target.write_bytes(b"loaded")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError, match="Access is denied .*write another") as error:
        write_whole(target, b"new")
    assert error.value.filename == str(target)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"loaded"]


def test_kernels_compile_without_an_alarm(monkeypatch):
    """Windows has none; a compiler that hangs is waited for."""
    monkeypatch.setattr(tune_compile, "signal", SimpleNamespace())
    assert tune_compile._within(1, "{} {}".format, "q4_k", 64) == "q4_k 64"
    assert hasattr(signal, "alarm") == (sys.platform != "win32")


def test_standard_output_is_silenced_without_a_c_library_to_flush(monkeypatch, capfd):
    """Windows has no C library to be reached as the process itself."""
    monkeypatch.setattr(silence.ctypes, "CDLL", lambda _: pytest.fail("there is none"))
    own = SimpleNamespace(name="nt", dup=os.dup, dup2=os.dup2, close=os.close, devnull=os.devnull)
    monkeypatch.setattr(silence, "os", own)
    with silence.silenced(silence.STDOUT):
        os.write(1, b"a note of a solver")
    assert capfd.readouterr().out == ""
