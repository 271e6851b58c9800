"""Pictures of several plans side by side: the same prompts and noise, a column a plan, the unquantized model first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from ..formats import PLAIN_TYPES
from ..generation.base_pipeline import go_offline_quietly, load_pipeline, one_thread
from ..generation.demo import PROMPTS, SEED, psnr, psnr_text
from ..generation.embedded import PIPELINE_KWARGS, embedded_model_path
from ..report.contact_sheet import contact_sheet
from .file_tensors import file_tensors, quantized, replaced
from .measured_model import find_source, open_transformer
from .measurer import Importance

if TYPE_CHECKING:
    from PIL.Image import Image

_TITLE = "The same prompts and noise, 16 bit and quantized"
Types = Mapping[str, str]


def embedded_side_by_side(
    plans: Mapping[str, Types], *, importance: Importance | None = None, prompts: Sequence[str] = PROMPTS[:4]
) -> Image:
    """Draw the embedded model's pictures side by side: 16 bit, then a column a plan.

    Args:
        plans: name -> {tensor of the file: ggml type}, such as those of a uniform file, the greedy and a plan.
        importance: of the quantizers' weighting, file tensor -> (sum of squares [K], count); None for none.
        prompts: a row each.

    Returns:
        An RGB picture.
    """
    go_offline_quietly()
    model, _ = open_transformer(find_source(), torch.device("cpu"), torch.float32)
    pipeline = load_pipeline(embedded_model_path(), model, torch.float32)
    with one_thread():
        return side_by_side(pipeline, plans, prompts, settings=PIPELINE_KWARGS, seed=SEED, importance=importance)


def side_by_side(
    pipeline: Any,
    plans: Mapping[str, Types],
    prompts: Sequence[str],
    *,
    settings: Mapping[str, Any],
    seed: int = 0,
    importance: Importance | None = None,
    title: str = _TITLE,
) -> Image:
    """Draw pictures of several plans of one model side by side.

    Args:
        pipeline: a FluxPipeline around the unquantized transformer, which is as it was afterwards.
        plans: name -> {tensor of the file: ggml type}; tensors that are not named stay unquantized, as do plain types.
        prompts: a row each.
        settings: arguments of the pipeline call.
        seed: of the first row's noise; each further row has the next one.
        importance: of the quantizers' weighting, file tensor -> (sum of squares [K], count); None for none.
        title: one line above everything.

    Returns:
        An RGB picture: bits per weight of the block matrices and PSNR against the first column under every heading.
    """
    model = pipeline.transformer
    tensors = file_tensors(model)
    reference = _draw(pipeline, prompts, seed, settings)
    columns, pictures = [["16 bit", "what the others", "are compared with"]], [reference]
    for name, types in plans.items():
        packed = {tensor: kind for tensor, kind in types.items() if tensor in tensors and kind not in PLAIN_TYPES}
        with ExitStack() as weights:
            for tensor, kind in packed.items():
                known = None if importance is None else importance.get(tensor)
                channels = None if known is None else known[0] / max(known[1], 1)
                found = quantized(model, tensors[tensor], kind, channels)
                weights.enter_context(replaced(model, {parameter: weight for parameter, (weight, _) in found.items()}))
            drawn = _draw(pipeline, prompts, seed, settings)
        size = sum(one.packed_bytes(packed.get(tensor, "F16")) for tensor, one in tensors.items())
        bits = 8 * size / sum(one.shape[0] * one.shape[1] for one in tensors.values())
        columns.append([name, f"{bits:.3f} bits/weight", psnr_text(psnr(drawn, reference))])
        pictures.append(drawn)
    return contact_sheet(title, columns, list(prompts), pictures)


def _draw(pipeline: Any, prompts: Sequence[str], seed: int, settings: Mapping[str, Any]) -> list[Any]:
    """Draw one picture a prompt, one after the other: a large model has room for one."""
    found = []
    with torch.inference_mode():
        for row, prompt in enumerate(prompts):
            generator = torch.Generator("cpu").manual_seed(seed + row)
            found += pipeline(prompt, generator=generator, **settings).images
    return found
