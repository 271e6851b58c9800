"""Importance matrices, in llama.cpp's two formats: how large the inputs of each matrix of a file were.

The legacy format (".dat") is a list of (name, calls, K float32) in little-endian binary; the newer one is a GGUF file with
two tensors a matrix, `<name>.in_sum2` and `<name>.counts`. Both hold sums of squared inputs, whose mean is the importance.

Source: llama.cpp tools/imatrix/imatrix.cpp and tools/quantize/quantize.cpp.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FormatError, GGUFError
from ..files import write_whole
from ..gguf.file import read_gguf, write_gguf
from ..gguf.spec import MAGIC, shown
from ..models.names import strip_prefix

LEGACY_SUFFIX = ".dat"
_SUMS, _COUNTS = ".in_sum2", ".counts"
# The legacy format counts in int32.
_MOST_CALLS = 2**31 - 1
# Above any model: they bound what a damaged file can ask for.
_MOST_ENTRIES, _MOST_NAME, _MOST_VALUES = 2**20, 2**16, 2**24

Sums = Mapping[str, tuple[Tensor, float]]


def imatrix_path(costs: Path) -> Path:
    """Return where `measure` keeps the importance it collected for a table of costs."""
    return costs.with_suffix(".imatrix.gguf")


def save_imatrix(path: str | os.PathLike[str], sums: Sums, *, datasets: Iterable[str] = ()) -> None:
    """Write an importance matrix in one of llama.cpp's formats.

    That is the legacy format where `path` ends in ".dat", else its GGUF format. The file appears under its name only when it is
    complete.

    Args:
        path: the file to write; one that is there is replaced.
        sums: tensor name in the file, such as "double_blocks.0.img_attn.qkv.weight" -> (sum of squared inputs, float [K];
            number of input rows that were summed up, from 1).
        datasets: what the inputs came from, such as the prompts' file; kept for the record.

    Raises:
        FormatError: where sums are not [K], finite and non-negative, or a count is not positive.
        OSError: where the file cannot be written.
    """
    entries = {name: _checked(name, total, count) for name, (total, count) in sums.items()}
    if not entries:
        raise FormatError("An importance matrix holds at least one tensor, got none.")
    datasets = list(datasets)
    if os.fsdecode(path).endswith(LEGACY_SUFFIX):
        _save_legacy(path, entries, datasets)
    else:
        _save_gguf(path, entries, datasets)


def load_imatrix(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read an importance matrix in either of llama.cpp's formats.

    Returns:
        Tensor name (without prefix such as "model.diffusion_model.") -> mean squared input, float32 [K]. A tensor that was
        never called has ones.

    Raises:
        FormatError: where the file is neither, cut short, or its values are not finite and non-negative.
        OSError: where it cannot be read.
    """
    with open(path, "rb") as file:
        is_gguf = file.read(len(MAGIC)) == MAGIC
    where = os.fsdecode(path)
    sums = _load_gguf(where) if is_gguf else _load_legacy(where)
    means: dict[str, Tensor] = {}
    for name, (total, count) in sums.items():
        if not torch.isfinite(total).all() or (total < 0).any():
            raise FormatError(f"{where}: {shown(name)} holds values that are negative, NaN or infinite. Collect it again.")
        bare = strip_prefix(name)
        if bare in means:
            raise FormatError(f"{where}: {shown(bare)} is there twice. A file must hold each tensor once.")
        means[bare] = total / count if count > 0 else torch.ones_like(total)
    return means


def _checked(name: str, total: Tensor, count: float) -> tuple[Tensor, int]:
    total = torch.as_tensor(total).detach().to("cpu", torch.float32)
    if total.dim() != 1 or not total.numel():
        raise FormatError(f"The sums of {name} must have shape [K], got {list(total.shape)}.")
    if not torch.isfinite(total).all() or (total < 0).any():
        raise FormatError(f"The sums of {name} must be finite and non-negative: they are sums of squares.")
    if int(count) != count or count < 1:
        raise FormatError(f"The count of {name} must be a whole number from 1, got {count!r}.")
    return total.contiguous(), int(count)


def _save_legacy(path: str | os.PathLike[str], entries: Sums, datasets: list[str]) -> None:
    data = bytearray(struct.pack("<i", len(entries)))
    for name, (total, count) in entries.items():
        calls = min(count, _MOST_CALLS)
        encoded = name.encode()
        data += struct.pack("<i", len(encoded)) + encoded + struct.pack("<ii", calls, total.numel())
        data += (total * (calls / count)).numpy().astype("<f4").tobytes()
    encoded = ", ".join(datasets).encode()
    most = max(min(count, _MOST_CALLS) for _, count in entries.values())
    data += struct.pack("<ii", most, len(encoded)) + encoded
    write_whole(path, bytes(data))


