"""Files that appear under their name only when they are complete, and what is asked before long work: can it be written?"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from .errors import FormatError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place and rename it, so that it appears under its name only when it is complete."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_writable(path: Path, option: str) -> None:
    """Raise FormatError where a file cannot be written: long work should not end with that.

    Args:
        path: of the file to be.
        option: of the command line, which the message names.
    """
    if not path.parent.is_dir():
        raise FormatError(f"{option} {path}: there is no folder {path.parent}. Make it, or name another place.")
    if path.is_dir():
        raise FormatError(f"{option} {path} is a folder. Name a file in it.")
    if not os.access(path if path.exists() else path.parent, os.W_OK) or not os.access(path.parent, os.W_OK):
        raise FormatError(f"{option} {path} cannot be written. Change its permissions, or name another place.")


def file_sha256(*paths: Path) -> str:
    """Return the sha256 of the bytes of one file, or of several one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
