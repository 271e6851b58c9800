"""The inputs' covariances that low-rank corrections are fitted to, as a safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FormatError
from ..files import written_whole
from ..source.source import SourceModel


def covariance_path(costs: Path) -> Path:
    """Return where `measure` keeps the covariances of a cost table."""
    return costs.with_suffix(".covariance.safetensors")


def save_covariance(path: Path, covariances: Mapping[str, Tensor]) -> None:
    """Write tensor name -> float32 [K, K]."""
    with written_whole(path) as part:
        save_file({name: covariance.float().cpu().contiguous() for name, covariance in covariances.items()}, part)


def load_covariance(path: str | os.PathLike[str], source: SourceModel, ranks: Mapping[str, int]) -> dict[str, Tensor]:
    """Read the covariances of the tensors that get a correction; those that the file lacks are left out.

    Raises:
        FormatError: where the file is none, or of another model.
    """
    covariances = {}
    try:
        with safe_open(path, "pt") as file:
            for name in ranks.keys() & set(file.keys()):
                covariances[name] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"{os.fspath(path)} is no file of covariances ({error}). `flux-kernels measure` writes one."
        ) from None
    for name, covariance in covariances.items():
        k = source.tensors[name].shape[1]
        if covariance.shape != (k, k):
            raise FormatError(
                f"The covariance of {name} is {list(covariance.shape)}, its rows have {k} weights: another model's."
            )
    if ranks and not covariances:
        raise FormatError(
            f"{os.fspath(path)} has none of the {len(ranks)} tensors that get a correction: it is another model's."
        )
    return covariances
