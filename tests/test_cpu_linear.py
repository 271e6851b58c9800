"""The product on the CPU by the threads that decode: the bits of one product with the whole decoded weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flux_kernels import cpu_decode, cpu_linear, libggml, reference, torch_backend
from flux_kernels.formats import FORMATS
from flux_kernels.random_rows import random_rows

TYPES = ["Q4_K", "Q6_K", "Q8_0"]
needs_decoder = pytest.mark.skipif(not libggml.available(), reason="libggml-python is not installed: only Q6_K has a decoder")


@pytest.fixture(params=[1, 2, 3], ids="threads {}".format)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_decoder
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("m", [1, 2, 4, 16, 64, 77])
@pytest.mark.parametrize("name", TYPES)
def test_bits_are_those_of_one_product(name, m, bias, threads, monkeypatch):
    """Chunks of 64 and 128 rows, a short last one, x with strides: torch's product on one thread sums in the same order."""
    fmt, n, k = FORMATS[name], 448, 768
    monkeypatch.setattr(cpu_decode, "CHUNK_WEIGHTS", 64 * k + 5)
    monkeypatch.setattr(cpu_decode, "UNPACK_WEIGHTS", 130 * k)
    monkeypatch.setattr(cpu_decode, "SPAN_WEIGHTS", 1)
    data, b = random_rows(fmt, n, k), torch.randn(n) if bias else None
    x = torch.randn(k, m, generator=torch.Generator().manual_seed(m)).t()
    assert cpu_linear.serves(x, data, fmt, planes=False)
    y = torch_backend.linear(x, data, b, fmt, "exact")
    torch.set_num_threads(1)
    assert torch.equal(y, F.linear(x.contiguous(), reference.dequantize(data, fmt, torch.float32), b))


@needs_decoder
def test_it_is_what_runs(monkeypatch):
    """Few tokens in float32 go this way; 16 bit, many tokens, odd row counts, planes and branches go the other."""
    fmt, called = FORMATS["Q4_K"], []
    monkeypatch.setattr(cpu_linear, "linear", lambda *args: called.append(1) or torch.zeros(1))
    data, x = random_rows(fmt, 128, 256), torch.randn(2, 256)
    torch_backend.linear(x, data, None, fmt, "exact")
    assert called == [1]
    monkeypatch.setattr(cpu_linear, "LARGEST_M", 4)
    torch_backend.linear(x.bfloat16(), data, None, fmt, "exact")
    torch_backend.linear(torch.randn(5, 256), data, None, fmt, "exact")
    torch_backend.linear(x, data[:100], None, fmt, "exact")
    torch_backend.linear(x, data, None, fmt, "exact", branch=(torch.randn(2, 3), torch.randn(128, 3)))
    torch_backend.linear(x, random_rows(fmt, 128, 256, planes=True), None, fmt, "exact", planes=True)
    assert called == [1]


def test_without_a_decoder_the_other_way_serves(monkeypatch):
    monkeypatch.setattr(libggml, "available", lambda: False)
    cpu_decode._routine.cache_clear()
    try:
        data = random_rows(FORMATS["Q4_K"], 64, 256)
        assert not cpu_linear.serves(torch.randn(1, 256), data, FORMATS["Q4_K"], planes=False)
        assert cpu_linear.serves(torch.randn(1, 256), random_rows(FORMATS["Q6_K"], 64, 256), FORMATS["Q6_K"], planes=False)
    finally:
        cpu_decode._routine.cache_clear()


@pytest.mark.parametrize("name", TYPES)
def test_a_result_outlives_the_next_call_and_no_tokens_give_none(name):
    """The chunk is kept memory; what is returned is not. In inference mode as well as outside."""
    fmt = FORMATS[name]
    data, other = random_rows(fmt, 64, 256), random_rows(fmt, 64, 256, seed=1)
    x = torch.randn(3, 256)
    with torch.inference_mode():
        y = torch_backend.linear(x, data, None, fmt, "exact")
    before = y.clone()
    torch_backend.linear(x, other, None, fmt, "exact")
    assert torch.equal(y, before)
    assert torch_backend.linear(x[:0], data, None, fmt, "exact").shape == (0, 64)
