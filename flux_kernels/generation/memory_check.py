"""Refuse work that cannot fit in memory before it begins: a process that is killed says nothing.

Weights that are used on the CPU in the dtype of their file stay mapped from it and take no memory that the system could not
give back (counted: 0 bytes of anonymous memory with safetensors, diffusers and transformers; all of them where the dtype
differs).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from ..compute import dtype_name
from ..errors import FormatError
from ..gguf.file import read_gguf
from ..machine.free_memory import free_bytes, total_bytes
from ..source.safetensors_header import read_safetensors
from ..source.stored_tensor import FLOATS
from .base_pipeline import listed_parts
from .memory_plan import GIB

# Further copies of the weights, which diffusers reads only when asked to.
_VARIANTS = (".fp16.", ".bf16.", ".non_ema.")


@dataclass(frozen=True)
class Weights:
    """Count the weights of files as they are once loaded, in bytes.

    Attributes:
        held: in memory.
        mapped: those that stay in their file.
    """

    held: int = 0
    mapped: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.held + self.mapped

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.held + other.held, self.mapped + other.mapped)


def loaded_weights(files: Iterable[Path], dtype: torch.dtype, device: torch.device) -> Weights:
    """Count what the floating tensors of files take in `dtype` on `device`; only headers are read.

    Raises:
        GGUFError: where a header is damaged.
        OSError: where a file cannot be read.
    """
    held = mapped = 0
    for file in files:
        for kind, shape in _tensors(file):
            if kind not in FLOATS:
                continue
            if FLOATS[kind] == dtype and device.type == "cpu":
                mapped += prod(shape) * dtype.itemsize
            else:
                held += prod(shape) * dtype.itemsize
    return Weights(held, mapped)


def companion_files(base: Path, left_out: Iterable[str] = ()) -> list[Path]:
    """List the files of text encoders and VAE in a diffusers folder, without those of `left_out`."""
    parts = [part for part in listed_parts(base) if part not in left_out]
    files = [file for part in parts for file in sorted((base / part).glob("*.safetensors"))]
    return [file for file in files if not any(variant in file.name for variant in _VARIANTS)]


def require_memory(what: str, needs: Mapping[str, int], device: torch.device, ways_out: str, *, processes: int = 1) -> None:
    """Raise FormatError where memory is needed that is not free, with the numbers and the ways out.

    Args:
        what: is to be done, the subject of the sentence.
        needs: what for -> bytes held at the same time on `device`.
        device: a GPU, or the CPU for the computer's memory.
        ways_out: what the user can do instead, a sentence.
        processes: of the same needs on this computer; together they must fit what it has in all, as some may have begun.
    """
    need, free, total = sum(needs.values()), free_bytes(device), total_bytes()
    where = "memory" if device.type == "cpu" else f"memory on {device}"
    if free is None or need <= free:
        if device.type != "cpu" or total is None or need * processes <= total:
            return
        shortage = f"{processes} processes on this computer need {need * processes / GIB:.1f} GiB of its {total / GIB:.1f}"
    else:
        shortage = f"{free / GIB:.1f} GiB are free"
    listed = ", ".join(f"{nbytes / GIB:.1f} for {name}" for name, nbytes in needs.items() if nbytes)
    raise FormatError(f"{what} needs about {need / GIB:.1f} GiB of {where} ({listed}), and {shortage}. {ways_out}")


def check_pipeline_memory(
    gguf: Path, base: Path, t5: Path | None, dtype: torch.dtype, pin: bool, *, t5_part: str | None
) -> None:
    """Raise FormatError where a pipeline's weights do not fit in this computer's memory.

    Packed weights stay mapped from their file, and so do text encoders and VAE in the dtype of theirs; other dtypes are copies.

    Args:
        gguf: the transformer's file.
        base: diffusers folder with the rest of the pipeline.
        t5: GGUF file instead of the folder's `t5_part`.
        dtype: of text encoders and VAE.
        pin: whether all weights are copied to pinned memory.
        t5_part: the part that is a T5 encoder, None where the pipeline has none.
    """
    cpu = torch.device("cpu")
    companions = loaded_weights(companion_files(base, left_out=() if t5 is None else (t5_part or "",)), dtype, cpu)
    needs = {f"text encoders and VAE in {dtype_name(dtype)}": companions.held}
    ways_out = ["--t5 FILE.gguf, which stays mapped"] if t5 is None and t5_part is not None else []
    if dtype != torch.bfloat16:
        ways_out.append("--dtype bfloat16, which published files are in")
    if pin:
        needs["what is pinned"] = companions.mapped + sum(file.stat().st_size for file in (gguf, t5) if file is not None)
        ways_out.insert(0, "no --pin")
    ways_out.append("a computer with more memory")
    require_memory(f"Drawing with {gguf.name}", needs, cpu, f"Take {', or '.join(ways_out)}.")


def _tensors(file: Path) -> list[tuple[str, tuple[int, ...]]]:
    if file.suffix == ".gguf":
        return [(tensor.format, tensor.shape) for tensor in read_gguf(file).tensors.values()]
    return [(tensor.type, tensor.shape) for tensor in read_safetensors(str(file)).values()]
