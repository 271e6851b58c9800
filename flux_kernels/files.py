"""Files that appear under their name only when they are complete.

Also what is asked before long work: can the file be written?
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import FormatError


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new path beside `path` to write to, and rename it when the block ends.

    It is removed where the block raises.

    The file appears under its name only when it is complete, and two writers of one file do not meet: the last one counts.
    A link is followed, so that it stays one.

    Raises:
        PermissionError: where the system does not let it be renamed, as Windows does while the file there is open or mapped.
    """
    target = Path(os.path.realpath(os.fsdecode(path)))
    part = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        _rename(part, target)
    finally:
        part.unlink(missing_ok=True)


def _rename(part: Path, target: Path) -> None:
    try:
        os.replace(part, target)
    except PermissionError as error:
        reason = f"{error.strerror} (on Windows a file that a model was loaded from cannot be replaced: write another)"
        raise PermissionError(error.errno, reason, str(target)) from error


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file that appears under its name only when it is complete."""
    with written_whole(path) as part:
        part.write_bytes(data)


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


def file_sha256(*paths: str | os.PathLike[str]) -> str:
    """Return the sha256 of the bytes of one file, or of several one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
