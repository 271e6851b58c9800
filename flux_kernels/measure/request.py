"""What to measure, and with what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ..mixed.cost import CostTable
from ..mixed.file_layout import Options
from ..mixed.imatrix import imatrix_path, load_imatrix
from ..mixed.option import Option
from .measured_model import Source16
from .measurer import Importance

Size = tuple[int, int]
"""Width and height in pixels."""

_HIGH, _LOW = ("Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "Q4_K"), ("IQ4_NL", "Q4_0", "IQ4_XS", "MXFP4", "Q3_K", "Q2_K")
TYPES = tuple(map(Option, (*_HIGH, *_LOW)))
STATES = 64
SIZES: tuple[Size, ...] = ((512, 512), (768, 768), (1024, 1024), (832, 1216), (1216, 832), (1344, 768))

Progress = Callable[[str, float, float], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def no_progress(what: str, done: float, total: float) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Request:
    """Say what to measure.

    Attributes:
        out: the cost table to write; logs and the JSON lie in the same folder.
        source: the 16-bit transformer.
        types: options to measure; a tensor whose rows are not whole blocks of one is left out of that one.
        plan: tensor of the file -> option, to be measured as a whole instead. Tensors in a plain type, and those outside the
            blocks, count as unquantized.
        prompts: to capture with; None takes the embedded model's, which only it has.
        states_file: of captured states; written where it is missing.
        count: of states to capture; None takes STATES, or those that are captured already.
        sizes: (width, height) in pixels; () takes those of the model.
        steps: of the denoising runs, None for the model's number.
        seed: of the capture; None takes 0, or that of the states that are captured already.
        imatrix: file with ready importance; None collects it from the states.
        weighted: whether the quantizers are weighted by importance at all.
        device: to measure on; None takes the process's GPU, or the CPU.
        dtype: to measure in; None takes float32 on the CPU and bfloat16 on a GPU.
    """

    out: Path
    source: Source16
    types: Sequence[Option] = TYPES
    plan: Options | None = None
    prompts: Sequence[str] | None = None
    states_file: Path | None = None
    count: int | None = None
    sizes: Sequence[Size] = ()
    steps: int | None = None
    seed: int | None = None
    imatrix: Path | None = None
    weighted: bool = True
    device: torch.device | None = None
    dtype: torch.dtype | None = None

    @property
    def states_path(self) -> Path:
        """Path of the captured states."""
        return self.states_file or self.out.with_suffix(".states.safetensors")

    @property
    def imatrix_path(self) -> Path:
        """Path of the importance that was used."""
        return imatrix_path(self.out)

    def as_table(self) -> Request:
        """Return this request with the options and the importance that the table `out` was measured with."""
        table = CostTable.load(self.out)
        weighted = table.importance != "none"
        options = tuple(dict.fromkeys(row.option for row in table.rows if not row.option.is_plain))
        return replace(self, types=options, weighted=weighted, imatrix=self.imatrix_path if weighted else None)

    @property
    def importance(self) -> Importance | Literal["collect"] | None:
        """What the Measurer weights the quantizers by: ready importance, that of the states, or none."""
        if self.imatrix is None or not self.weighted:
            return "collect" if self.weighted else None
        return {name: (mean, 1.0) for name, mean in load_imatrix(self.imatrix).items()}

    @property
    def importance_name(self) -> str:
        """The importance as a cost table names it."""
        if self.imatrix is None or not self.weighted:
            return "collected" if self.weighted else "none"
        return self.imatrix.name
