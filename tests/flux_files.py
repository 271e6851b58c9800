"""Synthetic FLUX.1 GGUF files for tests, written with gguf-py.

Shapes, names and types are typed by hand, never taken from flux_kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path

import gguf
import numpy as np

GOLDEN = Path(__file__).parent / "golden"
HEAD = 64
# The smallest of which every K inside the blocks is a multiple of 256
WIDTH = 256
TEXT = 256
POOLED = 256
FLOATS = {"F32": np.float32, "F16": np.float16}
# Offsets of the f16 scales in a K-quant block (ggml-common.h), to shrink golden blocks to the size of real weights.
HALF_OFFSETS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
BLOCK_BYTES = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}


@dataclass(frozen=True)
class Architecture:
    """State what a synthetic FLUX.1 consists of."""

    double: int = 1
    single: int = 1
    guidance: bool = True
    in_channels: int = 64
    out_channels: int = 64
    width: int = WIDTH
    head: int = HEAD
    text: int = TEXT
    pooled: int = POOLED

    def bfl_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return BFL tensor name -> torch shape, as in the published table of FLUX.1-dev."""
        h = self.width
        shapes: dict[str, tuple[int, ...]] = {}

        def linear(name: str, rows: int, columns: int) -> None:
            shapes[f"{name}.weight"] = (rows, columns)
            shapes[f"{name}.bias"] = (rows,)

        linear("img_in", h, self.in_channels)
        embedders = {"time_in": 256, "vector_in": self.pooled} | ({"guidance_in": 256} if self.guidance else {})
        for name, columns in embedders.items():
            linear(f"{name}.in_layer", h, columns)
            linear(f"{name}.out_layer", h, h)
        linear("txt_in", h, self.text)
        for i in range(self.double):
            for stream in (f"double_blocks.{i}.img", f"double_blocks.{i}.txt"):
                linear(f"{stream}_mod.lin", 6 * h, h)
                linear(f"{stream}_attn.qkv", 3 * h, h)
                shapes[f"{stream}_attn.norm.query_norm.scale"] = (self.head,)
                shapes[f"{stream}_attn.norm.key_norm.scale"] = (self.head,)
                linear(f"{stream}_attn.proj", h, h)
                linear(f"{stream}_mlp.0", 4 * h, h)
                linear(f"{stream}_mlp.2", h, 4 * h)
        for i in range(self.single):
            block = f"single_blocks.{i}"
            linear(f"{block}.linear1", 7 * h, h)
            linear(f"{block}.linear2", h, 5 * h)
            shapes[f"{block}.norm.query_norm.scale"] = (self.head,)
            shapes[f"{block}.norm.key_norm.scale"] = (self.head,)
            linear(f"{block}.modulation.lin", 3 * h, h)
        linear("final_layer.linear", self.out_channels, h)
        linear("final_layer.adaLN_modulation.1", 2 * h, h)
        return shapes


@dataclass
class FluxFile:
    """Hold what a file is to contain: name -> (packed bytes or floats, ggml type name, torch shape)."""

    tensors: dict[str, tuple[np.ndarray, str, tuple[int, ...]]] = field(default_factory=dict)

    def values(self) -> dict[str, np.ndarray]:
        """Decode every tensor to float32 with gguf-py, in its torch shape."""
        return {name: decode(data, kind).reshape(shape) for name, (data, kind, shape) in self.tensors.items()}

    def write(self, path: Path, *, architecture: str = "flux", prefix: str = "", keys=(), order=None) -> Path:
        """Write the file with gguf-py.

        `keys`: (method of GGUFWriter, key, value); `order`: names in file order.
        """
        writer = gguf.GGUFWriter(None, architecture)
        if not architecture:
            writer.kv_data[0].clear()
        for method, key, value in keys:
            getattr(writer, method)(key, value)
        for name in order or self.tensors:
            data, kind, _ = self.tensors[name]
            writer.add_tensor(prefix + name, data, raw_dtype=getattr(gguf.GGMLQuantizationType, kind))
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def write_hole(
    path: Path,
    architecture: str,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    number: int | None = None,
    keys: Mapping[str, int | float] | None = None,
) -> Path:
    """Write the header of a file with gguf-py and leave the data a hole.

    `tensors`: name -> (ggml type name, torch shape); `number`: the file type's, with the key-values of published files; `keys`: more
    key-values.
    """
    writer = gguf.GGUFWriter(None, architecture)
    for key, value in (keys or {}).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    if number is not None:
        writer.add_quantization_version(2)
        writer.add_file_type(number)
    size = 0
    for name, (kind_name, shape) in tensors.items():
        kind = getattr(gguf.GGMLQuantizationType, kind_name)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        nbytes = prod(shape) // block * block_bytes
        size += writer.ggml_pad(nbytes, 32)
        plain = FLOATS.get(kind.name)
        stored = shape if plain else gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, stored, np.dtype(plain or np.uint8), nbytes, raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(writer.fout[0], writer.fout[0].tell())
    size += writer.fout[0].tell()
    writer.close()
    with open(path, "r+b") as file:
        file.truncate(size)
    return path


