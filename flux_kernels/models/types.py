"""Which ggml type each tensor of a file gets: the rules of the layouts in the wild, as data.

A rule is about three classes of tensors: the matrices inside the blocks get the type asked for, vectors (biases, norm
scales) and the few matrices outside the blocks ("leftovers") stay plain. File sizes published for FLUX.1-dev, schnell and
Krea are reproduced to the byte (tests/models/test_types.py).

Source: ComfyUI-GGUF's tools/convert.py and tools/lcpp.patch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from ..errors import FormatError
from ..formats import type_row, types_by_name
from .architecture import Architecture
from .names import block_of, tensor_class
from .recognise import recognise

VECTOR, LEFTOVER, BLOCK = "vector", "leftover", "block"


@dataclass(frozen=True)
class Rule:
    """State the plain types of one layout.

    `vector` is that of 1-D tensors, `leftover` that of matrices outside the blocks. `small` overrides `leftover` for those
    that the architecture calls narrow; `mixes` allows wider types for some matrices, as the _M and _L names ask for.
    """

    vector: str
    leftover: str
    small: str | None = None
    mixes: bool = False


RULES: dict[str, Rule] = {
    "legacy": Rule(vector="F16", leftover="F16"),
    "old": Rule(vector="F32", leftover="F16", small="F32"),
    "new": Rule(vector="F32", leftover="BF16", mixes=True),
}
# Matrices with fewer weights stay in 32 bit.
_SMALLEST = 1024
_PRECISE = "F32"
_UNDECODED = "F16"

# Matrices that tools store in a wider type, by their original names; the first that matches counts.
WIDENED = {
    "v": re.compile(r"(attn_v|\.to_v|\.v|\.attn\.w[12]v|_attn\.v_proj)\.weight$"),
    "qkv": re.compile(r"(attn_qkv|attn\.qkv|attention\.qkv)\.weight$"),
    "ffn_down": re.compile(
        r"(\.ffn\.2|\.ff\.net\.2|\.mlp\.layer2|\.adaln_modulation_mlp\.2|\.feed_forward\.w2|experts\..*\.w2)\.weight$"
    ),
}


@dataclass(frozen=True)
class Wider:
    """Name the type that matrices of a class get, or the first `count` of a file.

    The later ones get `others`, or the file's own type where that is None.
    """

    type: str
    count: int | None = None
    others: str | None = None


@dataclass(frozen=True)
class NamedType:
    """Resolve a file type's name.

    Attributes:
        base: type of the block matrices.
        file_type: llama.cpp's number of it.
        wider: class of WIDENED -> the type it gets instead.
        is_mix: whether the name promises a mixture, which some layouts never had.
    """

    base: str
    file_type: int
    wider: Mapping[str, Wider] = field(default_factory=dict)
    is_mix: bool = False


# The numbers are llama.cpp's llama_ftype (gguf-py: LlamaFileType).
_MIXES = {
    "Q3_K_M": NamedType(
        "Q3_K", 12, {"v": Wider("Q5_K", 2, "Q4_K"), "qkv": Wider("Q4_K"), "ffn_down": Wider("Q4_K")}, is_mix=True
    ),
    "Q3_K_L": NamedType("Q3_K", 13, {"v": Wider("Q5_K"), "qkv": Wider("Q4_K"), "ffn_down": Wider("Q5_K")}, is_mix=True),
    "Q4_K_M": NamedType("Q4_K", 15, {"v": Wider("Q6_K"), "qkv": Wider("Q5_K"), "ffn_down": Wider("Q6_K")}, is_mix=True),
    "Q5_K_M": NamedType("Q5_K", 17, {"v": Wider("Q6_K"), "qkv": Wider("Q6_K"), "ffn_down": Wider("Q6_K")}, is_mix=True),
}
# What names without _M or _L widen; FLUX.1 and FLUX.2 have no such matrices.
_WIDER = {
    "Q2_K": {"v": Wider("Q3_K")},
    "Q4_K": {"v": Wider("Q5_K", 4), "ffn_down": Wider("Q5_K")},
    "Q4_0": {"ffn_down": Wider("Q4_1")},
    "Q5_0": {"ffn_down": Wider("Q5_1")},
}


def _named_types() -> dict[str, NamedType]:
    """Name the plain file of every type that has a `file_type`, and the mixes.

    A plain file's name ends in "_S" where a mix has the same base.
    """
    named: dict[str, NamedType] = {}
    for row in types_by_name().values():
        if row.file_type is None:
            continue
        mixes = {name: mix for name, mix in _MIXES.items() if mix.base == row.name}
        plain = NamedType(row.name, row.file_type, _WIDER.get(row.name, {}))
        named[f"{row.name}_S" if mixes else row.name] = plain
        named |= mixes
    return named


NAMED_TYPES = _named_types()


def file_type(ggml_type: str) -> int | None:
    """Return llama.cpp's number of a file whose matrices are mostly `ggml_type`, None without one."""
    return type_row(ggml_type).file_type


