"""Pictures side by side: each column is drawn with its plan's weights, and the model stays as it was."""

from __future__ import annotations

from PIL import Image

import flux_kernels as fk
from flux_kernels.measure import side_by_side as module
from flux_kernels.measure.side_by_side import side_by_side
from flux_kernels.mixed.option import Option
from flux_kernels.report.contact_sheet import LABEL_WIDTH, MARGIN, TILE

from ..mixed.captured import SETTINGS, embedded_pipeline

QKV = "double_blocks.0.img_attn.qkv.weight"


def test_columns_show_their_plans(monkeypatch):
    pipeline, drawn = embedded_pipeline(), []
    before = {name: parameter.clone() for name, parameter in pipeline.transformer.named_parameters()}
    sheet = module.contact_sheet
    monkeypatch.setattr(module, "contact_sheet", lambda *given: drawn.append(given) or sheet(*given))
    plans = {"nothing": {QKV: Option("F16")}, "coarse": {QKV: Option("Q2_K"), "img_in.weight": Option("BF16")}}
    settings = {**SETTINGS, "height": 64, "width": 64, "num_inference_steps": 2}
    image = side_by_side(pipeline, plans, ["a red seven", "a blue two"], settings=settings, seed=5, title="Two")
    ((title, columns, rows, pictures),) = drawn
    assert (title, rows) == ("Two", ["a red seven", "a blue two"]) and isinstance(image, Image.Image)
    assert image.width == LABEL_WIDTH + 3 * (TILE + MARGIN) + MARGIN
    assert [column[0] for column in columns] == ["16 bit", "nothing", "coarse"]
    assert columns[1][1:] == ["16.000 bits/weight", "identical"]
    weights = sum(one.numel() for name, one in before.items() if "transformer_blocks" in name and one.dim() == 2)
    bits = 16 - (16 - fk.FORMATS["Q2_K"].bits_per_weight) * 768 * 256 / weights
    assert columns[2][1] == f"{bits:.3f} bits/weight" and columns[2][2].startswith("PSNR")
    assert pictures[0][0].tobytes() == pictures[1][0].tobytes() != pictures[2][0].tobytes()
    assert pictures[0][0].tobytes() != pictures[0][1].tobytes()
    assert all((parameter == before[name]).all() for name, parameter in pipeline.transformer.named_parameters())
