"""The key-values of a converted file: the usual ones, and what it comes from, how and by which tool."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence

from ..files import file_sha256
from ..gguf.conventions import KeyValues, architecture_of, general_keys, original_shape_keys
from ..models.config import CONFIG_KEY
from ..source.source import SourceModel
from ..version import own_version
from .choose_types import Choice, Request

_OTHER = "unknown"
# A sampled hash reads these many pieces of these many bytes, evenly spaced.
_SAMPLES, _SAMPLE_BYTES = 64, 2**16


def usual_keys(source: SourceModel, choice: Choice, architecture: str | None) -> KeyValues:
    """Return the key-values that published files have, and the config where readers cannot infer it."""
    known = source.architecture.gguf_name if source.architecture else _OTHER
    stated = None if source.config else architecture_of(source.files.metadata)
    keys = general_keys(architecture or stated or known, choice.file_type)
    if source.needs_config:
        keys[CONFIG_KEY] = ("STRING", json.dumps(source.config))
    return keys | original_shape_keys({name: tensor.shape for name, tensor in source.tensors.items()})


def provenance_keys(
    source: SourceModel,
    request: Request,
    hashes: Sequence[str],
    *,
    engine: str,
    plan: str | None = None,
    imatrix: str | None = None,
    imatrix_entries: int = 0,
) -> KeyValues:
    """Return where a file comes from; the same inputs give the same keys, so no date is among them.

    Args:
        source: the model.
        request: what was asked for.
        hashes: of its files, as `file_hash` gives them.
        engine: of the quantizers.
        plan: path of the plan, or None.
        imatrix: path of the importance matrix, or None.
        imatrix_entries: number of tensors it weighted.
    """
    keys: KeyValues = {
        "flux_kernels.version": ("STRING", own_version()),
        "flux_kernels.rule": ("STRING", request.layout),
        "flux_kernels.engine": ("STRING", engine),
        "flux_kernels.source.files": ("ARRAY[STRING]", [os.path.basename(path) for path in source.files.paths]),
        "flux_kernels.source.hashes": ("ARRAY[STRING]", list(hashes)),
    }
    if request.type:
        keys["flux_kernels.type"] = ("STRING", request.type)
    if request.overrides:
        keys["flux_kernels.tensor_types"] = ("ARRAY[STRING]", [f"{pattern}={kind}" for pattern, kind in request.overrides])
    if request.plan:
        keys["flux_kernels.plan.sha256"] = ("STRING", _plan_hash(plan, request))
        keys["flux_kernels.plan.costs_sha256"] = ("STRING", request.plan.costs_sha256)
    if imatrix:
        # llama.cpp's keys, these two.
        keys["quantize.imatrix.file"] = ("STRING", os.path.basename(imatrix))
        keys["quantize.imatrix.entries_count"] = ("UINT32", imatrix_entries)
        keys["flux_kernels.imatrix.sha256"] = ("STRING", file_sha256(imatrix))
    return keys


def file_hash(path: str, whole: bool) -> str:
    """Hash a file, as "sha256:<hex>" or "sampled-sha256:<hex>".

    The one is of all its bytes, the other of its size and 64 pieces of 64 KiB. The first piece starts at byte 0, where the
    header is, the last ends at the end, the others are evenly spaced. Small files are hashed whole.
    """
    size = os.path.getsize(path)
    if whole or size <= _SAMPLES * _SAMPLE_BYTES:
        return f"sha256:{file_sha256(path)}"
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with open(path, "rb") as file:
        for sample in range(_SAMPLES):
            file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return f"sampled-sha256:{digest.hexdigest()}"


def _plan_hash(path: str | None, request: Request) -> str:
    if path:
        return file_sha256(path)
    return hashlib.sha256(request.plan.to_json().encode()).hexdigest() if request.plan else ""
