"""The files of every tiny pipeline, made once for the tests of this folder."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest

from .tiny_pipelines import write_base, write_packed


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Return a function that makes the files of a class once: base folder, GGUF file, twin of the file."""

    @cache
    def make(kind: str) -> SimpleNamespace:
        folder = tmp_path_factory.mktemp(kind)
        base = write_base(kind, folder / "base")
        return SimpleNamespace(base=base, gguf=folder / "file.gguf", twin=write_packed(kind, folder / "file.gguf"))

    return make
