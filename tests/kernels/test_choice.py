"""What the default table chooses by dtype, card and rows, and what is refused."""

from __future__ import annotations

import pytest
import torch

from flux_kernels import backends, kernels
from flux_kernels.errors import BackendUnavailable
from flux_kernels.formats import FORMATS, Packed
from flux_kernels.kernels.choice import Choice, default_choice

from .samples import finite_rows

CAPABILITIES = [None, (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", FORMATS)
def test_float32_takes_no_fused_tile(name, capability):
    """Float32 activations take no fused tile.

    Ten formats' wide tiles need more shared memory than a GeForce has (Q4_K: 165,888 of 101,376 bytes), and ten narrow ones
    spill on A100.
    """
    for m in (3, 16, 17, 64, 65, 512, 4608):
        chosen = default_choice("exact", FORMATS[name], m, 3072, 3072, capability, torch.float32)
        assert (chosen.algorithm, chosen.tile) == ("two_stage", None)
    assert default_choice("exact", FORMATS[name], 2, 3072, 3072, capability, torch.float32).algorithm == "small_m"


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "IQ2_XS"])
def test_float32_activations_are_as_right_as_torch(name, device):
    """The product of the decoded weight, ragged M and N, with bias: what F.linear gives for it."""
    fmt = FORMATS[name]
    data, weight = finite_rows(name, 37)
    packed = fmt.layout.to_planes(data) if fmt.planes else data
    x, bias = torch.randn(33, 512), torch.randn(37)
    got = kernels.linear(x.to(device), Packed(packed.to(device), fmt, fmt.planes), bias.to(device), "exact").cpu()
    assert torch.equal(got, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (10, 3), (11, 0)])
def test_fp16_accumulation_is_refused_where_it_has_no_faster_unit(capability, monkeypatch):
    """A100, H100 and their kin multiply fp16 at one rate, so the mode is refused there.

    The fused tile reaches at most half of cuBLAS.
    """
    monkeypatch.setattr(backends, "capability_of", lambda device: capability)
    backends.resolve.cache_clear()
    try:
        with pytest.raises(BackendUnavailable, match="multiply fp16 faster with fp16 accumulation"):
            backends.resolve("auto", "fp16_accumulate", torch.device("cuda"), FORMATS["Q4_K"])
        assert backends.resolve("auto", "int8", torch.device("cuda"), FORMATS["Q4_K"]).name == "triton"
    finally:
        backends.resolve.cache_clear()


def test_cards_whose_memory_is_no_slow_one_unpack_at_large_m():
    """Thor (11.0) and Spark (12.1) share their memory with a CPU.

    Writing the unpacked weight there costs more than it saves.
    """
    chosen = {cap: default_choice("exact", FORMATS["Q4_K"], 4608, 3072, 3072, cap).algorithm for cap in CAPABILITIES[1:]}
    assert {cap for cap, algorithm in chosen.items() if algorithm == "two_stage"} == {
        *((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
    }


@pytest.mark.parametrize("m", [17, 64, 65, 4608])
def test_the_int8_tile_is_no_taller_than_twice_the_call(m):
    tile = default_choice("int8", FORMATS["Q4_K"], m, 3072, 3072, (8, 6)).tile
    assert tile.block_m <= max(64, 2 * m)
    assert tile.block_m == (64 if m <= 64 else 128)


def test_a_choice_says_its_chunks():
    assert str(Choice("two_stage", None, "", 4096)) == "two_stage in chunks of 4096 rows"
    assert str(Choice("two_stage", None, "")) == "two_stage"
