"""Convert a model to a GGUF file: every tensor is streamed from the source to the file."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
from torch import Tensor

from ..backends import own_device, usable_device
from ..errors import BackendUnavailable, FormatError, GGUFError
from ..formats import FORMATS
from ..gguf.conventions import KeyValues, as_written, written_shape
from ..gguf.file import planned_size, write_gguf
from ..gguf.spec import shown_path
from ..mixed.covariance import load_covariance
from ..mixed.imatrix import load_imatrix
from ..mixed.option import Option
from ..models.low_rank_tensors import correction_names
from ..models.types import BLOCK, tensor_kind
from ..packing import Engine
from ..source.source import SourceModel, SourceTensor, understand_source
from ..source.stored_tensor import FP8
from .choose_types import Choice, Request, check_engine, choose_types, match_importance, requantized
from .provenance import file_hash, provenance_keys, usual_keys
from .quantize_rows import SLAB_WEIGHTS, Work, make_corrected, make_tensor, threads

# One reads while the other computes.
_GPU_THREADS = 2
# A weight of a slab: float32, source, result and the quantizer's chunks; measured (decisions/quantize-command).
_SLAB_BYTES = 70
# A weight of a matrix that gets a correction: float32 and float64 copies of the whole matrix, an estimate.
_FIT_BYTES = 48

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TypeShare:
    """Count the tensors of one type: `nbytes` has no padding."""

    type: str
    tensors: int
    weights: int
    nbytes: int


@dataclass
class Conversion:
    """Hold a conversion that was checked and can be run, or was.

    Attributes:
        source: what was read.
        choice: the types by tensor.
        metadata: the key-values of the file.
        nbytes: size of the file, to the byte.
        bare_nbytes: the same with the usual key-values only, as published files have them.
        bits_per_weight: all tensors, without header and padding.
        block_bits_per_weight: the matrices inside the blocks.
        peak_bytes: memory that running it takes at most, on top of torch itself, an estimate.
        notes: sentences for the user.
        seconds: that writing took; 0 before it ran.
        covariance: tensor name -> [K, K] of its inputs, which low-rank corrections are fitted to.
    """

    source: SourceModel
    choice: Choice
    metadata: KeyValues
    nbytes: int
    bare_nbytes: int
    bits_per_weight: float
    block_bits_per_weight: float
    peak_bytes: int
    importance: Mapping[str, Tensor]
    device: torch.device
    engine: Engine
    workers: int
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    covariance: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def source_bytes(self) -> int:
        """Bytes that are read."""
        return sum(tensor.nbytes for tensor in self.source.tensors.values())

    def shares(self) -> list[TypeShare]:
        """Count tensors, weights and bytes by type, most bytes first."""
        tensors: dict[str, list[SourceTensor]] = {}
        for name, kind in self.choice.types.items():
            tensors.setdefault(kind, []).append(self.source.tensors[name])
        shares = [
            TypeShare(kind, len(held), sum(one.weights for one in held), sum(Option(kind).nbytes(one.shape) for one in held))
            for kind, held in tensors.items()
        ]
        return sorted(shares, key=lambda share: -share.nbytes)

    def write(self, path: str | os.PathLike[str], *, force: bool = False, progress: Progress | None = None) -> None:
        """Write the file; it appears under its name only when it is complete.

        Args:
            path: the file to write.
            force: replace a file that is there.
            progress: called with a tensor's name, the source bytes done and those in all.

        Raises:
            GGUFError: where the file is there, is the source, or the disk is too full.
            FormatError: where a tensor holds what cannot be stored.
        """
        check_target(self.source, path, self.nbytes, force)
        start, done = time.perf_counter(), 0
        current = ""

        def report(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress:
                progress(current, done, self.source_bytes)

        factors: dict[str, Tensor] = {}

        def make(name: str) -> Tensor:
            nonlocal current
            if name in factors:
                return factors.pop(name)
            current = name
            tensor = self.source.tensors[name]
            if name in self.choice.ranks:
                seen = self.covariance.get(name, self.importance.get(name))
                packed, halves = make_corrected(tensor, self.choice, self.importance.get(name), seen, work)
                factors.update(zip(correction_names(name), halves, strict=True))
                return packed
            rows = make_tensor(tensor, self.choice.types[name], self.importance.get(name), work)
            return as_written(rows)

        with threads(self.workers) as pool:
            work = Work(pool, self.device, self.engine, report)
            write_gguf(path, [(*entry, partial(make, entry[0])) for entry in _entries(self.source, self.choice)], self.metadata)
        self.seconds = time.perf_counter() - start


def prepare(
    source: str | os.PathLike[str],
    request: Request,
    *,
    imatrix: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    plan_path: str | None = None,
    covariance: str | os.PathLike[str] | None = None,
    config: object | None = None,
    architecture: str | None = None,
    device: str = "auto",
    engine: Engine = "auto",
    workers: int | None = None,
    provenance: bool = True,
    whole_hash: bool = False,
) -> Conversion:
    """Check a conversion and plan its file to the byte; only headers are read, and 4 MB for the hash.

    Args:
        source: see `understand_source`.
        request: the types asked for.
        imatrix: an importance matrix's file, or tensor name -> importance [K].
        plan_path: file that the request's plan was read from, for its hash.
        covariance: file of the inputs' covariances that `measure` wrote, for the plan's low-rank corrections.
        config: overrides of the inferred config.
        architecture: `general.architecture`; None for the known architecture's, or what the source says.
        device: "cpu", "cuda", "cuda:1" or "auto": the GPU where there is one.
        engine: "auto", "torch" or "libggml", as in `fk.quantize`.
        workers: threads; None for as many as torch uses.
        provenance: whether the key-values say what the file was made from.
        whole_hash: hash all bytes of the source, not samples.

    Raises:
        GGUFError: where the source is no model, or damaged.
        FormatError: where the types asked for cannot be given.
        BackendUnavailable: where the device is not there.
    """
    place = _device(device)
    if workers is not None and workers < 1:
        raise FormatError(f"workers must be 1 or more, got {workers}.")
    model = understand_source(source, config)
    choice = choose_types(model, request)
    notes = [*model.notes, *choice.notes, *_source_notes(model, choice)]
    weighted: dict[str, Tensor] = {}
    if imatrix is not None:
        means = imatrix if isinstance(imatrix, Mapping) else load_imatrix(imatrix)
        weighted, lacking = match_importance(model, choice.types, means)
        notes += [lacking] if lacking else []
    check_engine(model, choice.types, engine, weighted)
    if covariance is not None and not choice.ranks:
        raise FormatError(
            "Covariances serve the low-rank corrections of a plan, and none are asked for. Leave --covariance out, or give a --plan "
            "that has corrections (`measure --types Q4_K+r16`, then `plan`)."
        )
    covariances = load_covariance(covariance, model, choice.ranks) if covariance is not None else {}
    if choice.ranks and not covariances:
        notes.append("Corrections are fitted without --covariance: less good than what was measured with it.")
    usual = usual_keys(model, choice, architecture)
    metadata = dict(usual)
    if provenance:
        imatrix_path = None if imatrix is None or isinstance(imatrix, Mapping) else os.fsdecode(imatrix)
        hashes = [file_hash(path, whole_hash) for path in model.files.paths]
        metadata |= provenance_keys(
            model, request, hashes, engine=engine, plan=plan_path, imatrix=imatrix_path, imatrix_entries=len(weighted)
        )
    entries = _entries(model, choice)
    nbytes = planned_size(entries, metadata)
    if request.plan and request.plan.bytes not in (nbytes, planned_size(entries, usual)):
        notes.append(f"The plan said {request.plan.bytes:,} bytes; the file takes {nbytes:,}.")
    count = workers or (_GPU_THREADS if place.type == "cuda" else torch.get_num_threads())
    kinds = {name: tensor_kind(name, tensor.shape, model.architecture) for name, tensor in model.tensors.items()}
    blocks = [name for name, kind in kinds.items() if kind == BLOCK]
    blocks = blocks or [name for name, kind in choice.types.items() if kind in FORMATS]
    return Conversion(
        source=model,
        choice=choice,
        metadata=metadata,
        nbytes=nbytes,
        bare_nbytes=planned_size(entries, usual),
        bits_per_weight=_bits(model, choice, model.tensors),
        block_bits_per_weight=_bits(model, choice, blocks),
        peak_bytes=_peak(model, choice, count, place),
        importance=weighted,
        device=place,
        engine=engine,
        workers=count,
        notes=notes,
        covariance=covariances,
    )


def check_target(source: SourceModel, path: str | os.PathLike[str], nbytes: int, force: bool) -> None:
    """Raise GGUFError where a file cannot be written: it exists, is a source, or is larger than the disk."""
    target = os.path.realpath(os.fsdecode(path))
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise GGUFError(f"{shown_path(folder)} is no folder. Make it first.")
    if os.path.exists(target):
        if any(os.path.samefile(target, file) for file in source.files.paths):
            raise GGUFError(f"{shown_path(target)} is the source itself. Write to another name.")
        if not force:
            raise GGUFError(f"{shown_path(target)} exists. Give --force to replace it, or another name.")
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise GGUFError(f"The file takes {nbytes:,} bytes, {shown_path(folder)} has {free:,} free. Nothing was written.")


def _device(name: str) -> torch.device:
    if name == "auto":
        return own_device()
    place = usable_device(name)
    if place.type not in ("cpu", "cuda"):
        raise BackendUnavailable(f'Quantizing runs on "cpu", "cuda" or "auto", got {name!r}.')
    return place


def _entries(source: SourceModel, choice: Choice) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (name, type, shape) as the file states them, in its order; a correction follows its weight."""
    tensors = source.tensors.items()
    return [entry for name, tensor in tensors for entry in choice.option(name).entries(name, written_shape(tensor.shape))]


