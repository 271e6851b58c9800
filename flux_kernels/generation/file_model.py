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
