"""The main job end to end on the embedded model: quantize, write, load, swap, draw, compare."""

from __future__ import annotations

import gguf
import pytest
import torch
from PIL import Image

from flux_kernels import FORMATS
from flux_kernels.generation.base_pipeline import load_pipeline
from flux_kernels.generation.demo import VARIANTS, demo_sheet, demo_steps, psnr, run_demo
from flux_kernels.generation.embedded import PIPELINE_KWARGS, embedded_model_path, embedded_transformer
from flux_kernels.report.contact_sheet import LABEL_WIDTH, TILE, contact_sheet

PROMPTS = ["a red seven", "a blue three"]
STEPS = 4
SEED = 3
# Two float32 evaluations of the same weights may differ in the order of their sums, which shows as single pixels off by one
# of 255: were every pixel off by one, the PSNR would be 48 dB.
SAME_DB = 48


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    if torch.cuda.is_available():
        pytest.skip("the bounds are those of float32 on the CPU; on a GPU the demo computes in bfloat16")
    statuses: list[str] = []
    drawn = run_demo(tmp_path_factory.mktemp("demo"), prompts=PROMPTS, seed=SEED, steps=STEPS, step=statuses.append)
    return {variant.name: variant for variant in drawn}, statuses


def draw(transformer):
    pipeline = load_pipeline(embedded_model_path(), transformer, torch.float32)
    generators = [torch.Generator().manual_seed(SEED + row) for row in range(len(PROMPTS))]
    settings = {**PIPELINE_KWARGS, "num_inference_steps": STEPS}
    return pipeline(list(PROMPTS), generator=generators, **settings).images


def test_16_bit_draws_what_the_stock_pipeline_draws(demo):
    stock = draw(embedded_transformer().float())
    assert psnr(demo[0]["16 bit"].images, stock) >= SAME_DB


def test_mixed_draws_what_a_stock_model_with_the_weights_gguf_py_decodes_draws(demo):
    stored = gguf.GGUFReader(demo[0]["mixed"].file)
    values = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).reshape(
            tuple(tensor.shape[::-1])
        )
        for tensor in stored.tensors
    }
    assert {tensor.tensor_type.name for tensor in stored.tensors} > {"Q8_0", "Q4_K"}
    stock = embedded_transformer().float()
    stock.load_state_dict({name: value.float() for name, value in values.items()})
    assert psnr(demo[0]["mixed"].images, draw(stock)) >= SAME_DB


@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "Q4_K"])
def test_sizes_follow_from_the_type(demo, name):
    one, reference = demo[0][name], demo[0]["16 bit"]
    weights = sum(p.numel() for n, p in embedded_transformer().named_parameters() if "blocks." in n and p.dim() == 2)
    assert one.bits_per_weight == FORMATS[name].bits_per_weight
    assert one.nbytes == one.file.stat().st_size
    saved = weights * (16 - FORMATS[name].bits_per_weight) / 8
    # Headers may differ by some alignment.
    assert reference.nbytes - one.nbytes == pytest.approx(saved, abs=4096)


def test_fewer_bits_are_further_off(demo):
    drawn = demo[0]
    errors = [drawn[name].weight_error for name in ("16 bit", "Q8_0", "Q6_K", "Q4_K")]
    assert errors[0] == 0 and errors == sorted(errors)
    for name in ("Q8_0", "Q6_K", "Q4_K"):
        # A bound for gaussian weights; these have tails.
        assert drawn[name].weight_error <= 1.25 * FORMATS[name].relative_rms
    quality = [drawn[name].psnr for name in ("16 bit", "Q8_0", "Q6_K", "Q4_K")]
    assert quality[0] == float("inf") and quality == sorted(quality, reverse=True)
    assert drawn["Q4_K"].bits_per_weight < drawn["mixed"].bits_per_weight < drawn["Q8_0"].bits_per_weight
    assert drawn["mixed"].psnr > drawn["Q4_K"].psnr


def test_every_step_is_reported(demo):
    assert len(demo[1]) == STEPS * len(VARIANTS)
    assert [sum(variant.name in line for line in demo[1]) for variant in VARIANTS] == [STEPS] * len(VARIANTS)
    assert demo_steps() == PIPELINE_KWARGS["num_inference_steps"]


def test_threads_are_given_back(demo, tmp_path):
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="stop here"):
        run_demo(tmp_path, prompts=PROMPTS[:1], steps=1, step=lambda status: (_ for _ in ()).throw(RuntimeError("stop here")))
    assert torch.get_num_threads() == before


def test_sheet_holds_every_picture(demo):
    drawn = list(demo[0].values())
    sheet = demo_sheet(drawn, PROMPTS)
    size = TILE // 64 * 64
    assert sheet.width > LABEL_WIDTH + len(drawn) * size and sheet.height > len(PROMPTS) * size
    tile = drawn[0].images[0].resize((size, size), Image.Resampling.NEAREST)
    places = [y for y in range(sheet.height - size) if sheet.crop((LABEL_WIDTH, y, LABEL_WIDTH + size, y + size)) == tile]
    assert len(places) == 1


@pytest.mark.parametrize(("size", "tile"), [((64, 64), (192, 192)), ((100, 50), (100, 50)), ((768, 384), (192, 96))])
def test_sheet_enlarges_by_whole_factors_and_shrinks_what_is_large(size, tile):
    red = Image.new("RGB", size, (255, 0, 0))
    sheet = contact_sheet("title", [["one", "small print"]], ["a label that is long enough to be wrapped"], [[red]])
    pixels = sum(1 for pixel in sheet.get_flattened_data() if pixel == (255, 0, 0))
    assert pixels == tile[0] * tile[1]


def test_psnr_of_a_known_difference():
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 51, 51))
    # 20 log10(255 / 51).
    assert psnr([black], [grey]) == pytest.approx(13.979, abs=1e-3)
    assert psnr([grey], [grey]) == float("inf")