def _bits(source: SourceModel, choice: Choice, names: Collection[str]) -> float:
    weights = sum(source.tensors[name].weights for name in names)
    return 8 * sum(choice.option(name).nbytes(source.tensors[name].shape) for name in names) / weights if weights else 0.0


def _peak(source: SourceModel, choice: Choice, workers: int, place: torch.device) -> int:
    """Return the bytes that a conversion takes: the largest tensor, each thread's slab, a fit."""
    largest = max((Option(choice.types[name]).nbytes(tensor.shape) for name, tensor in source.tensors.items()), default=0)
    slab = SLAB_WEIGHTS.get(place.type, SLAB_WEIGHTS["cuda"])
    width = max((prod(tensor.shape[1:]) for tensor in source.tensors.values()), default=0)
    fitted = max((source.tensors[name].weights for name in choice.ranks), default=0)
    return largest + workers * _SLAB_BYTES * max(slab, width) + _FIT_BYTES * fitted


def _source_notes(source: SourceModel, choice: Choice) -> list[str]:
    notes = []
    again = requantized(source.tensors, choice.types)
    if again:
        types = sorted({kind for name in again for kind in source.tensors[name].types})
        notes.append(
            f"{len(again)} tensors are quantized in the source ({', '.join(types)}) and change their type: errors add up. A file "
            "made from the 16-bit model is better."
        )
    if any(kind in FP8 for tensor in source.tensors.values() for kind in tensor.types):
        notes.append("The source is fp8, which has errors of its own. A file made from the 16-bit model is better.")
    return notes
