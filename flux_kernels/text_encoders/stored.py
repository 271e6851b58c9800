"""Open a text encoder's file: recognise it, locate its tensors and read its config; no weight is read."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import GGUFError
from ..gguf.check import check_weight_type, tensor_problems
from ..gguf.file import GGUFFile, GGUFTensor, read_gguf
from ..gguf.split import hint_of_part
from .encoder import TextEncoder
from .encoders import TEXT_ENCODERS
from .model_class import empty_model


@dataclass(frozen=True)
class StoredEncoder:
    """Hold what is known about a text encoder's file before any weight is read.

    Attributes:
        encoder: the row that it belongs to.
        file: the opened file.
        config: the arguments of the config of the row's model class.
        tensors: parameter -> tensor in the file.
    """

    encoder: TextEncoder
    file: GGUFFile
    config: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def open_stored(path: str | os.PathLike, wanted: tuple[TextEncoder, ...] = TEXT_ENCODERS) -> StoredEncoder:
    """Open a GGUF file and check that it is a complete text encoder; no weight is read.

    Args:
        path: of the file.
        wanted: the encoders that will do.

    Raises:
        GGUFError: as `load_text_encoder`.
    """
    file = read_gguf(path)
    try:
        return understand(file, wanted)
    except GGUFError as error:
        raise GGUFError(f"{os.fspath(path)}: {error}") from None


def understand(file: GGUFFile, wanted: tuple[TextEncoder, ...] = TEXT_ENCODERS) -> StoredEncoder:
    """Locate every parameter of a text encoder in an opened file.

    Raises:
        GGUFError: where it cannot be loaded, with the reason.
    """
    with hint_of_part(file.path, file.metadata):
        return _understood(file, expect(file.tensors, file.metadata, wanted))


def recognise(
    names: Collection[str], stated: object = None, wanted: tuple[TextEncoder, ...] = TEXT_ENCODERS
) -> TextEncoder | None:
    """Return the encoder that tensor names belong to, or None.

    Args:
        names: of a file's tensors.
        stated: its `general.architecture`, which chooses only where the tensors show several.
        wanted: the encoders that will do.
    """
    shown = [row for row in wanted if row.relative_shown_by(names) is None and row.is_shown_by(names)]
    return next(iter([row for row in shown if stated in row.gguf_names] + shown), None)


def expect(names: Collection[str], metadata: Mapping[str, Any], wanted: tuple[TextEncoder, ...]) -> TextEncoder:
    """Return the encoder of a file; raise GGUFError for any other, saying what is known and what was seen."""
    stated = metadata.get("general.architecture")
    known = recognise(names, stated, wanted)
    if known is not None:
        return known
    loads = f"flux_kernels loads {'; '.join(row.covers for row in wanted)}."
    for row in wanted:
        relative = row.relative_shown_by(names)
        if relative is not None:
            raise GGUFError(f"This is {relative.model}. {loads} {relative.advice}".rstrip())
    one = wanted[0] if len(wanted) == 1 else None
    what, seen = (f"{one.name}", (name for name, _ in one.named(names))) if one else ("text encoder that is known here", names)
    examples = ", ".join(sorted(seen)[:3]) or "none"
    raise GGUFError(f"This is no {what}: its architecture key says {stated!r}, its tensors are called {examples}. {loads}")


def _understood(file: GGUFFile, encoder: TextEncoder) -> StoredEncoder:
    tensors = {parameter: file.tensors[name] for parameter, name in encoder.parameter_names(file.tensors).items()}
    shapes = {parameter: tuple(tensor.shape) for parameter, tensor in tensors.items()}
    facts = encoder.facts(shapes, file.metadata)
    config = encoder.read_config(facts)
    facts.compare(config, encoder.checked_keys)
    expected = {name: tuple(parameter.shape) for name, parameter in empty_model(encoder, config).named_parameters()}
    problems = tensor_problems(shapes, expected)
    if problems:
        raise GGUFError(
            f"{problems}. A {encoder.name} with {facts.block_count()} blocks holds exactly {len(expected)} tensors: the file is "
            "incomplete or another model."
        )
    for parameter, tensor in tensors.items():
        check_weight_type(parameter, tensor.format)
    return StoredEncoder(encoder, file, config, tensors)