def _save_gguf(path: str | os.PathLike[str], entries: Sums, datasets: list[str]) -> None:
    tensors: list[tuple[str, str, tuple[int, ...], Tensor]] = []
    for name, (total, count) in entries.items():
        tensors.append((name + _SUMS, "F32", (1, total.numel()), total[None]))
        tensors.append((name + _COUNTS, "F32", (1, 1), torch.tensor([[float(count)]])))
    metadata: dict[str, tuple[str, Any]] = {
        "general.type": ("STRING", "imatrix"),
        "imatrix.datasets": ("ARRAY[STRING]", datasets),
        "imatrix.chunk_count": ("UINT32", min(max(count for _, count in entries.values()), _MOST_CALLS)),
        # One input row a chunk: counts are rows.
        "imatrix.chunk_size": ("UINT32", 1),
    }
    write_gguf(path, tensors, metadata)


def _load_gguf(where: str) -> dict[str, tuple[Tensor, float]]:
    file = read_gguf(where)
    sums = {}
    for name in (name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)):
        total = _float32(where, file.tensors[name + _SUMS])
        if name + _COUNTS not in file.tensors:
            raise FormatError(f"{where}: {shown(name + _SUMS)} has no {shown(name + _COUNTS)} beside it. Collect it again.")
        counts = _float32(where, file.tensors[name + _COUNTS])
        if counts.numel() != 1:
            raise FormatError(f"{where}: {shown(name)} holds {counts.numel()} matrices (experts); one is legal here.")
        sums[name] = total.flatten().clone(), float(counts)
    if not sums:
        raise FormatError(
            f"{where} is a GGUF file, but no importance matrix: no tensor ends in {_SUMS!r}. Is it a model? `flux-kernels "
            "measure` and llama.cpp's llama-imatrix write importance matrices."
        )
    return sums


def _float32(where: str, tensor: Any) -> Tensor:
    if tensor.format != "F32":
        raise GGUFError(f"{where}: {shown(tensor.name)} is {tensor.format}; importance matrices are F32.")
    return tensor.data


def _load_legacy(where: str) -> dict[str, tuple[Tensor, float]]:
    with open(where, "rb") as file:
        data = file.read()
    entries = int.from_bytes(data[:4], "little", signed=True)
    if len(data) >= 4 and not 1 <= entries <= _MOST_ENTRIES:
        raise FormatError(
            f"{where} is no importance matrix: it begins with {data[:4]!r}. Legal are llama.cpp's .dat and GGUF formats; `flux-kernels "
            "measure` writes one as costs.imatrix.gguf."
        )
    cursor = _Cursor(where, data)
    sums: dict[str, tuple[Tensor, float]] = {}
    for _ in range(cursor.integer("number of tensors", _MOST_ENTRIES)):
        name = cursor.take(cursor.integer("length of a name", _MOST_NAME)).decode("utf-8", "replace")
        calls = cursor.integer(f"calls of {shown(name)}", _MOST_CALLS, least=0)
        count = cursor.integer(f"length of {shown(name)}", _MOST_VALUES)
        total = torch.frombuffer(bytearray(cursor.take(4 * count)), dtype=torch.float32)
        if name in sums:
            raise FormatError(f"{where}: {shown(name)} is there twice. A file must hold each tensor once.")
        sums[name] = total, float(calls)
    # What follows, the number of chunks and the data set, is for the record.
    return sums


class _Cursor:
    """Read little-endian values from the bytes of a legacy file."""

    def __init__(self, where: str, data: bytes) -> None:
        self.where, self.data, self.position = where, data, 0

    def take(self, count: int) -> bytes:
        if self.position + count > len(self.data):
            raise FormatError(
                f"{self.where}: no importance matrix, or one that is cut short: {count} bytes wanted at byte {self.position}, "
                f"the file has {len(self.data)}. Legal are llama.cpp's .dat and GGUF formats."
            )
        taken = self.data[self.position : self.position + count]
        self.position += count
        return taken

    def integer(self, what: str, most: int, least: int = 1) -> int:
        (value,) = struct.unpack("<i", self.take(4))
        if not least <= value <= most:
            raise FormatError(
                f"{self.where}: no importance matrix: the {what} would be {value}, legal are {least} to {most}. "
                "Legal are llama.cpp's .dat and GGUF formats."
            )
        return value
