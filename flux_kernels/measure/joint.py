"""Measure plans as a whole for `flux-kernels plan --refine`, on the states of a cost table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import FormatError
from ..mixed.file_layout import NAMED_MODELS, Options
from .measured_model import find_source
from .run import Request, open_measurement


def joint_measure(costs: Path, model: str | None) -> Callable[[Options], float]:
    """Open the model and the states of a cost table; return what measures {tensor: option} on them.

    Args:
        costs: the cost table; its states lie in the same folder.
        model: the measured model's file or folder; None or "embedded" for the embedded one.

    Raises:
        FormatError: where the states or the model's file are missing.
    """
    if model in NAMED_MODELS and model != "embedded":
        raise FormatError(f"--refine runs the model: give its 16-bit file or folder with --model, not the name {model!r}.")
    source = find_source(model=None if model is None or model == "embedded" else Path(model))
    request = Request(out=costs, source=source).as_table()
    if not request.states_path.exists():
        raise FormatError(
            f"--refine needs the captured states {request.states_path}, which `flux-kernels measure --out {costs}` makes."
        )
    measurer = open_measurement(request).measurer
    return lambda options: measurer.measure_joint(options).cost
