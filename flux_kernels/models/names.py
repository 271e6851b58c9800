"""FLUX.1's tensor names as data: which rows of which stored tensor become which parameter.

Two namings exist. "bfl" is the one of the original checkpoints (q, k, v and the single blocks' MLP input are one tensor);
"diffusers" is that of FluxTransformer2DModel's state dict. Every difference is a choice of output rows, so that packed
rows of any block format move as bytes.

Source: the tensor table of FLUX.1-dev, and the modules of diffusers' FluxTransformer2DModel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

BFL, DIFFUSERS = "bfl", "diffusers"
NAMINGS = (BFL, DIFFUSERS)
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")


@dataclass(frozen=True)
class Link:
    """Relate one BFL module to the diffusers modules that its output rows become, in row order.

    Attributes:
        bfl: module name; "{i}" stands for the block index.
        diffusers: module names, in the order of the stored rows.
        swap_halves: whether the stored rows are (shift, scale) where diffusers wants (scale, shift).
        scale: whether it is a norm: one vector, called `scale` by BFL and `weight` by diffusers.
    """

    bfl: str
    diffusers: tuple[str, ...]
    swap_halves: bool = False
    scale: bool = False


def _embedder(bfl: str, diffusers: str) -> tuple[Link, Link]:
    diffusers = f"time_text_embed.{diffusers}"
    return Link(f"{bfl}.in_layer", (f"{diffusers}.linear_1",)), Link(f"{bfl}.out_layer", (f"{diffusers}.linear_2",))


def _stream(stream: str, context: str, q: str, k: str, v: str, out: str, norm: str) -> tuple[Link, ...]:
    """List the links of the image or the text stream of a double block."""
    bfl, block = f"double_blocks.{{i}}.{stream}", "transformer_blocks.{i}"
    return (
        Link(f"{bfl}_mod.lin", (f"{block}.norm1{context}.linear",)),
        Link(f"{bfl}_attn.qkv", (f"{block}.attn.{q}", f"{block}.attn.{k}", f"{block}.attn.{v}")),
        Link(f"{bfl}_attn.norm.query_norm", (f"{block}.attn.{norm}q",), scale=True),
        Link(f"{bfl}_attn.norm.key_norm", (f"{block}.attn.{norm}k",), scale=True),
        Link(f"{bfl}_attn.proj", (f"{block}.attn.{out}",)),
        Link(f"{bfl}_mlp.0", (f"{block}.ff{context}.net.0.proj",)),
        Link(f"{bfl}_mlp.2", (f"{block}.ff{context}.net.2",)),
    )


_SINGLE = "single_transformer_blocks.{i}"
LINKS: tuple[Link, ...] = (
    Link("img_in", ("x_embedder",)),
    *_embedder("time_in", "timestep_embedder"),
    *_embedder("vector_in", "text_embedder"),
    *_embedder("guidance_in", "guidance_embedder"),
    Link("txt_in", ("context_embedder",)),
    *_stream("img", "", "to_q", "to_k", "to_v", "to_out.0", "norm_"),
    *_stream("txt", "_context", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_"),
    Link(
        "single_blocks.{i}.linear1",
        (f"{_SINGLE}.attn.to_q", f"{_SINGLE}.attn.to_k", f"{_SINGLE}.attn.to_v", f"{_SINGLE}.proj_mlp"),
    ),
    Link("single_blocks.{i}.linear2", (f"{_SINGLE}.proj_out",)),
    Link("single_blocks.{i}.norm.query_norm", (f"{_SINGLE}.attn.norm_q",), scale=True),
    Link("single_blocks.{i}.norm.key_norm", (f"{_SINGLE}.attn.norm_k",), scale=True),
    Link("single_blocks.{i}.modulation.lin", (f"{_SINGLE}.norm.linear",)),
    Link("final_layer.linear", ("proj_out",)),
    Link("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap_halves=True),
)

_BLOCK = re.compile(r"^(double_blocks|single_blocks|transformer_blocks|single_transformer_blocks)\.(\d{1,6})\.")


@dataclass(frozen=True)
class Source:
    """Say where a parameter lies in a file: row ranges [start, stop) of a tensor, one after the other."""

    tensor: str
    rows: tuple[tuple[int, int], ...]


def block_of(name: str) -> tuple[str, int] | None:
    """Return (kind of block, index) of a tensor inside a block, None for any other tensor."""
    match = _BLOCK.match(name)
    return (match[1], int(match[2])) if match else None


def tensor_class(name: str) -> str:
    """Return `name` with its block index replaced by "*"."""
    return _BLOCK.sub(r"\1.*.", name)


def strip_prefix(name: str) -> str:
    """Return `name` without the prefix that some writers put before every name."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def stored_name(parameter: str, naming: str) -> str:
    """Return the name under which an unsplit diffusers parameter is stored in a file of `naming`."""
    module, _, kind = parameter.rpartition(".")
    if naming == DIFFUSERS:
        return parameter
    block = block_of(parameter)
    index = block[1] if block else 0
    link = next(link for link in LINKS if link.diffusers[0].format(i=index) == module and len(link.diffusers) == 1)
    return f"{link.bfl.format(i=index)}.{'scale' if link.scale else kind}"


def sources(shapes: Mapping[str, tuple[int, ...]], naming: str) -> dict[str, Source]:
    """Locate every parameter of a FluxTransformer2DModel in a file of the given naming.

    Args:
        shapes: parameter name -> shape, as in the model's state dict. Parameters of no known module are left out.
        naming: "bfl" or "diffusers".

    Returns:
        Parameter name -> Source, in the order in which files are written.
    """
    located: dict[str, Source] = {}
    if naming == DIFFUSERS:
        return {name: Source(name, ((0, shape[0]),)) for name, shape in shapes.items()}
    for bfl, modules, link in _expanded(shapes):
        for kind in ("weight",) if link.scale else ("weight", "bias"):
            start = 0
            tensor = f"{bfl}.{'scale' if link.scale else kind}"
            for module in modules:
                size = shapes[f"{module}.{kind}"][0]
                half = start + size // 2
                rows = ((half, start + size), (start, half)) if link.swap_halves else ((start, start + size),)
                located[f"{module}.{kind}"] = Source(tensor, rows)
                start += size
    return located


def _expanded(shapes: Mapping[str, tuple[int, ...]]) -> Iterable[tuple[str, list[str], Link]]:
    """Yield (BFL module, diffusers modules, link) block by block, where `shapes` has parameters for it."""
    for group in _groups():
        index = 0
        while f"{group[0].diffusers[0].format(i=index)}.weight" in shapes:
            for link in group:
                yield link.bfl.format(i=index), [name.format(i=index) for name in link.diffusers], link
            index += 1
            if "{i}" not in group[0].bfl:
                break


def _groups() -> list[list[Link]]:
    """Group the links that repeat together: each global link alone, the double blocks, the single blocks."""
    groups: dict[str, list[Link]] = {}
    for link in LINKS:
        groups.setdefault(link.bfl.split(".")[0] if "{i}" in link.bfl else link.bfl, []).append(link)
    return list(groups.values())


def stored_shapes(located: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return tensor name -> shape of the file that holds parameters of these shapes at these sources."""
    rows: dict[str, int] = {}
    for source in located.values():
        rows[source.tensor] = max(rows.get(source.tensor, 0), *(stop for _, stop in source.rows))
    columns = {source.tensor: shapes[parameter][1:] for parameter, source in located.items()}
    return {tensor: (count, *columns[tensor]) for tensor, count in rows.items()}
