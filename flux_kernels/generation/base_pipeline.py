"""Put a transformer into a local diffusers pipeline, without a hub, a network or chatter."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BackendUnavailable, GGUFError
from ..integrations.on_import import after_import
from ..models.architecture import Architecture
from .folder_parts import INDEX, LIBRARIES, check_index, class_of, missing_files, needed_parts, read_json
from .text_pipelines import TEXT_PIPELINES, drawing_classes


def go_offline_quietly() -> None:
    """Keep the Hugging Face libraries off the network and their notes off the screen.

    Call it before they are imported. It imports none itself: each falls silent when it is imported, if ever.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for library in ("transformers", "diffusers"):
        os.environ.setdefault(f"{library.upper()}_VERBOSITY", "error")
        after_import(f"{library}.utils.logging", partial(_silence, f"{library}.utils.logging"))


def _silence(name: str) -> None:
    logging = sys.modules[name]
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check_base(base: Path, architecture: Architecture, given: Sequence[str] = ()) -> str:
    """Check that `base` is a whole pipeline folder that draws from text; return the class that draws.

    Args:
        base: the folder.
        architecture: of the model.
        given: parts that come from elsewhere and may be missing.

    Raises:
        FileNotFoundError: where it is none. The sentence says what is missing and how to get it.
        GGUFError: where its index is damaged.
    """
    kinds = drawing_classes(architecture)
    how = _how(kinds[0])
    index = _index_of(base, how)
    made_for = str(index.get("_class_name", ""))
    kind = next((kind for kind in kinds if made_for in (kind, *TEXT_PIPELINES[kind].twins)), None)
    if kind is None:
        made = made_for or "pipeline without a name"
        if made_for in architecture.pipelines:
            raise FileNotFoundError(
                f"{base} is a {made}, which generate does not draw with. Give a {' or '.join(kinds)}. {how}"
            )
        raise FileNotFoundError(f"{base} is a {made}, not a {architecture.name} pipeline. {how}")
    row = TEXT_PIPELINES[kind]
    check_index(base, index, kind)
    # Of those that the class needs, null stands for a part that is left out on purpose.
    left_out = {*_left_out(index)} & {*row.optional}
    listed = {*_listed(index)}
    needed = {*needed_parts(kind)} - left_out - {*given} | {tokenizer_of(part) for part in given}
    folders = listed - {*given}
    missing = sorted(needed - listed | {part for part in folders if not (base / part).is_dir()})
    missing += missing_files(base, sorted(folders - {*missing}))
    if missing:
        instead = " Or give the T5 encoder as a GGUF file with --t5." if missing == [row.t5] else ""
        raise FileNotFoundError(f"{base} lacks {', '.join(missing)}. {how}{instead}")
    return kind


def _how(kind: str) -> str:
    get = TEXT_PIPELINES[kind].download
    return (
        f"--base is a folder in the diffusers layout, with text encoders, tokenizers, VAE and scheduler of a {kind}; the "
        f"transformer's weights are not needed in it.{f' Get one with `{get}`.' if get else ''}"
    )


def tokenizer_of(part: str) -> str:
    """Return the name of a text encoder's tokenizer, such as "tokenizer_2" of "text_encoder_2"."""
    return part.replace("text_encoder", "tokenizer")


def listed_parts(base: Path) -> list[str]:
    """List the parts that a pipeline folder's index names, its transformer left out; [] without an index."""
    return _listed(read_json(base / INDEX)) if (base / INDEX).is_file() else []


def _listed(index: Mapping[str, Any]) -> list[str]:
    # [library, class] of each; null for what the pipeline goes without.
    parts = (name for name, made in index.items() if isinstance(made, list) and len(made) == 2 and all(made))
    return [name for name in parts if not name.startswith("transformer")]


def _left_out(index: Mapping[str, Any]) -> list[str]:
    return [name for name, made in index.items() if made == [None, None] and not name.startswith("transformer")]


def check_classes(base: Path) -> None:
    """Raise BackendUnavailable where the installed libraries lack a part's class, or what it needs.

    Args:
        base: folder that passes `check_base`.
    """
    index = read_json(base / INDEX)
    for part in listed_parts(base):
        library, name = index[part]
        if library not in LIBRARIES:
            continue
        known = class_of(library, name)
        needs = f"The {part} of {base} is a {name}"
        if known is None:
            raise BackendUnavailable(f"{needs}, which the installed {library} does not have. Update {library}.")
        # What both libraries put in the place of a class that cannot be used here.
        if type(known).__name__ == "DummyObject":
            raise BackendUnavailable(
                f"{needs}, which needs {', '.join(known._backends)}. Install it: pip install {' '.join(known._backends)}."
            )


