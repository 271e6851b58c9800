"""Requests that cannot be drawn: LoRAs of other models, values out of range, absurd sizes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from flux_kernels import FormatError
from flux_kernels.generation.generate import generate
from flux_kernels.generation.memory_plan import GIB, Part, plan_memory
from flux_kernels.generation.picture_size import check_gpu_memory
from flux_kernels.generation.request import Lora

from .tiny_drawing import request

KIND = "ZImagePipeline"
# Names of a LoRA's tensors -> what is said of it.
LORAS = {
    "another prefix": (("unet.down.0.lora_A.weight", "unet.down.0.lora_B.weight"), "nothing in it fits"),
    "a text encoder alone": (
        ("text_encoder.model.layers.0.lora_A.weight", "text_encoder.model.layers.0.lora_B.weight"),
        "nothing in it fits",
    ),
    "other layers": (
        ("transformer.no_such.0.lora_A.weight", "transformer.no_such.0.lora_B.weight"),
        "does not load as a LoRA of this Z-Image model",
    ),
    "A without B": (("transformer.layers.0.attention.to_q.lora_A.weight",), "does not load as a LoRA of this Z-Image model"),
}


@pytest.mark.parametrize("names", LORAS)
def test_a_lora_of_another_model_is_refused(made, tmp_path, names, caplog, capfd):
    tensors, sentence = LORAS[names]
    save_file({name: torch.ones(4, 4) for name in tensors}, tmp_path / "l.safetensors")
    with pytest.raises(FormatError, match=rf"l\.safetensors .*{sentence}"):
        generate(request(made(KIND), loras=[Lora(tmp_path / "l.safetensors")]))
    said = caplog.text + capfd.readouterr().err
    assert "unsuccessful" not in said and "No LoRA keys" not in said


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"steps": 0}, "--steps is 0; give a whole number of at least 1"),
        ({"steps": -3}, "--steps is -3"),
        ({"steps": 2.5}, r"--steps is 2\.5"),
        ({"seed": -1}, "--seed is -1; give a whole number of at least 0"),
        ({"seed": 2**64}, "--seed is 18446744073709551616; give a whole number of at most 18446744073709551615"),
        ({"seed": None}, "--seed is None"),
        ({"width": 64.0}, r"--width is 64\.0"),
        ({"height": 8}, "--height is 8; give a whole number of at least 16"),
        ({"prompt": None}, "--prompt is None; give a text"),
        ({"prompt": ["a fox"]}, r"--prompt is \['a fox'\]"),
        ({"negative": 3}, "--negative is 3"),
        ({"guidance": -1.0}, "--guidance is -1; give 0 or more"),
        ({"guidance": "four"}, "--guidance is 'four'; give a finite number"),
    ],
)
def test_values_out_of_range_are_named(made, changes, sentence):
    with pytest.raises(FormatError, match=sentence):
        generate(request(made(KIND), **changes))


def test_names_of_files_may_be_text(made):
    files = made(KIND)
    as_text = request(files, gguf=str(files.gguf), base=str(files.base))
    assert (as_text.gguf, as_text.base) == (files.gguf, files.base)
    assert as_text == request(files)


def test_a_picture_that_no_offload_brings_onto_the_gpu_is_refused():
    def parts(transformer: int) -> list[Part]:
        return [Part("transformer", GIB, GIB // 8, transformer), Part("vae", GIB, GIB // 8, 1000 * GIB)]

    # The VAE decodes in tiles.
    check_gpu_memory(parts(8 * GIB), 8 * GIB, 100_000, 100_000)
    assert not plan_memory(parts(8 * GIB + 1), 8 * GIB, 100_000, 100_000).fits
    with pytest.raises(FormatError, match=r"100000 x 100000 is too large: the transformer would need about 9\.0 GiB"):
        check_gpu_memory(parts(9 * GIB), 8 * GIB, 100_000, 100_000)
