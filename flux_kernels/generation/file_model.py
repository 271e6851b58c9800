"""Tell which published model a file is, by its config, its title and the folder of its pipeline.

Its settings (steps, guidance) follow; `generate`, `measure` and what they count in memory ask here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import GGUFError
from ..models.architecture import Architecture, Variant
from .base_pipeline import says_distilled


def model_of(architecture: Architecture, config: Mapping[str, Any], title: str, folder: Path | None) -> Variant:
    """Return the variant whose settings a file takes.

    Args:
        architecture: of the file.
        config: of its transformer.
        title: of the file, as `file_title` gives it.
        folder: of its pipeline; None where there is none. It is read only where it tells variants apart.

    Raises:
        GGUFError: where title and folder name two models.
        FileNotFoundError: where the folder is none of a pipeline.
    """
    return _candidates(architecture, config, title, folder)[0]


def settings_note(architecture: Architecture, config: Mapping[str, Any], title: str, folder: Path | None) -> str | None:
    """Say which settings a file takes where its title and folder leave that open; None where they do not.

    Args:
        architecture: as in `model_of`.
        config: as in `model_of`.
        title: as in `model_of`.
        folder: as in `model_of`.

    Raises as `model_of` does.
    """
    candidates = _candidates(architecture, config, title, folder)
    usual, others = candidates[0], [row for row in candidates[1:] if _settings(row) != _settings(candidates[0])]
    word = usual.unsourced_word(title)
    if word is not None:
        return (
            f'{title} has the word "{word}" in its name. The settings of that model are not known here, and those of {usual.name} '
            f"are taken: {_settings(usual)}. Give --steps and --guidance for its own."
        )
    if not others:
        return None
    kind = "is" if architecture.published(config, title) else "is of the kind of"
    which = f"{title} {kind} {' or '.join(row.name for row in (usual, *others))}, which share all tensors"
    if folder is None and usual.distilled is not None:
        both = "; ".join(f"{_settings(row)} for {row.name}" for row in (usual, *others))
        return f"{which}; the --base folder tells `generate` which: {both}."
    values = ", ".join(f"{row.steps}, {row.guidance:g}" for row in others)
    return (
        f"{which}; taken for {usual.name}: {_settings(usual)}. Give --steps and --guidance for the other"
        f"{'s' * (len(others) > 1)} ({values})."
    )


def _settings(usual: Variant) -> str:
    return f"{usual.steps} steps, guidance {usual.guidance:g}"


def _candidates(architecture: Architecture, config: Mapping[str, Any], title: str, folder: Path | None) -> list[Variant]:
    """Return the variants that a file can be, the one whose settings it takes first."""
    alike = architecture.alike(config, title)
    if folder is None or all(row.distilled is None for row in alike):
        return alike
    distilled = says_distilled(folder)
    fitting = [row for row in alike if row.distilled in (None, distilled)]
    if not fitting:
        raise GGUFError(
            f"By its name {title} is {alike[0].name}, and {folder} says that its model is {'' if distilled else 'not '}distilled. "
            "Take the --base folder of the file's own model, or rename the file if its name misleads."
        )
    return fitting