def says_distilled(base: Path) -> bool:
    """Tell whether a folder's pipeline says that its model is distilled; what says nothing is not."""
    return bool(read_json(base / INDEX).get("is_distilled"))


def _index_of(base: Path, how: str) -> dict[str, Any]:
    """Return what a folder says of its pipeline."""
    if not base.is_dir():
        raise FileNotFoundError(f"{base} is not a folder. {how}")
    index = base / INDEX
    if not index.is_file():
        raise FileNotFoundError(f"{base} holds no {INDEX}. {how}")
    return read_json(index)


def base_sizes(base: Path, kind: str, t5_width: int | None = None) -> dict[str, tuple[str, int]]:
    """Read what the parts of a base folder give the transformer: argument of its config -> (parts, size).

    Args:
        base: folder that passes `check_base`.
        kind: the class that it returned.
        t5_width: of a T5 encoder that replaces the folder's.

    Raises:
        FileNotFoundError: where a config.json is missing or no JSON object.
        GGUFError: where one does not say a size.
    """
    row, listed = TEXT_PIPELINES[kind], listed_parts(base)
    sizes = {}
    for fit in row.fits:
        if t5_width is not None and row.t5 in fit.parts:
            found = [t5_width]
        elif listed and not set(fit.parts) <= {*listed}:
            # Left out on purpose: the pipeline does without.
            continue
        else:
            found = [_size(base / part / "config.json", key) for part, key in fit.sizes]
        sizes[fit.argument] = (" and ".join(fit.parts), fit.times * sum(found))
    return sizes


def _size(path: Path, key: str) -> int:
    """Return a size of a part; models of text and pictures keep those of text by themselves."""
    config = read_json(path)
    text = config.get("text_config")
    value = {**config, **(text if isinstance(text, dict) else {})}.get(key)
    if type(value) is not int:
        raise GGUFError(f"{path} is damaged: it gives no number as {key}. Get the --base folder again.")
    return value


def check_fit(sizes: Mapping[str, tuple[str, int]], config: Mapping[str, Any]) -> None:
    """Raise GGUFError where text encoders or VAE do not fit the transformer's config, naming both sizes.

    Args:
        sizes: of `base_sizes`.
        config: the transformer's config.
    """
    wants = {**config, "out_channels": config.get("out_channels") or config["in_channels"]}
    wrong = [
        f"its {part} gives {given}, the file's {key} is {wants[key]}"
        for key, (part, given) in sizes.items()
        if given != wants[key]
    ]
    if wrong:
        raise GGUFError(
            f"The base pipeline does not fit the GGUF file: {'; '.join(wrong)}. Take the --base folder of the file's own model."
        )


def load_pipeline(
    base: Path,
    transformer: nn.Module | None,
    dtype: torch.dtype,
    *,
    kind: str = "FluxPipeline",
    **parts: nn.Module | None,
) -> Any:
    """Load a pipeline around `transformer` from local files alone.

    Args:
        base: folder that passes `check_base`.
        transformer: the model, or None to put one in later with `register_modules`.
        dtype: of the text encoders and the VAE.
        kind: class name in diffusers, such as "FluxFillPipeline".
        parts: models instead of the folder's, which are then not read, such as text_encoder_2=T5EncoderModel; None for none.

    Raises:
        GGUFError: where the folder's files are damaged or do not go together.
    """
    import diffusers

    replaced = {name: part for name, part in parts.items() if part is not None}
    # diffusers wants to be told what its own index says.
    without = {name: None for name in _left_out(read_json(base / INDEX)) if name not in replaced}
    try:
        pipeline = getattr(diffusers, kind).from_pretrained(
            base, transformer=transformer, dtype=dtype, local_files_only=True, **replaced, **without
        )
    # These say by themselves what to do.
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    # Each library has its own for files that are damaged or do not go together.
    except Exception as error:
        raise GGUFError(f"{base} does not load as a {kind}: {error} Get the --base folder again.") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one CPU thread.

    The embedded model is so small that a second thread would only wait, long on a busy machine.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
