"""Gather the facts about a GGUF file that the `inspect` command prints."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ..errors import GGUFError
from ..formats import FORMATS
from ..gguf.conventions import file_title
from ..gguf.file import GGUFFile, GGUFTensor, read_gguf
from ..gguf.spec import shown_path
from ..models.architecture import Architecture
from ..models.architectures.flux1 import FLUX1
from ..models.names import strip_prefix, tensor_class
from ..models.recognise import note_left_out, recognise, transformer_names
from ..models.stored import understand
from ..models.types import BLOCK, layout_of, tensor_kind
from ..text_encoders.encoders.t5 import T5
from ..text_encoders.stored import understand as understand_encoder
from .file_model import settings_note
from .memory_plan import (
    CONTEXT_BYTES,
    GIB,
    LIVE_WIDTHS,
    T5_WIDTH,
    TEXT_TOKENS,
    USABLE,
    Part,
    companions,
    free_on_card,
    plan_memory,
    text_working,
    transformer_working,
)

# Characters of a key-value worth showing.
_SHORT_VALUE = 200
CARDS_GIB = (6, 8, 12, 16, 24)
# The overhead model, stated to the user in OVERHEAD; its arithmetic is memory_plan's. SIDE is the picture's, in pixels.
SIDE = 1024
T5_BITS = {"T5 in 16 bit": 16.0, "T5 in Q8_0": 8.5}
ACTIVATION_BYTES = 2
OVERHEAD = (
    f"{USABLE:.0%} of the card usable; {CONTEXT_BYTES / GIB:g} GiB for CUDA; activations of {{image}} image "
    f"and {{text}} text tokens ({{width}} x {{height}}{{frames}}), batch 1, {LIVE_WIDTHS} hidden widths a token in 16 bit and a tenth "
    "more; the largest matrix decoded; the transformer alone (text encoders and VAE off the card while it runs, as under model "
    "offload); plain tensors in 16 bit; an estimate"
)


T5_OVERHEAD = (
    f"{USABLE:.0%} of the card usable; {CONTEXT_BYTES / GIB:g} GiB for CUDA; activations of {TEXT_TOKENS} tokens; the largest "
    "matrix decoded; the encoder alone (as under model offload); an estimate"
)
TRANSFORMER, T5_ENCODER = "transformer", "T5 encoder"


@dataclass(frozen=True)
class TypeCount:
    """Count the tensors of one class and one type.

    Attributes:
        kind: "block", "leftover" or "vector".
        tensor_class: their name with * for the block.
        type: of ggml.
        tensors: how many.
        parameters: weights in all of them.
        nbytes: of their data, without padding.
    """

    kind: str
    tensor_class: str
    type: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class FileFacts:
    """Hold what is known about a GGUF file.

    Attributes:
        path: the file.
        nbytes: its size in bytes.
        role: TRANSFORMER or T5_ENCODER.
        refused: why `load_transformer` (or `load_t5`) would refuse it, without its path; None where it loads.
        architecture: name of the row it belongs to, such as "FLUX.2"; None where no row does.
        pipelines: diffusers' pipeline classes for it.
        notes: sentences about a file that loads and may still be wrong.
        settings: a sentence about steps and guidance where the file's title does not tell its model; None where it does.
        variant: the published model, or the encoder's size; None where refused.
        layout: "legacy", "old", "new", "mixed" or "other"; None where refused, and for a T5 encoder.
        naming: "bfl" (of Flux), "original" or "diffusers", for a T5 encoder "llama.cpp" or "transformers"; None where refused.
        config: the inferred config; empty where refused.
        metadata: the file's short key-values.
        types: tensors by class and type.
        parameters: weights in all tensors.
        bits_per_weight: 8 * bytes of all tensors / parameters.
        block_bits_per_weight: the same over the matrices inside the blocks.
        resident_bytes: bytes of the loaded model (quantized matrices packed, all else in 16 bit).
        overhead_bytes: bytes on top of it while it runs, see `overhead_model`.
        fits: GiB of card memory -> whether the model runs on it, see `overhead_model`.
        offloads: how T5 is held -> GiB of card memory -> the offload that `generate --offload auto` would choose there; empty
            where the text encoder is not FLUX.1's.
        overhead_model: the assumptions behind `overhead_bytes` and `fits`.
    """

    path: str
    nbytes: int
    role: str = TRANSFORMER
    refused: str | None = None
    notes: tuple[str, ...] = ()
    settings: str | None = None
    architecture: str | None = None
    pipelines: tuple[str, ...] = ()
    variant: str | None = None
    layout: str | None = None
    naming: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    types: tuple[TypeCount, ...] = ()
    parameters: int = 0
    bits_per_weight: float = 0.0
    block_bits_per_weight: float = 0.0
    resident_bytes: int = 0
    overhead_bytes: int = 0
    fits: dict[int, bool] = field(default_factory=dict)
    offloads: dict[str, dict[int, str]] = field(default_factory=dict)
    overhead_model: str = ""


def inspect_file(path: str | os.PathLike, config: object | None = None) -> FileFacts:
    """Gather the facts about a GGUF file; a file that cannot be loaded gives `refused`, not an error.

    Only the header is read. Raises FileNotFoundError where there is no file.
    """
    name, nbytes = os.fspath(path), os.stat(path).st_size
    try:
        file = read_gguf(path)
    except GGUFError as error:
        return FileFacts(name, nbytes, refused=str(error).removeprefix(f"{shown_path(name)}: "))
    architecture = recognise(list(map(strip_prefix, transformer_names(file.tensors))))
    known = _known_of_any(name, nbytes, file, architecture)
    if architecture is None and any(map(T5.block_name, file.tensors)):
        return _t5_facts(known, file)
    try:
        stored = understand(file, config)
    except GGUFError as error:
        return FileFacts(**known, refused=str(error))
    architecture = stored.architecture
    title = file_title(name, file.metadata)
    tensors = [file.tensors[name] for name in stored.names.values()]
    part = _part(tensors, architecture, stored.config)
    others = file.tensors.keys() - set(transformer_names(file.tensors))
    return FileFacts(
        **known,
        notes=(*note_left_out(others), *([stored.lacking] if stored.lacking else [])),
        settings=settings_note(architecture, stored.config, title, None),
        pipelines=architecture.pipelines,
        variant=architecture.variant_name(stored.config, title),
        layout=layout_of(stored.types, stored.shapes, architecture),
        naming=stored.naming,
        config=stored.config,
        **_fits(part),
        # The companions of that arithmetic are FLUX.1's.
        offloads=_offloads(part) if architecture is FLUX1 and stored.config["joint_attention_dim"] == T5_WIDTH else {},
        overhead_model=_overhead(architecture, stored.config),
    )


def _t5_facts(known: dict[str, Any], file: GGUFFile) -> FileFacts:
    try:
        config = understand_encoder(file, (T5,)).config
    except GGUFError as error:
        return FileFacts(**known, role=T5_ENCODER, refused=str(error))
    sizes, decoded = _sizes(file.tensors.values())
    blocks = f"{config['num_layers']} block{'s' * (config['num_layers'] != 1)}"
    working = text_working(config["d_model"], config["num_heads"], TEXT_TOKENS, decoded=decoded)
    return FileFacts(
        **known,
        role=T5_ENCODER,
        variant=f"T5 encoder with {blocks}, width {config['d_model']}",
        naming="llama.cpp" if any(name.startswith("enc.") for name in file.tensors) else "transformers",
        config=config,
        **_fits(Part("text_encoder_2", sum(sizes), max(sizes), working)),
        overhead_model=T5_OVERHEAD,
    )


def _fits(part: Part) -> dict[str, Any]:
    return {
        "resident_bytes": part.weights,
        "overhead_bytes": part.working + CONTEXT_BYTES,
        "fits": {card: part.weights + part.working <= free_on_card(card) for card in CARDS_GIB},
    }


def _known_of_any(path: str, nbytes: int, file: GGUFFile, architecture: Architecture | None) -> dict[str, Any]:
    """Gather what can be said of any GGUF file, whether it can be loaded or not."""
    types = _count_types(file, architecture)
    blocks = [count for count in types if count.kind == BLOCK]
    return {
        "path": path,
        "nbytes": nbytes,
        "architecture": architecture and architecture.name,
        "metadata": {key: value for key, value in file.metadata.items() if _is_short(value)},
        "types": types,
        "parameters": sum(count.parameters for count in types),
        "bits_per_weight": _bits(types),
        "block_bits_per_weight": _bits(blocks),
    }


def _is_short(value: Any) -> bool:
    return not isinstance(value, list) and len(str(value)) <= _SHORT_VALUE


def _count_types(file: GGUFFile, architecture: Architecture | None) -> tuple[TypeCount, ...]:
    counts: dict[tuple[str, str, str], list[int]] = {}
    for name, tensor in file.tensors.items():
        key = (*_kind_and_class(name, tensor.shape, architecture), tensor.format)
        count = counts.setdefault(key, [0, 0, 0])
        parameters = prod(tensor.shape)
        for index, value in enumerate((1, parameters, tensor.nbytes)):
            count[index] += value
    return tuple(TypeCount(*key, *count) for key, count in sorted(counts.items()))


def _kind_and_class(name: str, shape: tuple[int, ...], architecture: Architecture | None) -> tuple[str, str]:
    t5 = T5.block_name(name)
    if t5 is not None and len(shape) > 1:
        return BLOCK, t5
    bare = strip_prefix(name)
    return tensor_kind(bare, shape, architecture), tensor_class(bare)


def _bits(counts: Iterable[TypeCount]) -> float:
    counts = list(counts)
    parameters = sum(count.parameters for count in counts)
    return 8 * sum(count.nbytes for count in counts) / parameters if parameters else 0.0


def _resident(tensor: GGUFTensor) -> int:
    """Return the bytes of a tensor in the loaded model."""
    packed = tensor.format in FORMATS and len(tensor.shape) > 1
    return tensor.nbytes if packed else prod(tensor.shape) * ACTIVATION_BYTES


def _part(stored: Sequence[GGUFTensor], architecture: Architecture, config: Mapping[str, Any]) -> Part:
    """Return what the transformer needs on a card for one picture."""
    sizes, decoded = _sizes(stored)
    tokens = architecture.picture_tokens(architecture.settings(config)) + architecture.text_tokens
    working = transformer_working(architecture.width(config), tokens, decoded=decoded)
    return Part("transformer", sum(sizes), max(sizes), working)


def _overhead(architecture: Architecture, config: Mapping[str, Any]) -> str:
    """State the assumptions of the arithmetic for a model."""
    usual = architecture.settings(config)
    frames = f" x {usual.latent_frames} latent frames" if usual.latent_frames > 1 else ""
    size = {"width": usual.size[0], "height": usual.size[1], "frames": frames}
    return OVERHEAD.format(image=architecture.picture_tokens(usual), text=architecture.text_tokens, **size)


def _sizes(stored: Collection[GGUFTensor]) -> tuple[list[int], int]:
    """Return the bytes of each tensor once loaded, and of the largest packed matrix once decoded."""
    packed = (tensor for tensor in stored if tensor.format in FORMATS)
    decoded = max((prod(tensor.shape) for tensor in packed), default=0) * ACTIVATION_BYTES
    return [_resident(tensor) for tensor in stored], decoded


def _offloads(part: Part) -> dict[str, dict[int, str]]:
    return {
        held: {
            card: plan_memory([part, *companions(SIDE, SIDE, bits)], free_on_card(card), SIDE, SIDE).offload
            for card in CARDS_GIB
        }
        for held, bits in T5_BITS.items()
    }
