"""A whole measurement: every tensor in every type, over several processes, resumed from logs.

Processes agree through files alone: process r takes every n-th item, appends to a log of its own, and whoever finds all
items in the logs writes the table. So torchrun, accelerate and shells on several machines with one folder all work, and a
process that died is resumed by starting it again.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..compute import dtype_name
from ..errors import FormatError
from ..formats import get_format
from ..mixed.cost import CostRow, CostTable, JointRow, sidecar
from ..mixed.covariance import covariance_path, save_covariance
from ..mixed.file_layout import Options
from ..mixed.imatrix import save_imatrix
from ..mixed.option import Option
from ..mixed.plan_file import check_tensors
from ..mixed.world import ALONE, World
from ..models.types import BLOCK, tensor_kind
from ..version import own_version
from .capture import captured_states
from .log import MeasureLog
from .measured_model import Source16, base_of, open_transformer
from .measurer import Importance, Measurer
from .memory import check_memory
from .request import SIZES, STATES, TYPES, Progress, Request, no_progress
from .states import States

__all__ = ["TYPES", "Opened", "Request", "World", "measure", "measure_plan", "open_measurement"]


@dataclass
class Opened:
    """Hold what measuring needs: model, states, Measurer and what identifies them.

    Attributes:
        request: what to measure.
        plan: tensor -> option of the request's plan, quantized block matrices only.
        measurer: around the model.
        states: that it measures on.
        source_type: ggml type of the block matrices in the model's file.
        identity: hashes and names that results must share to be compared.
    """

    request: Request
    plan: Options
    measurer: Measurer
    states: States
    source_type: str
    identity: dict[str, str]

    def items(self) -> list[tuple[str, Option]]:
        """List (tensor, option) in the order of measuring: block by block."""
        tensors = self.measurer.tensors
        return [(name, option) for name in tensors for option in self.request.types if option.fits(tensors[name].shape)]


def open_measurement(request: Request, world: World = ALONE, progress: Progress = no_progress) -> Opened:
    """Load the model, get the states and run the unquantized model on them.

    Args:
        request: what to measure.
        world: this process among those that measure together.
        progress: see Progress.

    Raises:
        FormatError: for unknown types, captured states that are not those asked for or of another model, a quantized model, a
            plan of another model; before anything is loaded where headers tell.
        GGUFError, FileNotFoundError: where the model or the base cannot be read.
    """
    device = request.device or world.device()
    dtype = request.dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    plan = _checked(request, world, device, dtype)
    progress("hashing the model", 0, 0)
    sha256 = request.source.sha256()
    progress("loading the model", 0, 0)
    model, source_type = open_transformer(request.source, device, dtype)
    states = captured_states(request, world, model, sha256, progress)
    measurer = Measurer(
        model,
        states.items,
        importance=request.importance,
        covariance=any(option.rank for option in (*request.types, *plan.values())),
        on_batch=lambda done, total: progress("running the 16-bit model on the states", done, total),
    )
    if world.rank == 0:
        _save_inputs(request, measurer, states)
    identity = dict(
        model=sha256,
        states=states.sha256,
        importance=_importance_hash(measurer.importance),
        dtype=dtype_name(dtype),
        version=own_version(),
    )
    return Opened(request, plan, measurer, states, source_type, identity)


def _checked(request: Request, world: World, device: torch.device, dtype: torch.dtype) -> Options:
    """Check what needs no minutes of reading: types, what states are captured with, memory, the plan.

    Returns:
        Tensor -> option of the plan's quantized block matrices.
    """
    for option in request.types:
        get_format(option.type)
    capturing = world.rank == 0 and not request.states_path.exists()
    if capturing:
        base_of(request.source)
        if request.prompts is None and not request.source.embedded:
            raise FormatError(
                "States are captured by drawing: give --prompts FILE, one a line, of the kind the model is used with."
            )
    check_memory(
        request.source,
        device,
        dtype,
        request.sizes or SIZES,
        request.count or STATES,
        states=request.states_path,
        capturing=capturing,
        processes=world.local_size,
    )
    return {} if request.plan is None else _quantized_matrices(request.plan, request.source)


def _quantized_matrices(plan: Options, source: Source16) -> Options:
    """Return the block matrices that a plan quantizes; raise FormatError for a plan of another model."""
    shapes = {name: tensor.shape for name, tensor in source.model.tensors.items()}
    check_tensors(plan, shapes, "the model")
    kinds = {name: tensor_kind(name, shape, source.model.architecture) for name, shape in shapes.items()}
    packed = {name: option for name, option in plan.items() if not option.is_plain and kinds.get(name) == BLOCK}
    unfit = [name for name, option in packed.items() if not option.fits(shapes[name])]
    if unfit:
        raise FormatError(f"The plan does not fit the model: {unfit[0]} cannot be {packed[unfit[0]]}.")
    if not packed:
        raise FormatError("The plan does not fit the model: it names no quantized matrix of this model's blocks.")
    return packed


def _save_inputs(request: Request, measurer: Measurer, states: States) -> None:
    """Keep importance and covariance next to the table, for the file that is made by it."""
    if request.weighted and request.imatrix != request.imatrix_path:
        save_imatrix(request.imatrix_path, measurer.importance, datasets=states.prompts)
    if measurer.covariance and not covariance_path(request.out).exists():
        save_covariance(covariance_path(request.out), measurer.covariance)


def _importance_hash(importance: Importance) -> str:
    digest = hashlib.sha256()
    for name, (sums, count) in sorted(importance.items()):
        digest.update(f"{name} {count}".encode() + sums.float().cpu().numpy().tobytes())
    return digest.hexdigest() if importance else "none"


def measure(opened: Opened, world: World = ALONE, progress: Progress = no_progress) -> CostTable | None:
    """Measure this process's share of what the logs lack; write the table once they hold everything.

    Returns:
        The table, or None where other processes still have work to do.
    """
    request, measurer = opened.request, opened.measurer
    items = opened.items()
    with MeasureLog(request.out, world.rank, opened.identity) as log:
        share = [item for item in items[world.rank :: world.size] if item not in log.measured]
        done, total = 0, sum(measurer.effort(tensor) for tensor, _ in share)
        for tensor, option in share:
            progress(f"{tensor} {option}", done, total)
            log.append(measurer.measure_one(tensor, option))
            done += measurer.effort(tensor)
        progress("measured", done, total)
        # With what other processes wrote meanwhile.
        measured = log.read()
    if any(item not in measured for item in items):
        return None
    table = _table(opened, [measured[item] for item in items])
    table.save(request.out)
    return table


def _table(opened: Opened, rows: Sequence[CostRow]) -> CostTable:
    request, states = opened.request, opened.states
    full = Option(opened.source_type)
    by_tensor = {
        name: [CostRow(name, full, 0.0, 0.0, full.nbytes(tensor.shape), 0.0)]
        for name, tensor in opened.measurer.tensors.items()
    }
    for row in rows:
        by_tensor[row.tensor].append(row)
    before = CostTable.load(request.out).joint if request.out.exists() and sidecar(request.out).exists() else []
    return CostTable(
        rows=[row for tensor_rows in by_tensor.values() for row in tensor_rows],
        model=request.source.name,
        source_sha256=states.source_sha256,
        states=states.summary(),
        prompts=states.prompts,
        seed=states.items[0].seed,
        date=datetime.date.today().isoformat(),
        versions=dict(flux_kernels=own_version(), torch=torch.__version__),
        importance=request.importance_name,
        joint=before,
        source="" if request.source.given is None else str(request.source.given),
    )


def measure_plan(opened: Opened) -> JointRow:
    """Measure the request's plan as a whole, and keep the result in the JSON of a table that is there."""
    row = opened.measurer.measure_joint(opened.plan, opened.states.sha256)
    out = opened.request.out
    if out.exists():
        table = CostTable.load(out)
        table.joint = [other for other in table.joint if (other.types, other.states) != (row.types, row.states)] + [row]
        table.save(out)
    return row
