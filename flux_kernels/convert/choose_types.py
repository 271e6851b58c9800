"""Choose the ggml type of every tensor of a new file: by layout and file type, by plan, by pattern."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor

from ..errors import FormatError
from ..formats import PLAIN_TYPES, block_format
from ..gguf.check import listed
from ..mixed.option import Option
from ..mixed.plan_file import Plan, check_tensors
from ..models.types import BLOCK, NAMED_TYPES, RULES, VECTOR, main_file_type, tensor_kind, tensor_types
from ..packing import Engine, quantizer
from ..source.source import SourceModel, SourceTensor
from ..torch_backend import libggml

DEFAULT_RULE = "new"
# What other models' blocks have in common: an index in the name.
_NUMBERED = re.compile(r"(^|\.)[0-9]+\.")


@dataclass(frozen=True)
class Request:
    """State what is asked for.

    Attributes:
        type: file type such as "Q4_K_S", or a ggml type's own name; next to a plan, of the block matrices that it does not
            name. None leaves those in 16 bit.
        rule: "old", "new" or "legacy"; None takes the plan's, else "new".
        plan: types by tensor, or None.
        overrides: (fnmatch pattern of tensor names, ggml type name); the first that matches counts, before plan and type.
        blocks: fnmatch patterns of the matrices that get the type; empty takes those that published files of the architecture
            quantize, and in models of no known architecture every matrix with an index in its name.
    """

    type: str | None = None
    rule: str | None = None
    plan: Plan | None = None
    overrides: Sequence[tuple[str, str]] = ()
    blocks: Sequence[str] = ()

    @property
    def layout(self) -> str:
        """The layout that counts."""
        planned = self.plan.options.get("rule") if self.plan else None
        return self.rule or planned or DEFAULT_RULE


@dataclass
class Choice:
    """Hold how every tensor is stored.

    Attributes:
        types: tensor name -> ggml type name.
        file_type: llama.cpp's number, None where there is none.
        notes: sentences for the user.
        ranks: tensor name -> rank of its low-rank correction, of those that get one.
    """

    types: dict[str, str]
    file_type: int | None
    notes: list[str] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)

    def option(self, name: str) -> Option:
        """Return type and rank of a tensor."""
        return Option(self.types[name], self.ranks.get(name, 0))


def choose_types(source: SourceModel, request: Request) -> Choice:
    """Choose the type of every tensor.

    Raises:
        FormatError: where nothing is asked for, names or types are unknown, or a tensor cannot have the type it was given
            by name.
    """
    if request.type is None and request.plan is None and not request.overrides:
        raise FormatError("Nothing to do: give --type, --plan or --tensor-type.")
    shapes = {name: tensor.shape for name, tensor in source.tensors.items()}
    named = _named(request.type)
    chosen = Choice(tensor_types(request.layout, named, shapes), None)
    _apply_blocks(chosen, source, request, named)
    if request.layout == "new":
        _keep_half(chosen, source)
    given = _given(shapes, request)
    chosen.types.update(given)
    _check_blocks(chosen, shapes, given, RULES[request.layout].leftover)
    chosen.notes += _beside_plan(chosen, source, shapes, given, request)
    chosen.ranks = _ranks(source, chosen.types, request)
    if chosen.ranks:
        chosen.notes.append(
            f"{len(chosen.ranks)} tensors get a low-rank correction, two tensors more each. Only flux_kernels.load_flux reads "
            "them; other readers refuse the file."
        )
    chosen.file_type = main_file_type(chosen.types, shapes, source.architecture) if given else NAMED_TYPES[named].file_type
    return chosen


def _named(type_name: str | None) -> str:
    """Return the file type's name; block types count as the uniform file of them."""
    if type_name is None:
        return "BF16"
    if type_name in NAMED_TYPES:
        return type_name
    alias = (name for name, named in NAMED_TYPES.items() if named.base == type_name and not named.is_mix)
    return next(alias, type_name)


def _apply_blocks(chosen: Choice, source: SourceModel, request: Request, named: str) -> None:
    """Give the type to what counts as a block where patterns say so, or no architecture does."""
    if not request.blocks and source.architecture is not None:
        return
    rule = RULES[request.layout]
    count = 0
    for name, tensor in source.tensors.items():
        if tensor_kind(name, tensor.shape, source.architecture) == VECTOR:
            continue
        if request.blocks:
            inside = any(fnmatchcase(name, pattern) for pattern in request.blocks)
        else:
            inside = len(tensor.shape) == 2 and bool(_NUMBERED.search(name))
        chosen.types[name] = NAMED_TYPES[named].base if inside else rule.leftover
        count += inside
    if not count:
        raise FormatError("No matrix is a block by name. Say which are, with --block 'PATTERN'.")
    chosen.notes.append(f"{count} matrices count as block matrices, by their names.")


def _keep_half(chosen: Choice, source: SourceModel) -> None:
    """Keep what stays in 16 bit as the source has it: as many bytes, and no value changes."""
    for name, kind in chosen.types.items():
        if kind == "BF16" and source.tensors[name].types == {"F16"}:
            chosen.types[name] = "F16"


