"""A whole measurement: states, every tensor times type over several processes, resumed from logs, merged into a table.

Processes agree through files alone: process r takes every n-th item, appends to a log of its own, and whoever finds all
items in the logs writes the table. So torchrun, accelerate and shells on several machines with one folder all work, and a
process that died is resumed by starting it again.
"""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from ..compute import dtype_name
from ..errors import FormatError
from ..flux.types import BLOCK, tensor_kind
from ..formats import get_format
from ..generation.embedded import EMBEDDED_PROMPTS, PIPELINE_KWARGS
from ..mixed.cost import CostRow, CostTable, JointRow, sidecar
from ..mixed.covariance import covariance_path, save_covariance
from ..mixed.file_layout import Options
from ..mixed.imatrix import imatrix_path, load_imatrix, save_imatrix
from ..mixed.option import Option
from ..mixed.plan_file import check_tensors
from ..mixed.world import ALONE, World
from ..version import own_version
from .capture import Size, capture
from .log import MeasureLog, read_logs
from .measured_model import Source16, base_of, open_pipeline, open_transformer
from .measurer import Importance, Measurer
from .memory import check_memory
from .states import State, States

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

_HIGH, _LOW = ("Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "Q4_K"), ("IQ4_NL", "Q4_0", "IQ4_XS", "MXFP4", "Q3_K", "Q2_K")
TYPES = tuple(map(Option, (*_HIGH, *_LOW)))
STATES = 64
SIZES: tuple[Size, ...] = ((512, 512), (768, 768), (1024, 1024), (832, 1216), (1216, 832), (1344, 768))
_POLL_SECONDS = 0.5

Progress = Callable[[str, float, float], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def no_progress(what: str, done: float, total: float) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Request:
    """Say what to measure.

    Attributes:
        out: the cost table to write; logs and the JSON lie beside it.
        source: the 16-bit transformer.
        types: options to measure; a tensor whose rows are not whole blocks of one is left out of that one.
        plan: tensor of the file -> option, to be measured as a whole instead. Tensors in a plain type, and those outside the
            blocks, count as unquantized.
        prompts: to capture with; None takes the embedded model's, which only it has.
        states_file: of captured states; made where it is not there.
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
    """Load the model, get the states (the first process captures, the others wait for its file) and run the reference.

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
    states = _states(request, world, model, sha256, progress)
    measurer = Measurer(
        model,
        states.items,
        importance=_importance(request),
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
    """Check what can be checked before minutes of reading: types, what states are captured with, memory, the plan.

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
    """Return the options of the block matrices that a plan quantizes; raise FormatError where it is of another model."""
    shapes = {name: tensor.shape for name, tensor in source.model.tensors.items()}
    check_tensors(plan, shapes, "the model")
    packed = {name: option for name, option in plan.items() if not option.is_plain and tensor_kind(name, shapes[name]) == BLOCK}
    unfit = [name for name, option in packed.items() if not option.fits(shapes[name])]
    if unfit:
        raise FormatError(f"The plan does not fit the model: {unfit[0]} cannot be {packed[unfit[0]]}.")
    if not packed:
        raise FormatError("The plan does not fit the model: it names no quantized matrix of this model's blocks.")
    return packed


def _states(request: Request, world: World, model: FluxTransformer2DModel, sha256: str, progress: Progress) -> States:
    """Return the states of the file, captured first where it is not there; raise FormatError where others are asked for."""
    path = request.states_path
    if not path.exists() and world.rank == 0:
        States(_capture(request, model, progress), request.source.name, sha256).save(path)
    while not path.exists():
        progress("waiting for the first process to capture states", 0, 0)
        time.sleep(_POLL_SECONDS)
    states = States.load(path)
    if states.source_sha256 != sha256:
        raise FormatError(
            f"{path} was captured with another model ({states.model}, sha256 {states.source_sha256[:12]}..., this one has "
            f"{sha256[:12]}...). Remove it to capture anew, or choose another --states-file."
        )
    unlike = states.unlike(request.count, request.prompts, request.sizes, request.steps, request.seed)
    if unlike:
        raise FormatError(
            f"{path} is there already and holds {unlike}. Leave the options of capturing out to measure on it, or give another "
            "--out (or --states-file) to capture anew."
        )
    return states


def _capture(request: Request, model: FluxTransformer2DModel, progress: Progress) -> list[State]:
    pipeline, settings = open_pipeline(request.source, model)
    if request.steps is not None:
        settings["num_inference_steps"] = request.steps
    own_sizes = [(PIPELINE_KWARGS["width"], PIPELINE_KWARGS["height"])] if request.source.embedded else SIZES
    count = request.count or STATES
    return capture(
        pipeline,
        request.prompts or EMBEDDED_PROMPTS,
        count,
        settings=settings,
        sizes=request.sizes or own_sizes,
        seed=request.seed or 0,
        on_state=lambda done: progress("capturing states", done, count),
    )


def _importance(request: Request) -> Importance | Literal["collect"] | None:
    if not request.weighted:
        return None
    if request.imatrix is None:
        return "collect"
    return {name: (mean, 1.0) for name, mean in load_imatrix(request.imatrix).items()}


def _save_inputs(request: Request, measurer: Measurer, states: States) -> None:
    """Keep importance and covariance beside the table, for the file that is made by it."""
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
    """Measure this process's share of what the logs lack; write and return the table once the logs hold everything.

    Returns:
        The table, or None where other processes still have work to do.
    """
    request, measurer = opened.request, opened.measurer
    items = opened.items()
    rows = read_logs(request.out, opened.identity)
    share = [item for item in items[world.rank :: world.size] if item not in rows]
    done, total = 0, sum(measurer.effort(tensor) for tensor, _ in share)
    log = MeasureLog(request.out, world.rank, opened.identity)
    try:
        for tensor, option in share:
            progress(f"{tensor} {option}", done, total)
            log.append(measurer.measure_one(tensor, option))
            done += measurer.effort(tensor)
        progress("measured", done, total)
    finally:
        log.close()
    rows = read_logs(request.out, opened.identity)
    if any(item not in rows for item in items):
        return None
    table = _table(opened, [rows[item] for item in items])
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
    if not request.weighted:
        importance = "none"
    else:
        importance = "collected" if request.imatrix is None else request.imatrix.name
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
        importance=importance,
        joint=before,
        source="" if request.source.given is None else str(request.source.given),
    )


def measure_plan(opened: Opened) -> JointRow:
    """Measure the request's plan as a whole, and keep the result in the table's JSON where the table is there."""
    row = opened.measurer.measure_joint(opened.plan, opened.states.sha256)
    out = opened.request.out
    if out.exists():
        table = CostTable.load(out)
        table.joint = [other for other in table.joint if (other.types, other.states) != (row.types, row.states)] + [row]
        table.save(out)
    return row
