"""The product by the threads that decode has the bits of one product with the whole weight.

On the CPU.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flux_kernels import torch_backend
from flux_kernels.formats import FORMATS
from flux_kernels.machine.random_rows import random_weight
from flux_kernels.torch_backend import cpu_decode, cpu_linear, cpu_threads, libggml, reference

TYPES = ["Q4_K", "Q6_K", "Q8_0"]
needs_decoder = pytest.mark.skipif(not libggml.available(), reason="libggml-python is not installed: only Q6_K has a decoder")


@pytest.fixture(params=[1, 2, 3], ids="threads {}".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def chunks(monkeypatch):
    """Make several chunks of 64 rows and shares of 128, with short last ones, in a small layer.

    A share is a thread's.
    """
    monkeypatch.setattr(cpu_linear, "CHUNK_WEIGHTS", 64 * 768 + 5)
    monkeypatch.setattr(cpu_threads, "LEAST_WEIGHTS", 1)
    return 448, 768


def made(name: str, m: int, dtype: torch.dtype, bias: bool, n: int, k: int):
    """Make x with strides, a packed weight, bias, and the decoded weight."""
    x = torch.randn(k, m, generator=torch.Generator().manual_seed(m)).to(dtype).t()
    packed, b = random_weight(FORMATS[name], n, k, planes=False), torch.randn(n).to(dtype) if bias else None
    return x, packed, b, reference.dequantize(packed, dtype)


@needs_decoder
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the order of sums was studied on AVX512")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("m", [1, 2, 4, 16, 64, 77])
@pytest.mark.parametrize("name", TYPES)
def test_bits_are_those_of_one_product(name, m, bias, dtype, threads, chunks):
    """Torch's product on one thread sums every element in the same order."""
    x, packed, b, weight = made(name, m, dtype, bias, *chunks)
    assert cpu_linear.serves(x, packed)
    y = torch_backend.linear(x, packed, b, "exact")
    torch.set_num_threads(1)
    assert torch.equal(y, F.linear(x.contiguous(), weight, b))


@needs_decoder
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TYPES)
def test_error_is_that_of_sums_in_float32(name, dtype, threads, chunks):
    """The error against float64 is K rounded additions of float32 in any order, and one rounding.

    Higham 2002, 3.1; the rounding is to 16 bits.
    """
    (n, k), m = chunks, 9
    x, packed, b, weight = made(name, m, dtype, True, n, k)
    y = torch_backend.linear(x, packed, b, "exact").double()
    exact = x.double() @ weight.double().t() + b.double()
    sums = (k + 1) * 2.0**-24 * (x.double().abs() @ weight.double().abs().t() + b.double().abs())
    assert ((y - exact).abs() <= sums + torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny).all()


@needs_decoder
def test_it_is_what_runs(monkeypatch):
    """Few tokens go this way; many tokens, odd row counts, planes and branches go the other."""
    fmt, called = FORMATS["Q4_K"], []
    monkeypatch.setattr(cpu_linear, "linear", lambda *args: called.append(1) or torch.zeros(1))
    weight, x = random_weight(fmt, 128, 256, planes=False), torch.randn(2, 256)
    torch_backend.linear(x, weight, None, "exact")
    assert called == [1]
    monkeypatch.setattr(cpu_linear, "LARGEST_M", 4)
    torch_backend.linear(torch.randn(5, 256), weight, None, "exact")
    torch_backend.linear(x, weight.rows(slice(100)), None, "exact")
    torch_backend.linear(x, weight, None, "exact", (torch.randn(2, 3), torch.randn(128, 3)))
    torch_backend.linear(x, random_weight(fmt, 128, 256, planes=True), None, "exact")
    assert called == [1]


def test_without_a_decoder_the_other_way_serves(monkeypatch):
    monkeypatch.setattr(libggml, "available", lambda: False)
    cpu_decode._routine.cache_clear()
    try:
        x, served = torch.randn(1, 256), {}
        for name in ("Q4_K", "Q6_K"):
            served[name] = cpu_linear.serves(x, random_weight(FORMATS[name], 64, 256, planes=False))
        assert served == {"Q4_K": False, "Q6_K": True}
    finally:
        cpu_decode._routine.cache_clear()


@pytest.mark.parametrize("name", TYPES)
def test_a_result_outlives_the_next_call_and_no_tokens_give_none(name):
    """The chunk is kept memory; what is returned is not. In inference mode as well as outside."""
    fmt = FORMATS[name]
    weight, other = (random_weight(fmt, 64, 256, planes=False, seed=seed) for seed in (0, 1))
    x = torch.randn(3, 256)
    with torch.inference_mode():
        y = torch_backend.linear(x, weight, None, "exact")
    before = y.clone()
    torch_backend.linear(x, other, None, "exact")
    assert torch.equal(y, before)
    assert torch_backend.linear(x[:0], weight, None, "exact").shape == (0, 64)
