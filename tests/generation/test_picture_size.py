"""Sizes of pictures that are refused, and the numbers they are refused by."""

from __future__ import annotations

import pytest
import torch

from flux_kernels.errors import FormatError
from flux_kernels.generation import picture_size
from flux_kernels.generation.memory_plan import Part
from flux_kernels.generation.picture_size import check_memory, check_positions, longest_side


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_are_told_apart_up_to_the_longest_side_and_no_further(dtype):
    tokens = longest_side(dtype) // 16
    assert torch.arange(tokens).to(dtype).unique().numel() == tokens
    assert torch.arange(tokens + 1).to(dtype).unique().numel() == tokens
    check_positions(longest_side(dtype), 16, dtype)
    with pytest.raises(FormatError, match="is too large: positions in"):
        check_positions(16, longest_side(dtype) + 1, dtype)


def test_activations_beyond_the_free_memory_are_refused(monkeypatch):
    monkeypatch.setattr(picture_size, "free_bytes", lambda device: 2**30)
    # Weights are mapped from the file.
    check_memory([Part("transformer", 10**18, 1, 2**20)], 64, 64)
    with pytest.raises(
        FormatError, match=r"64 x 48 is too large: the vae would need about 2\.0 GiB .* 1\.0 GiB of memory are free"
    ):
        check_memory([Part("transformer", 1, 1, 1), Part("vae", 1, 1, 2**31)], 64, 48)
