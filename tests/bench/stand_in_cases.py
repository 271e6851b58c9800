"""Hold the cases of test_stand_in.py, for a process in which kernels can be compiled.

Run `pytest --noconftest tests/bench/stand_in_cases.py`.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import triton

import flux_kernels as fk
from bench.stand_in import CARDS, counting_compiler, stand_in
from flux_kernels import backends
from flux_kernels.backends import resolve
from flux_kernels.compute import capability_of
from flux_kernels.formats import FORMATS
from flux_kernels.machine.random_rows import random_rows

Q8 = FORMATS["Q8_0"]


def product(m: int, compute: str = "exact", n: int = 256, k: int = 256):
    data = random_rows(Q8, n, k, Q8.planes).to("cuda")
    return fk.linear(torch.zeros(m, k, device="cuda", dtype=torch.bfloat16), data, "Q8_0", compute=compute, planes=Q8.planes)


def test_a_call_compiles_and_launches_the_kernels_of_the_card():
    with stand_in(CARDS["RTX 3090"]) as card:
        y = product(1)
        assert (y.shape, y.dtype, y.device) == ((1, 256), torch.bfloat16, torch.device("cuda", 0))
        product(1)
        assert card.loaded == ["small_m_codes_kernel"] and card.launches == {"small_m_codes_kernel": 2}
    assert y.device == torch.device("cpu") and not torch.cuda.is_available()


@pytest.mark.parametrize(("name", "kernel"), [("RTX 3090", "fused_gemm_kernel"), ("H100", "dequantize_kernel")])
def test_another_card_makes_its_own_choices(name, kernel):
    """The choices and compiled kernels of the card before are forgotten."""
    with stand_in(CARDS[name], counting_compiler(Counter())) as card:
        assert capability_of(torch.device("cuda", 0)) == CARDS[name].capability
        product(256)
        assert kernel in card.launches


def test_distinct_kernels_are_counted_without_compiling():
    names: Counter[str] = Counter()
    with stand_in(CARDS["RTX 3090"], counting_compiler(names)) as card:
        # Two that 16 divides are one kernel, 257 is another.
        for m in (128, 256, 257):
            product(m)
        assert names == {"fused_gemm_kernel": 2}
        assert card.launches["fused_gemm_kernel"] == 3 and not card.loaded


@triton.jit
def staged_kernel(x_ptr, BLOCK: triton.language.constexpr):
    """Sort, which stages BLOCK numbers in shared memory."""
    offsets = triton.language.arange(0, BLOCK)
    values = triton.language.load(x_ptr + offsets)
    triton.language.store(x_ptr + offsets, triton.language.sort(values))


def test_too_much_shared_memory_is_refused_as_the_driver_does(monkeypatch):
    """The fused kernel on a card that has less than it needs; without the limit the same call runs."""
    with stand_in(CARDS["RTX 3090"]):
        product(128)
    monkeypatch.setattr(type(CARDS["RTX 3090"]), "shared_bytes", 16384)
    with (
        stand_in(CARDS["RTX 3090"]),
        pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory, Required: .* 16384"),
    ):
        product(128)


def test_grids_past_the_limits_are_refused_and_empty_ones_skipped():
    with stand_in(CARDS["H100"], counting_compiler(Counter())) as card:
        x = torch.zeros(16, device="cuda")
        staged_kernel[(65536,)](x, BLOCK=16)
        staged_kernel[(0,)](x, BLOCK=16)
        assert card.launches["staged_kernel"] == 1
        with pytest.raises(RuntimeError, match="invalid argument"):
            staged_kernel[(1, 65536)](x, BLOCK=16)


def test_what_ends_a_capture_raises_inside_one():
    with stand_in(CARDS["H100"]) as card:
        x = torch.zeros(16, device="cuda")
        graph = torch.cuda.CUDAGraph()
        for forbidden in (torch.cuda.synchronize, x.sum().item, x.cpu, lambda: staged_kernel[(1,)](x, BLOCK=32)):
            with pytest.raises(RuntimeError, match="when stream is capturing"), torch.cuda.graph(graph):
                forbidden()
        with torch.cuda.graph(graph):
            x + 1
        graph.replay()
        assert card.cuda.replays == 1


def test_code_for_a_geforce_is_loaded_as_ptx_on_another_card():
    """Choices, limits and code are the GeForce's while it lasts, the card's own before and after."""
    from bench.stand_in_ptx import compiled_for

    with stand_in(CARDS["H100"]) as card:
        product(4608)
        assert set(card.loaded) == {"dequantize_kernel"} and card.code["dequantize_kernel"].startswith(b"\x7fELF")
        with compiled_for(CARDS["RTX 3090"]):
            product(256)
            assert torch.cuda.get_device_capability() == (8, 6)
        assert card.loaded[1:] == ["fused_gemm_kernel"]
        code = card.code["fused_gemm_kernel"]
        assert b".target sm_86" in code and code.endswith(b"\0")
        product(4608)
        assert torch.cuda.get_device_capability() == (9, 0) and card.loaded[2:] == ["dequantize_kernel"]


def test_tensors_say_where_they_would_be():
    with stand_in(CARDS["H200"], counting_compiler(Counter())):
        made = [
            torch.empty(2, device="cuda:0"),
            torch.zeros(2).to("cuda", torch.float16),
            torch.nn.Linear(2, 2, device="cuda").weight,
        ]
        made += [torch.empty(2, device="meta"), torch.randn(2, generator=torch.Generator("cuda"), device=torch.device("cuda"))]
        assert [tensor.device.type for tensor in made] == ["cuda", "cuda", "cuda", "meta", "cuda"]
        assert made[0].is_cuda and not made[3].is_cuda
        assert torch.cuda.get_device_properties(0).L2_cache_size == 60 << 20
        assert resolve("auto", "int8", torch.device("cuda", 0), Q8).name == "triton"
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            torch.mm(torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize(("name", "said"), [("H200", 1), ("H100", 1), ("A100", 0), ("RTX 4090", 0)])
def test_int8_says_where_it_was_measured_to_be_slower(name, said, caplog):
    """Once a device, on the chip where it was measured."""
    resolve.cache_clear()
    backends._say_slower.cache_clear()
    with stand_in(CARDS[name], counting_compiler(Counter())):
        for compute, fmt in (("exact", Q8), ("int8", Q8), ("int8", Q8), ("int8", FORMATS["Q4_K"])):
            resolve("auto", compute, torch.device("cuda", 0), fmt)
    resolve.cache_clear()
    assert ["took longer" in record.message for record in caplog.records] == [True] * said
