"""Which ggml type each tensor of a FLUX.1 file gets: the rules of the layouts in the wild, as data.

A rule is about three classes of tensors: the matrices inside the blocks get the type asked for, vectors (biases, norm
scales) and the few matrices outside the blocks ("leftovers") stay plain. File sizes published for FLUX.1-dev, schnell and
Krea are reproduced to the byte (tests/models/test_types.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import FormatError
from ..formats import type_row, types_by_name
from .names import block_of

VECTOR, LEFTOVER, BLOCK = "vector", "leftover", "block"


@dataclass(frozen=True)
class Rule:
    """State the plain types of one layout.

    `vector` is that of 1-D tensors, `leftover` that of matrices outside the blocks. `small` overrides `leftover` for the
    narrow ones of SMALL_LEFTOVER; `mixes` allows the _M and _L type names.
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

# The leftovers that the "old" converter kept in 32 bit, in both namings.
SMALL_LEFTOVER = re.compile(
    r"^(img_in|\w+_in\.in_layer|final_layer\.linear|x_embedder|time_text_embed\.\w+\.linear_1|proj_out)\.weight$"
)

# Attention inputs of the double blocks: all that an _M or _L file stores in a wider type.
DOUBLE_QKV = re.compile(
    r"^(double_blocks\.\d+\.\w+_attn\.qkv|transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj))\.weight$"
)


@dataclass(frozen=True)
class NamedType:
    """Resolve a file type's name.

    It stands for the block matrices' type, the type of DOUBLE_QKV, and llama.cpp's `file_type` number.
    """

    base: str
    qkv: str
    file_type: int


# The numbers are llama.cpp's llama_ftype (gguf-py: LlamaFileType).
_MIXES = {
    "Q3_K_M": NamedType("Q3_K", "Q4_K", 12),
    "Q3_K_L": NamedType("Q3_K", "Q4_K", 13),
    "Q4_K_M": NamedType("Q4_K", "Q5_K", 15),
    "Q5_K_M": NamedType("Q5_K", "Q6_K", 17),
}


def _named_types() -> dict[str, NamedType]:
    """Name the uniform file of every type that has a `file_type`, and the mixes.

    A uniform file's name ends in "_S" where a mix has the same base.
    """
    named: dict[str, NamedType] = {}
    for row in types_by_name().values():
        if row.file_type is None:
            continue
        mixes = {name: mix for name, mix in _MIXES.items() if mix.base == row.name}
        named[f"{row.name}_S" if mixes else row.name] = NamedType(row.name, row.name, row.file_type)
        named |= mixes
    return named


NAMED_TYPES = _named_types()


def file_type(ggml_type: str) -> int | None:
    """Return llama.cpp's number of a file whose matrices are mostly `ggml_type`, None without one."""
    return type_row(ggml_type).file_type


def tensor_kind(name: str, shape: tuple[int, ...]) -> str:
    """Return "vector", "leftover" or "block", the class of a tensor that the rules speak of."""
    if len(shape) < 2:
        return VECTOR
    return BLOCK if block_of(name) else LEFTOVER


def tensor_types(rule: str, type_name: str, tensors: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Assign a ggml type to every tensor of a FLUX.1 file.

    Args:
        rule: "legacy", "old" or "new": the layout whose conventions are followed.
        type_name: a file type's name, such as "Q4_K_S", "Q4_K_M" or "Q8_0".
        tensors: tensor name (either naming, without prefix) -> shape in torch order.

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
    if named.base != named.qkv and not plain.mixes:
        raise FormatError(f'{type_name} mixes types, which {rule} files never did. Use rule="new" or a type without _M or _L.')
    return {name: _type_of(name, shape, plain, named) for name, shape in tensors.items()}


def _type_of(name: str, shape: tuple[int, ...], rule: Rule, named: NamedType) -> str:
    kind = tensor_kind(name, shape)
    if kind == VECTOR:
        return rule.vector
    if kind == LEFTOVER:
        return rule.small if rule.small and SMALL_LEFTOVER.match(name) else rule.leftover
    return named.qkv if DOUBLE_QKV.match(name) else named.base
