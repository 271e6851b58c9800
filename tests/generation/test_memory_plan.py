"""The choice of offload on cards of 6 to 24 GB, and the activation model against counted allocations."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux_kernels.generation.memory_plan import (
    GIB,
    MODES,
    SLACK,
    Part,
    companions,
    free_on_card,
    gpu_bytes,
    plan_memory,
    text_working,
    transformer_working,
    vae_working,
)
from flux_kernels.models.calls import image_tokens

# Of FLUX.1, and the weights of its largest matrix.
WIDTH, WIDEST = 3072, 3072 * 18432
# published sizes of the GGUF files in bytes, and the bits of their largest matrix
FILES = {"Q2_K": (4_010_296_352, 2.625), "Q4_K_S": (6_805_988_640, 4.5), "Q8_0": (12_708_281_504, 8.5)}


def flux_parts(file: str, t5_bits: float, side: int = 1024) -> list[Part]:
    nbytes, bits = FILES[file]
    working = transformer_working(WIDTH, image_tokens(side, side) + 512, decoded=2 * WIDEST)
    return [Part("transformer", nbytes, int(WIDEST * bits / 8), working), *companions(side, side, t5_bits)]


# File, bits of the T5 -> the choice on 6, 8, 12, 16, 24 GB at 1024 x 1024.
CHOICES = {
    ("Q2_K", 16): ["group", "group", "model", "model", "none"],
    ("Q2_K", 8.5): ["model", "model", "model", "none", "none"],
    ("Q4_K_S", 16): ["group", "group", "model", "model", "none"],
    ("Q4_K_S", 8.5): ["group", "model", "model", "none", "none"],
    ("Q8_0", 16): ["group", "group", "group", "model", "model"],
    ("Q8_0", 8.5): ["group", "group", "group", "model", "none"],
}


@pytest.mark.parametrize(("file", "t5_bits"), CHOICES)
def test_true_sizes_on_true_cards(file, t5_bits):
    plans = [plan_memory(flux_parts(file, t5_bits), free_on_card(card), 1024, 1024) for card in (6, 8, 12, 16, 24)]
    assert [plan.offload for plan in plans] == CHOICES[file, t5_bits]
    assert all(plan.fits and not plan.tile_vae for plan in plans)


def test_companions_have_the_published_sizes():
    """The published T5 XXL encoder has 9.52 GB in 16 bit and 5.06 GB in Q8_0.

    CLIP-L has 246 MB, the VAE 168 MB.
    """
    clip, t5, vae = companions(1024, 1024)
    assert [round(part.weights / 1e6) for part in (clip, t5, vae)] == [246, 9525, 168]
    assert round(companions(1024, 1024, 8.5)[1].weights / 1e7) == 506


def test_the_first_that_fits_is_chosen_at_its_very_limit():
    parts = [Part("a", 100, 10, 5), Part("b", 60, 30, 20)]
    needs = {"none": 180, "model": 105, "group": 80, "sequential": 50}
    assert gpu_bytes(parts) == needs
    for mode in MODES:
        assert plan_memory(parts, needs[mode], 64, 64).offload == mode
        assert plan_memory(parts, needs[mode] - 1, 64, 64).offload != mode or mode == MODES[-1]
    assert not plan_memory(parts, needs["sequential"] - 1, 64, 64).fits


def test_a_model_of_one_layer_is_not_counted_twice():
    assert gpu_bytes([Part("a", 100, 100, 5)])["group"] == 105


def test_tiles_are_the_last_resort():
    """At 2048 x 2048 the VAE alone wants 8.8 GiB; in tiles it wants what 1024 x 1024 does."""
    parts = flux_parts("Q2_K", 8.5, 2048)
    assert plan_memory(parts, free_on_card(12), 2048, 2048).tile_vae is False
    small = plan_memory(parts, free_on_card(8), 2048, 2048)
    assert (small.tile_vae, small.offload, small.fits) == (True, "model", True)
    assert "the VAE decodes in tiles" in small.sentence
    # No tiles in a picture of one.
    assert not plan_memory(flux_parts("Q2_K", 8.5), 0, 1024, 1024).tile_vae


def test_the_sentence_tells_numbers_and_reason():
    predicted = plan_memory(flux_parts("Q4_K_S", 16), free_on_card(12), 1024, 1024).sentence
    assert predicted == (
        "10.9 GiB of GPU memory are free; everything at once needs 17.8, the largest model alone (text_encoder_2) needs 9.2 "
        "GiB: offload model."
    )
    short = plan_memory(flux_parts("Q4_K_S", 16), GIB, 1024, 1024).sentence
    assert "offload sequential. That is more than is free, so it may run out of memory" in short


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all storages made under it that are alive; `peak` is their most."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in given and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
                self.peak = max(self.peak, sum(self.alive.values()))
        return out


def peak_of(call) -> int:
    with torch.inference_mode(), LiveBytes() as live:
        call()
    return live.peak


@pytest.mark.parametrize("tokens", [64, 256])
def test_transformer_activations_as_counted(tiny_flux, tokens):
    """18.0 hidden widths a token are counted in 16 bit, at any number of tokens.

    The model has 20 and a tenth more.
    """
    from ..conftest import flux_inputs

    model = tiny_flux.to(torch.bfloat16)
    inputs = flux_inputs(tokens=tokens, text=tokens // 8, dtype=torch.bfloat16)
    predicted = transformer_working(256, tokens + tokens // 8)
    assert 0.75 * predicted <= peak_of(lambda: model(**inputs)) <= predicted


@pytest.mark.parametrize("batch", [1, 2])
def test_vae_activations_as_counted(batch):
    """3.0 times the channels at full resolution are counted.

    The model has 4, one of them for a convolution's workspace.
    """
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**kinds, block_out_channels=(32, 64, 128, 128), layers_per_block=2, latent_channels=16)
    vae = vae.eval().to(torch.bfloat16)
    latents = torch.zeros(batch, 16, 16, 16, dtype=torch.bfloat16)
    peak = peak_of(lambda: vae.decode(latents))
    assert peak == pytest.approx(vae_working(64, 128, 128, batch=batch) / SLACK * 3 / 4, rel=0.01)


def test_text_activations_as_counted():
    from ..t5_files import tiny_t5

    # T5 XXL's ratio of the two.
    model = tiny_t5(d_model=256, d_ff=640).to(torch.bfloat16)
    peak = peak_of(lambda: model(torch.zeros(1, 512, dtype=torch.long)))
    predicted = text_working(256, 4, 512)
    # Between them lie releases of transformers.
    assert predicted / 3 <= peak <= predicted
