"""Files in parts, "model-00001-of-00003.gguf" and so on: any part stands for all of them.

Source: llama.cpp's gguf-split: each part has the keys split.no, split.count and split.tensors.count, the first has all others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import GGUFError
from .spec import shown_path

_COUNT, _NUMBER, _TENSORS = "split.count", "split.no", "split.tensors.count"
_PART = re.compile(r"-([0-9]{5})-of-([0-9]{5})\.gguf$", re.IGNORECASE)
# llama.cpp numbers with five digits; far fewer are of use.
_MOST_PARTS = 1000


def part_paths(path: str, metadata: Mapping[str, Any]) -> list[str]:
    """Return the paths of all parts of a file, its own among them; [path] where it is whole.

    Raises:
        GGUFError: where a part is not there, or the name does not say where the others are.
    """
    count = metadata.get(_COUNT, 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise GGUFError(f"{shown_path(path)}: the key {_COUNT!r} is {count!r}; legal is a number of parts. Get the file again.")
    if count <= 1:
        return [path]
    match = _PART.search(path)
    if match is None or int(match[2]) != count or count > _MOST_PARTS:
        raise GGUFError(
            f"{shown_path(path)}: one of {count} parts by its keys, but its name does not end in -00001-of-{count:05}.gguf, so the "
            "others cannot be found. Give all parts the names that they had."
        )
    stem = path[: match.start()]
    paths = [f"{stem}-{number:05}-of-{match[2]}{path[-len('.gguf') :]}" for number in range(1, count + 1)]
    missing = [part for part in paths if not os.path.isfile(part)]
    if missing:
        names = ", ".join(os.path.basename(part) for part in missing[:3])
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise GGUFError(
            f"{shown_path(path)}: one of {count} parts; {names}{more} {'is' if len(missing) == 1 else 'are'} not beside it."
        )
    return paths


@contextmanager
def hint_of_part(path: str, metadata: Mapping[str, Any]) -> Iterator[None]:
    """Say in a GGUFError about what a file lacks that it looks like a part.

    Its name does, where its keys do not say so.

    Args:
        path: of the file.
        metadata: its key-values.
    """
    try:
        yield
    except GGUFError as error:
        match = _PART.search(path)
        if match is None or _COUNT in metadata or int(match[2]) < 2:
            raise
        raise GGUFError(
            f"{error} By its name it is part {int(match[1])} of {int(match[2])}, but it lacks the key {_COUNT!r} by which parts are put "
            "together: get the model as one file, or in parts made by llama.cpp's gguf-split."
        ) from None


def check_parts(path: str, parts: Sequence[Mapping[str, Any]], tensors: int) -> None:
    """Raise GGUFError where parts are not of one file, or hold another number of tensors than they say.

    Args:
        path: that was given.
        parts: the key-values of each part, in order.
        tensors: that they hold together.
    """
    for number, metadata in enumerate(parts):
        if (metadata.get(_COUNT), metadata.get(_NUMBER, number)) != (len(parts), number):
            raise GGUFError(
                f"{shown_path(path)}: the keys of part {number + 1} of {len(parts)} say {metadata.get(_COUNT)} parts and number "
                f"{metadata.get(_NUMBER)}. It is a part of another file."
            )
    stated = parts[0].get(_TENSORS, tensors)
    if stated != tensors:
        raise GGUFError(
            f"{shown_path(path)}: its parts hold {tensors} tensors, their keys say {stated}. They are not of one model."
        )
