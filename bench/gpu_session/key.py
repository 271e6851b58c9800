"""Compute Triton's cache key of a wheel that cannot be imported here, built for another Python.

Every entry of Triton's cache on disk is named after a hash of the kernel, the options and `triton_key`, which covers Triton's own
sources and its compiled library, built once per Python. With the key of the GPU machine's wheel, kernels compiled here serve
there. Source: triton/runtime/cache.py, `triton_key`, of 3.6 to 3.7.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

Tree = Path | zipfile.Path


def triton_key_of(wheel: Path) -> str:
    """Return `triton_key()` of a wheel file, or of a folder that holds an unpacked `triton`."""
    tree: Tree = zipfile.Path(wheel) if wheel.is_file() else wheel
    package = tree / "triton"
    parts = [_hash(package / "runtime" / "cache.py")]
    parts += [_hash(file) for name in ("compiler", "backends") for file in _modules(package / name)]
    parts.append(_hash(package / "_C" / "libtriton.so"))
    parts += [_hash(file) for file in _modules(package / "language")]
    return _version(package) + "-".join(parts)


def short(key: str) -> str:
    """Return what is shown of a key."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _version(package: Tree) -> str:
    match = re.search(r"^__version__ = ['\"](.+)['\"]", (package / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise ValueError(f"{package} has no version")
    return match[1]


def _modules(folder: Tree) -> Iterator[Tree]:
    """Yield a package's modules in pkgutil.walk_packages' order: by name, a package before its parts."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir() and (entry / "__init__.py").is_file():
            yield entry / "__init__.py"
            yield from _modules(entry)
        elif entry.name.endswith(".py") and entry.name != "__init__.py":
            yield entry


def _hash(file: Tree) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