def main_file_type(
    types: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], architecture: Architecture | None
) -> int | None:
    """Return llama.cpp's number of the type that most weights of the block matrices have, or None.

    Args:
        types: tensor name (any naming, without prefix) -> ggml type name.
        shapes: tensor name -> shape in torch order.
        architecture: of the file, None where it is not known.
    """
    weights: Counter[str] = Counter()
    for name, type_name in types.items():
        if tensor_kind(name, shapes[name], architecture) == BLOCK:
            weights[type_name] += prod(shapes[name])
    return file_type(weights.most_common(1)[0][0]) if weights else None


def tensor_kind(name: str, shape: tuple[int, ...], architecture: Architecture | None) -> str:
    """Return "vector", "leftover" or "block", the class of a tensor that the rules speak of.

    Args:
        name: in any naming, without prefix.
        shape: in torch order.
        architecture: of the file; where it is not known, numbered blocks are recognised by the names that any model has.
    """
    if len(shape) < 2:
        return VECTOR
    if architecture is None:
        return BLOCK if block_of(name) else LEFTOVER
    original = architecture.original_of(name)
    kept = len(shape) > 2 or original.startswith(architecture.plain) or re.fullmatch(architecture.precise, original)
    return LEFTOVER if kept else BLOCK


def tensor_types(rule: str, type_name: str, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Assign a ggml type to every tensor of a file.

    Args:
        rule: "legacy", "old" or "new": the layout whose conventions are followed.
        type_name: a file type's name, such as "Q4_K_S", "Q4_K_M" or "Q8_0".
        tensors: tensor name (any naming, without prefix) -> shape in torch order, in file order.

    Returns:
        Tensor name -> ggml type name.

    Raises:
        FormatError: for an unknown rule or type name, or a mixed one in a layout that has none.
    """
    if rule not in RULES:
        raise FormatError(f"Unknown rule {rule!r}. Known: {', '.join(RULES)}.")
    if type_name not in NAMED_TYPES:
        raise FormatError(f"Unknown file type {type_name!r}. Known: {', '.join(NAMED_TYPES)}.")
    plain, named = RULES[rule], NAMED_TYPES[type_name]
    if named.is_mix and not plain.mixes:
        raise FormatError(f'{type_name} mixes types, which {rule} files never did. Use rule="new" or a type without _M or _L.')
    architecture = recognise(tensors)
    counts: Counter[str] = Counter()
    return {name: _type_of(name, shape, plain, named, architecture, counts) for name, shape in tensors.items()}


def _type_of(
    name: str, shape: tuple[int, ...], rule: Rule, named: NamedType, architecture: Architecture | None, counts: Counter[str]
) -> str:
    kind = tensor_kind(name, shape, architecture)
    if kind == VECTOR:
        return rule.vector
    original = architecture.original_of(name) if architecture else name
    if _is_precise(original, shape, architecture):
        return _PRECISE
    if kind == LEFTOVER:
        narrow = rule.small and architecture and re.fullmatch(architecture.narrow, original)
        if rule.leftover == "BF16" and architecture and re.fullmatch(architecture.undecoded, original):
            return _UNDECODED
        return rule.small if narrow and rule.small else rule.leftover
    widened = next((kind for kind, pattern in WIDENED.items() if pattern.search(original)), None) if rule.mixes else None
    if widened is None or widened not in named.wider:
        return named.base
    counts[widened] += 1
    wider = named.wider[widened]
    early = wider.count is None or counts[widened] <= wider.count
    return wider.type if early else wider.others or named.base


def _is_precise(original: str, shape: tuple[int, ...], architecture: Architecture | None) -> bool:
    """Tell whether a matrix stays in 32 bit in every layout, by its original name."""
    return architecture is not None and (prod(shape) <= _SMALLEST or bool(re.fullmatch(architecture.precise, original)))


def layout_of(types: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], architecture: Architecture | None) -> str:
    """Name the layout of a file's types: "legacy", "old", "new", "mixed" or "other".

    A file is "mixed" where blocks differ in type, or biases are neither F32 nor F16.

    Args:
        types: tensor name without prefix -> ggml type name.
        shapes: tensor name without prefix -> shape in torch order.
        architecture: of the file, None where it is not known.
    """
    seen: dict[str, set[str]] = {VECTOR: set(), LEFTOVER: set(), "small": set(), BLOCK: set()}
    by_class: dict[str, set[str]] = {}
    for name, ggml_type in types.items():
        kind = tensor_kind(name, shapes[name], architecture)
        original = architecture.original_of(name) if architecture else name
        if kind != VECTOR and ggml_type == _PRECISE and _is_precise(original, shapes[name], architecture):
            continue
        if kind == LEFTOVER and architecture and re.fullmatch(architecture.narrow, original):
            kind = "small"
        seen[kind].add(ggml_type)
        if kind == BLOCK:
            by_class.setdefault(tensor_class(name), set()).add(ggml_type)
    if any(len(kinds) > 1 for kinds in by_class.values()) or seen[VECTOR] - {"F32", "F16"}:
        return "mixed"
    for layout, rule in RULES.items():
        if layout != "new" and (seen[VECTOR], seen[LEFTOVER], seen["small"]) == (
            {rule.vector},
            {rule.leftover},
            {rule.small or rule.leftover},
        ):
            return layout
    plain = seen[LEFTOVER] | seen["small"]
    if seen[VECTOR] == {RULES["new"].vector} and plain <= {"BF16", "F16"}:
        return "new"
    return "other"