def decode(data: np.ndarray, kind: str) -> np.ndarray:
    """Decode stored data to float32 with gguf-py."""
    if kind in FLOATS:
        return data.astype(np.float32)
    return gguf.dequantize(data, getattr(gguf.GGMLQuantizationType, kind))


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """Store float32 values in a type gguf-py can write."""
    if kind in FLOATS:
        return values.astype(FLOATS[kind])
    return gguf.quantize(values, getattr(gguf.GGMLQuantizationType, kind))


def random_tensor(rng: np.random.Generator, shape: tuple[int, ...], kind: str, std: float, mean: float = 0.0) -> np.ndarray:
    """Draw a tensor as it would be stored: values of about `std`, every row different."""
    if kind not in HALF_OFFSETS:
        return encode((mean + std * rng.standard_normal(shape)).astype(np.float32), kind)
    blocks, deviation = _golden_blocks(kind)
    chosen = rng.integers(len(blocks), size=int(np.prod(shape)) // 256)
    packed = blocks[chosen]
    factor = (std * rng.uniform(0.5, 1.5, len(chosen)) / deviation[chosen]).astype(np.float16)
    for offset in HALF_OFFSETS[kind]:
        half = packed[:, offset : offset + 2].copy().view(np.float16)[:, 0]
        packed[:, offset : offset + 2] = (half * factor)[:, None].view(np.uint8)
    return packed.reshape(*shape[:-1], -1)


@cache
def _golden_blocks(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the golden blocks that are neither tiny nor huge, and their standard deviations.

    The blocks are uint8 [blocks, type_size].
    """
    golden = np.load(GOLDEN / f"{kind}.npz")
    deviation = golden["y"].reshape(-1, 256).std(axis=1)
    usable = (deviation > 0.01) & (deviation < 100)
    return golden["q"].reshape(-1, BLOCK_BYTES[kind])[usable], deviation[usable]


def flux_file(architecture: Architecture, types, seed: int = 0, shapes=None) -> FluxFile:
    """Draw a file; `types` is a function of (name, shape) giving the ggml type, or a mapping."""
    rng = np.random.default_rng(seed)
    file = FluxFile()
    for name, shape in (shapes or architecture.bfl_shapes()).items():
        kind = types(name, shape) if callable(types) else types[name]
        norm = name.endswith(".scale") or (".norm_" in name and len(shape) == 1)
        std = 0.1 if len(shape) == 1 else shape[-1] ** -0.5
        file.tensors[name] = (random_tensor(rng, shape, kind, std, 1.0 if norm else 0.0), kind, shape)
    return file


def layout_types(layout: str, block: str, vector: str = "Q8_0"):
    """Return the types of a layout in the wild; `vector` is the biases' type in the "mixed" one."""

    def of(name: str, shape: tuple[int, ...]) -> str:
        inside = name.startswith(("double_blocks", "single_blocks", "transformer_blocks", "single_transformer_blocks"))
        if len(shape) == 2 and inside:
            return block
        if layout == "legacy":
            return "F16"
        if layout == "mixed":
            return vector if inside and name.endswith(".bias") else "F32"
        if len(shape) == 1:
            return "F32"
        if layout == "new":
            return "BF16"
        outer = ("img_in.weight", "final_layer.linear.weight", "x_embedder.weight", "proj_out.weight")
        small = name in outer or "in_layer" in name or name.endswith("embedder.linear_1.weight")
        return "F32" if small else "F16"

    return of
