"""Pictures of several plans side by side: the same prompts and noise, the unquantized model first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import prod
from typing import Any

import torch
from PIL.Image import Image

from ..generation.demo import psnr, psnr_text
from ..mixed.file_layout import Options
from ..mixed.option import Option
from ..report.contact_sheet import contact_sheet
from .file_tensors import file_tensors, quantized, replaced
from .measurer import Importance

_TITLE = "The same prompts and noise, 16 bit and quantized"


def side_by_side(
    pipeline: Any,
    plans: Mapping[str, Options],
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
        plans: name -> {tensor of the file: option}; tensors that are not named stay unquantized, as do plain types.
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
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    for name, options in plans.items():
        packed = {tensor: option for tensor, option in options.items() if tensor in tensors and not option.is_plain}
        with ExitStack() as stack:
            for tensor, option in packed.items():
                sums, count = (importance or {}).get(tensor, (None, 1))
                weights = quantized(model, tensors[tensor], option, None if sums is None else sums / max(count, 1))
                stack.enter_context(replaced(model, {parameter: weight for parameter, (weight, _) in weights.items()}))
            drawn = _draw(pipeline, prompts, seed, settings)
        size = sum(packed.get(tensor, Option("F16")).nbytes(shape) for tensor, shape in shapes.items())
        bits = 8 * size / sum(map(prod, shapes.values()))
        columns.append([name, f"{bits:.3f} bits/weight", psnr_text(psnr(drawn, reference))])
        pictures.append(drawn)
    return contact_sheet(title, columns, list(prompts), pictures)


def _draw(pipeline: Any, prompts: Sequence[str], seed: int, settings: Mapping[str, Any]) -> list[Any]:
    """Draw one picture a prompt, one after the other: a large model has room for one."""
    images = []
    with torch.inference_mode():
        for row, prompt in enumerate(prompts):
            generator = torch.Generator("cpu").manual_seed(seed + row)
            images += pipeline(prompt, generator=generator, **settings).images
    return images
