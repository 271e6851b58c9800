"""Sizes of pictures that are refused, and the numbers they are refused by."""

from __future__ import annotations

import pytest
import torch

from flux_kernels.errors import FormatError
from flux_kernels.generation import picture_size
from flux_kernels.generation.memory_plan import Part
from flux_kernels.generation.picture_size import check_memory, check_positions, longest_side
from flux_kernels.models.architectures.flux1 import FLUX1
from flux_kernels.models.architectures.sd3 import SD3
from flux_kernels.models.architectures.z_image import Z_IMAGE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_are_told_apart_up_to_the_longest_side_and_no_further(dtype):
    longest = longest_side(dtype, 16)
    tokens = longest // 16
    assert torch.arange(tokens).to(dtype).unique().numel() == tokens
    assert torch.arange(tokens + 1).to(dtype).unique().numel() == tokens
    check_positions(longest, 16, dtype, FLUX1, {}, rounded=True)
    with pytest.raises(FormatError, match="is too large: positions in .* and FLUX.1 was made for about 1024 x 1024"):
        check_positions(16, longest + 1, dtype, FLUX1, {}, rounded=True)
    check_positions(16, longest + 1, dtype, FLUX1, {}, rounded=False)


@pytest.mark.parametrize(
    ("architecture", "config", "longest"),
    [
        (SD3, {"pos_embed_max_size": 192}, 3072),
        (Z_IMAGE, {"axes_lens": (1024, 512, 512)}, 8192),
    ],
)
def test_a_model_with_a_table_of_positions_draws_no_larger_picture(architecture, config, longest):
    check_positions(longest, 16, torch.bfloat16, architecture, config, rounded=False)
    with pytest.raises(
        FormatError, match=f"the model has positions for {longest} pixels a side, and {architecture.name} was made"
    ):
        check_positions(16, longest + 16, torch.bfloat16, architecture, config, rounded=False)


def test_activations_beyond_the_free_memory_are_refused(monkeypatch):
    monkeypatch.setattr(picture_size, "free_bytes", lambda device: 2**30)
    # Weights are mapped from the file.
    check_memory([Part("transformer", 10**18, 1, 2**20)], 64, 64)
    with pytest.raises(
        FormatError, match=r"64 x 48 is too large: the vae would need about 2\.0 GiB .* 1\.0 GiB of memory are free"
    ):
        check_memory([Part("transformer", 1, 1, 1), Part("vae", 1, 1, 2**31)], 64, 48)
