"""The decode through libggml on the CPU: the bits of the pure-torch reference, for every type, dtype and thread count."""

from __future__ import annotations

import os

import pytest
import torch

from flux_kernels import cpu_decode, libggml, reference, torch_backend
from flux_kernels.formats import FORMATS

from .kernels.samples import finite_rows

pytestmark = pytest.mark.skipif(not libggml.available(), reason="libggml-python is not installed")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32 if values.dtype == torch.float32 else torch.int16)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_bits_are_those_of_the_reference(name, dtype, threads, monkeypatch):
    """Every format libggml knows, in several chunks with a short last one; 16 bit is the float32 value rounded once."""
    fmt = FORMATS[name]
    data, _ = finite_rows(name, 37)
    monkeypatch.setattr(cpu_decode, "CHUNK_WEIGHTS", 5 * fmt.row_weights(data.shape[1]))
    assert cpu_decode.serves(data, fmt, dtype, False)
    assert torch.equal(bits(cpu_decode.dequantize(data, fmt, dtype)), bits(reference.dequantize(data, fmt, dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_overflow_infinity_and_subnormals_round_alike(dtype):
    """Scales from the smallest subnormal to infinity: beyond the range of fp16 and in its subnormals."""
    fmt = FORMATS["Q8_0"]
    scales = torch.tensor([6e-8, 1e-5, 65504.0, float("inf"), 300.0, 0.0, -1.0, 3e-7]).half()
    blocks = torch.zeros(8, fmt.type_size, dtype=torch.uint8)
    blocks[:, :2] = scales.view(torch.uint8).view(8, 2)
    blocks[:, 2:] = torch.arange(1, 33, dtype=torch.uint8) * 4 + 1
    expected = reference.dequantize(blocks, fmt, dtype)
    assert torch.equal(bits(cpu_decode.dequantize(blocks, fmt, dtype)), bits(expected))


def test_a_result_does_not_change_with_the_next_call():
    """The product is computed from a scratch that calls share; results and decoded weights are memory of their own."""
    (first, weight), (second, _) = finite_rows("Q4_K", 8), finite_rows("Q4_K", 16)
    x = torch.randn(3, 512)
    y = torch_backend.linear(x, first, None, FORMATS["Q4_K"], "exact")
    kept, decoded = y.clone(), torch_backend.dequantize(first, FORMATS["Q4_K"], torch.float32)
    torch_backend.linear(x, second.flip(0).contiguous(), None, FORMATS["Q4_K"], "exact")
    assert torch.equal(y, kept) and torch.equal(decoded, weight)


def test_planes_and_other_devices_take_the_torch_decode():
    fmt = FORMATS["Q8_0"]
    data, _ = finite_rows("Q8_0", 2)
    assert not cpu_decode.serves(data, fmt, torch.float32, True)
    assert not cpu_decode.serves(data.to("meta"), fmt, torch.float32, False)
    assert not cpu_decode.serves(data, fmt, torch.float64, False)


def test_without_libggml_the_torch_decode_serves(monkeypatch):
    cpu_decode._routine.cache_clear()
    monkeypatch.setattr(libggml, "available", lambda: False)
    data, weight = finite_rows("Q6_K", 3)
    assert not cpu_decode.serves(data, FORMATS["Q6_K"], torch.float32, False)
    assert torch.equal(torch_backend.dequantize(data, FORMATS["Q6_K"], torch.float32), weight)
    cpu_decode._routine.cache_clear()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is POSIX")
def test_a_forked_child_decodes(monkeypatch):
    """Threads do not survive a fork; the child makes a pool of its own (data loaders fork)."""
    data, _ = finite_rows("Q4_K", 64)
    monkeypatch.setattr(cpu_decode, "CHUNK_WEIGHTS", 4096)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    expected = cpu_decode.dequantize(data, FORMATS["Q4_K"], torch.float32)
    child = os.fork()
    if child == 0:
        same = torch.equal(cpu_decode.dequantize(data, FORMATS["Q4_K"], torch.float32), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
