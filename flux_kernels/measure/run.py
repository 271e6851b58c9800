"""A whole measurement: states, every tensor times type over several processes, resumed from its logs, merged into the table.

Processes agree through files alone: process r takes every n-th item, appends to a log of its own, and whoever finds all
items in the logs writes the table. So torchrun, accelerate and shells on several machines with one folder all work, and a
process that died is resumed by starting it again.
"""

from __future__ import annotations

import datetime
import hashlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..compute import dtype_name
from ..errors import FormatError
from ..formats import PLAIN_TYPES, get_format
from ..generation.embedded import EMBEDDED_PROMPTS, PIPELINE_KWARGS
from ..mixed.cost import CostRow, CostTable, sidecar
from ..mixed.covariance import covariance_path, save_covariance
from ..mixed.file_layout import parse_option
from ..mixed.imatrix import imatrix_path, load_imatrix, save_imatrix
from ..mixed.plan_file import check_tensors
from ..mixed.world import ALONE, World
from ..version import own_version
from .capture import Size, capture
from .file_tensors import file_names
from .log import MeasureLog, missing, read_logs
from .measured_model import Source16, check_base_of, open_pipeline, open_transformer
from .measurer import Importance, Measurer
from .memory import check_memory
from .states import States

TYPES = ("Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "Q4_K", "IQ4_NL", "Q4_0", "IQ4_XS", "MXFP4", "Q3_K", "Q2_K")
STATES = 64
SIZES: tuple[Size, ...] = ((512, 512), (768, 768), (1024, 1024), (832, 1216), (1216, 832), (1344, 768))
_POLL_SECONDS = 0.5

Progress = Callable[[str, float, float], None]  # what is being done, done, in all


@dataclass(frozen=True)
class Request:
    """Say what to measure.

    Attributes:
        out: the cost table to write; logs and the JSON lie beside it.
        source: the 16-bit transformer.
        types: ggml type names, also with a low-rank correction as in "Q4_K+r16"; a tensor whose rows are not whole blocks of one is left out of that type.
        prompts: to capture with; None takes the embedded model's, which only it has.
        states_file: of captured states; made where it is not there.
        count: of states to capture; None takes STATES, or those that are captured already.
        sizes: (width, height) in pixels; () takes those of the model.
        steps: of the denoising runs, None for the model's number.
        seed: of the capture; None takes 0, or that of the states that are captured already.
        imatrix: file with ready importance; None collects it from the states.
        weighted: whether the quantizers are weighted by importance at all.
        covariance: whether to collect what low-rank corrections are fitted to; None where `types` has any.
        device: to measure on; None takes the process's GPU, or the CPU.
        dtype: to measure in; None takes float32 on the CPU and bfloat16 on a GPU.
    """

    out: Path
    source: Source16
    types: Sequence[str] = TYPES
    prompts: Sequence[str] | None = None
    states_file: Path | None = None
    count: int | None = None
    sizes: Sequence[Size] = ()
    steps: int | None = None
    seed: int | None = None
    imatrix: Path | None = None
    weighted: bool = True
    covariance: bool | None = None
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
        """Return this request with the importance that the table `out` was measured with, and covariances if it used any."""
        table = CostTable.load(self.out)
        weighted, ranks = table.importance != "none", any(parse_option(row.type)[1] for row in table.rows)
        return replace(self, weighted=weighted, covariance=ranks, imatrix=self.imatrix_path if weighted else None)


@dataclass
class Opened:
    """Hold what measuring needs: model, states, Measurer and what identifies them."""

    request: Request
    measurer: Measurer
    states: States
    source_type: str
    identity: dict[str, str] = field(default_factory=dict)

    def items(self) -> list[tuple[str, str]]:
        """List (tensor, type) in the order of measuring: block by block."""
        return [(name, kind) for name, tensor in self.measurer.tensors.items() for kind in tensor.types(self.request.types)]


def open_measurement(
    request: Request,
    world: World = ALONE,
    progress: Progress = lambda what, done, total: None,
    planned: Collection[str] = (),
) -> Opened:
    """Load the model, get the states (the first process captures, the others wait for its file) and run the reference.

    Args:
        request: what to measure.
        world: this process among those that measure together.
        progress: called with what is being done, and how far.
        planned: tensors of a plan that will be measured; whether the model has them is checked before states are captured.

    Raises:
        FormatError: for unknown types, captured states that are not those asked for or of another model, a quantized model, a plan of another model.
        GGUFError, FileNotFoundError: where the model or the base cannot be read.
    """
    for name in request.types:
        get_format(parse_option(name)[0])
    device = request.device or world.device()
    dtype = request.dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    _check_first(request, world, device, dtype)
    progress("hashing the model", 0, 0)
    sha256 = request.source.sha256()
    progress("loading the model", 0, 0)
    model, source_type = open_transformer(request.source, device, dtype)
    check_tensors(planned, file_names(model), "the model")
    states = _states(request, world, model, sha256, progress)
    measurer = Measurer(
        model,
        states.items,
        importance=_importance(request),
        covariance=any(parse_option(name)[1] for name in request.types) if request.covariance is None else request.covariance,
        on_batch=lambda done, total: progress("running the 16-bit model on the states", done, total),
    )
    identity = dict(
        model=sha256,
        states=states.sha256,
        importance=_importance_hash(measurer.importance),
        dtype=dtype_name(dtype),
        version=own_version(),
    )
    if request.weighted and request.imatrix != request.imatrix_path and world.rank == 0:
        save_imatrix(request.imatrix_path, dict(measurer.importance), datasets=sorted({state.prompt for state in states.items}))
    if measurer.covariance and world.rank == 0 and not covariance_path(request.out).exists():
        save_covariance(covariance_path(request.out), measurer.covariance)
    return Opened(request, measurer, states, source_type, identity)


def _check_first(request: Request, world: World, device: torch.device, dtype: torch.dtype) -> None:
    """Check what can be checked before minutes of reading: what states are captured with, and memory."""
    capturing = world.rank == 0 and not request.states_path.exists()
    if capturing:
        check_base_of(request.source)
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


def _states(request: Request, world: World, model, sha256: str, progress: Progress) -> States:
    path = request.states_path
    if not path.exists() and world.rank == 0:
        items = _capture(request, model, progress)
        States(items, request.source.name, sha256).save(path)
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


def _capture(request: Request, model, progress: Progress):
    embedded = request.source.embedded
    pipeline, settings = open_pipeline(request.source, model)
    if request.steps is not None:
        settings["num_inference_steps"] = request.steps
    own_size = ((PIPELINE_KWARGS["width"], PIPELINE_KWARGS["height"]),)
    count, done = request.count or STATES, 0

    def on_state() -> None:
        nonlocal done
        done += 1
        progress("capturing states", done, count)

    return capture(
        pipeline,
        list(request.prompts or EMBEDDED_PROMPTS),
        count,
        settings=settings,
        sizes=list(request.sizes) or list(own_size if embedded else SIZES),
        seed=request.seed or 0,
        on_state=on_state,
    )


def _importance(request: Request) -> Importance | str | None:
    if not request.weighted:
        return None
    if request.imatrix is None:
        return "collect"
    return {name: (mean, 1.0) for name, mean in load_imatrix(request.imatrix).items()}


def _importance_hash(importance: Importance) -> str:
    digest = hashlib.sha256()
    for name, (sums, count) in sorted(importance.items()):
        digest.update(f"{name} {count}".encode() + sums.float().cpu().numpy().tobytes())
    return digest.hexdigest() if importance else "none"


def measure(opened: Opened, world: World = ALONE, progress: Progress = lambda what, done, total: None) -> CostTable | None:
    """Measure this process's share of what the logs lack; write and return the table once the logs hold everything.

    Returns:
        The table, or None where other processes still have work to do.
    """
    request, measurer = opened.request, opened.measurer
    items = opened.items()
    found = read_logs(request.out, opened.identity)
    share = missing(items[world.rank :: world.size], found)
    total = sum(measurer.effort(tensor) for tensor, _ in share)
    done = 0
    log = MeasureLog(request.out, world.rank, opened.identity)
    try:
        for tensor, kind in share:
            progress(f"{tensor} {kind}", done, total)
            log.append(measurer.measure_one(tensor, kind))
            done += measurer.effort(tensor)
        progress("measured", done, total)
    finally:
        log.close()
    found = read_logs(request.out, opened.identity)
    if missing(items, found):
        return None
    table = _table(opened, [found[item] for item in items])
    table.save(request.out)
    return table


def _table(opened: Opened, rows: Sequence[CostRow]) -> CostTable:
    request, states = opened.request, opened.states
    by_tensor: dict[str, list[CostRow]] = {}
    for row in rows:
        by_tensor.setdefault(row.tensor, []).append(row)
    complete = []
    for name, tensor in opened.measurer.tensors.items():
        complete.append(CostRow(name, opened.source_type, 0.0, 0.0, tensor.packed_bytes(opened.source_type), 0.0))
        complete += by_tensor.get(name, [])
    before = CostTable.load(request.out).joint if request.out.exists() and sidecar(request.out).exists() else []
    return CostTable(
        rows=complete,
        model=request.source.name,
        source_sha256=states.source_sha256,
        states=states.summary(),
        prompts=sorted({state.prompt for state in states.items}),
        seed=states.items[0].seed,
        date=datetime.date.today().isoformat(),
        versions=dict(flux_kernels=own_version(), torch=torch.__version__),
        importance=_importance_name(request),
        joint=before,
        source="" if request.source.given is None else str(request.source.given),
    )


def _importance_name(request: Request) -> str:
    if not request.weighted:
        return "none"
    return "collected" if request.imatrix is None else request.imatrix.name


def measure_plan(opened: Opened, types: dict[str, str]) -> Any:
    """Measure a plan as a whole, and keep the result in the table's JSON where the table is there.

    Args:
        types: tensor of the file -> ggml type. Tensors in a plain type, and those outside the blocks, count as unquantized.

    Returns:
        A JointRow.

    Raises:
        FormatError: where the plan is of another model.
    """
    check_tensors(types, file_names(opened.measurer.model), "the model")
    known = opened.measurer.tensors
    packed = {name: kind for name, kind in types.items() if name in known and kind not in PLAIN_TYPES}
    unknown = [name for name in packed if not known[name].types([packed[name]])]
    if unknown or not packed:
        what = (
            f"{unknown[0]} cannot be {packed[unknown[0]]}" if unknown else "it names no quantized matrix of this model's blocks"
        )
        raise FormatError(f"The plan does not fit the model: {what}.")
    row = opened.measurer.measure_joint(packed, opened.states.sha256)
    if opened.request.out.exists():
        table = CostTable.load(opened.request.out)
        table.joint = [one for one in table.joint if (one.types, one.states) != (row.types, row.states)] + [row]
        table.save(opened.request.out)
    return row