def _given(shapes: Mapping[str, tuple[int, ...]], request: Request) -> dict[str, str]:
    """Return the types of tensors that plan and patterns name."""
    planned = dict(request.plan.types) if request.plan else {}
    check_tensors(planned, shapes, "the source")
    for pattern, kind in request.overrides:
        block_format(kind)
        if not any(fnmatchcase(name, pattern) for name in shapes):
            raise FormatError(f"No tensor is called {pattern!r}. `--dry-run --json` lists the names.")
    for name in shapes:
        matching = [kind for pattern, kind in request.overrides if fnmatchcase(name, pattern)]
        if matching:
            planned[name] = matching[0]
    return planned


def _beside_plan(
    chosen: Choice, source: SourceModel, shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, str], request: Request
) -> list[str]:
    """Say which block matrices a plan leaves in 16 bit; refuse a type that it leaves nothing for."""
    blocks = [name for name, shape in shapes.items() if tensor_kind(name, shape, source.architecture) == BLOCK]
    unnamed = [name for name in blocks if name not in given]
    if request.plan is None or (request.type is not None and unnamed):
        return []
    if request.type is not None:
        raise FormatError(
            f"The plan has a type for every matrix of the blocks, so --type {request.type} has none left. Leave one of them out, or "
            "change tensors of the plan with --tensor-type PATTERN=TYPE."
        )
    left = [name for name in unnamed if chosen.types[name] in PLAIN_TYPES]
    return (
        [f"The plan does not name {listed(left)}: they stay in {chosen.types[left[0]]}. --type gives them one."] if left else []
    )


def _ranks(source: SourceModel, types: Mapping[str, str], request: Request) -> dict[str, int]:
    """Return the ranks that the plan gives, of tensors that are quantized."""
    planned = request.plan.low_rank if request.plan else {}
    for name, rank in planned.items():
        shape = source.tensors[name].shape
        if block_format(types[name]) is None or len(shape) != 2 or rank > min(shape):
            raise FormatError(f"The plan gives {name} ({types[name]}, {list(shape)}) a correction of rank {rank}. Plan again.")
    return dict(planned)


def _check_blocks(chosen: Choice, shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, str], plain: str) -> None:
    """Keep matrices plain whose rows are not whole blocks; raise FormatError for those of a named type."""
    kept = []
    for name, kind in chosen.types.items():
        fmt = block_format(kind)
        if fmt is None or (shapes[name] and shapes[name][-1] % fmt.block_size == 0):
            continue
        if name in given:
            width = shapes[name][-1] if shapes[name] else 1
            raise FormatError(
                f"{name} cannot be {kind}: its rows have {width} weights, {kind} needs a multiple of {fmt.block_size}."
            )
        kept.append(name)
    for name in kept:
        chosen.types[name] = plain
    if kept:
        chosen.notes.append(f"{len(kept)} matrices stay {plain}, as their rows are not whole blocks: {listed(kept)}.")


def match_importance(
    source: SourceModel, types: Mapping[str, str], means: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], str]:
    """Find the importance of every matrix that gets quantized, by its name in the file or in the source.

    Returns:
        Tensor name -> importance [K], and a sentence on what the matrix lacks ("" where it has all).

    Raises:
        FormatError: where a length is not that of the tensor's rows, or nothing matches.
    """
    importance, missing = {}, []
    for name, tensor in source.tensors.items():
        if block_format(types[name]) is None or len(tensor.shape) < 2:
            continue
        mean = means.get(name, means.get(tensor.parameter))
        if mean is None:
            missing.append(name)
        elif mean.numel() != tensor.shape[-1]:
            raise FormatError(
                f"The importance of {name} has {mean.numel()} values, its rows have {tensor.shape[-1]} weights. The importance "
                "matrix is of another model."
            )
        else:
            importance[name] = mean
    if missing and not importance:
        raise FormatError(
            f"The importance matrix has none of the tensors: it names {listed(list(means))}, the file {listed(missing)}."
        )
    note = f"{len(missing)} of {len(missing) + len(importance)} quantized matrices have no importance: {listed(missing)}."
    return importance, note if missing else ""


def check_engine(source: SourceModel, types: Mapping[str, str], engine: Engine, weighted: Mapping[str, Tensor]) -> None:
    """Raise FormatError, before anything is written, where a type cannot be made here."""
    for name, tensor in source.tensors.items():
        fmt = block_format(types[name])
        if fmt is None or tensor.type == fmt.name:
            continue
        quantizer(fmt, engine)
        by_libggml = engine == "libggml" or fmt.quantize is None
        if by_libggml and name not in weighted and libggml.requires_importance(fmt):
            raise FormatError(
                f"libggml makes {fmt.name} only with an importance matrix, and there is none of {name}. Give --imatrix FILE "
                "(`flux-kernels measure` collects one), or choose a type that needs none, such as Q2_K or IQ4_XS."
            )


def requantized(tensors: Mapping[str, SourceTensor], types: Mapping[str, str]) -> list[str]:
    """List the tensors that are quantized in the source and change their type."""
    return [
        name
        for name, tensor in tensors.items()
        if tensor.type != types[name] and any(piece.quantized for piece, _, _ in tensor.pieces)
    ]
