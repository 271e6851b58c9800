"""The decode on the CPU gives the bits of the torch reference.

By libggml or by a format's own unpacking, for every type, dtype and thread count.
"""

from __future__ import annotations

import threading

import pytest
import torch

from flux_kernels import torch_backend
from flux_kernels.formats import FORMATS, Packed
from flux_kernels.torch_backend import cpu_decode, cpu_threads, libggml, reference

from .. import libggml_oracle as oracle
from ..kernels.samples import finite_rows

with_libggml = pytest.mark.skipif(not libggml.available(), reason="libggml-python is not installed")
UNPACKED = [name for name, fmt in FORMATS.items() if fmt.unpacker is not None]
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
    """Every format decodes in several chunks and spans, with short last ones.

    16 bit is the float32 value rounded once.
    """
    fmt = FORMATS[name]
    data, _ = finite_rows(name, 37)
    monkeypatch.setattr(cpu_decode, "CHUNK_WEIGHTS", 4 * fmt.row_weights(data.shape[1]))
    monkeypatch.setattr(cpu_decode, "UNPACK_WEIGHTS", 4 * fmt.row_weights(data.shape[1]))
    monkeypatch.setattr(cpu_threads, "LEAST_WEIGHTS", 1)
    assert cpu_decode.serves(Packed(data, fmt), dtype)
    assert torch.equal(
        bits(cpu_decode.dequantize(Packed(data, fmt), dtype)), bits(reference.dequantize(Packed(data, fmt), dtype))
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_overflow_infinity_and_subnormals_round_alike(dtype):
    """Scales from the smallest subnormal to infinity: beyond the range of fp16 and in its subnormals."""
    fmt = FORMATS["Q8_0"]
    scales = torch.tensor([6e-8, 1e-5, 65504.0, float("inf"), 300.0, 0.0, -1.0, 3e-7]).half()
    blocks = torch.zeros(8, fmt.type_size, dtype=torch.uint8)
    blocks[:, :2] = scales.view(torch.uint8).view(8, 2)
    blocks[:, 2:] = torch.arange(1, 33, dtype=torch.uint8) * 4 + 1
    expected = reference.dequantize(Packed(blocks, fmt), dtype)
    assert torch.equal(bits(cpu_decode.dequantize(Packed(blocks, fmt), dtype)), bits(expected))


@with_libggml
@pytest.mark.parametrize("name", UNPACKED)
def test_unpacking_gives_libggmls_bits_on_any_bytes(name, threads, monkeypatch):
    """Random bytes decode to the bits of libggml, signed zeros included.

    With NaN and infinity among the scales, every code and sub-scale.
    """
    fmt = FORMATS[name]
    data = torch.randint(0, 256, (61, fmt.row_bytes(1024)), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    infinities = torch.tensor([[float("inf")], [-float("inf")]]).half().view(torch.uint8)
    at = fmt.layout.offsets["d"]
    data.view(-1, fmt.type_size)[:2, at : at + 2] = infinities
    monkeypatch.setattr(cpu_decode, "UNPACK_WEIGHTS", 7 * 1024)
    monkeypatch.setattr(cpu_threads, "LEAST_WEIGHTS", 1)
    want = torch.from_numpy(oracle.dequantize(name, data.numpy(), 1024))
    assert want.isnan().any() and want.isinf().any()
    monkeypatch.setattr(cpu_decode, "_routine", lambda fmt: pytest.fail("libggml decoded instead"))
    # A NaN stays one; which one depends in torch on the place in a vector register
    for dtype in DTYPES:
        got, rounded = cpu_decode.dequantize(Packed(data, fmt), dtype), want.to(dtype)
        assert torch.equal(got.isnan(), rounded.isnan())
        assert torch.equal(bits(got.masked_fill(got.isnan(), 0)), bits(rounded.masked_fill(rounded.isnan(), 0)))


@pytest.mark.parametrize("name", ["Q6_K", "Q8_0"])
def test_a_users_defaults_and_inference_mode_change_nothing(name, threads, monkeypatch):
    """Memory that is kept from call to call serves under other defaults and in inference mode.

    Whatever it was made under.
    """
    fmt = FORMATS[name]
    data, weight = finite_rows(name, 40)
    monkeypatch.setattr(cpu_decode, "CHUNK_WEIGHTS", 1024)
    monkeypatch.setattr(cpu_threads, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(cpu_threads, "_local", threading.local())
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode(), torch.device("meta"):
            inside = cpu_decode.dequantize(Packed(data, fmt), torch.bfloat16)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(inside, weight.bfloat16())
    assert torch.equal(cpu_decode.dequantize(Packed(data, fmt), torch.bfloat16), inside)
    out = torch.zeros(weight.shape)
    assert torch.equal(cpu_decode.dequantize(Packed(data, fmt), torch.float32, out), weight) and not out.is_inference()


@pytest.mark.parametrize("name", ["Q6_K", "Q8_0"])
def test_no_rows_decode_to_none(name, threads):
    data, _ = finite_rows(name, 1)
    assert cpu_decode.dequantize(Packed(data[:0], FORMATS[name]), torch.bfloat16).shape == (0, 512)


def test_a_result_does_not_change_with_the_next_call():
    """The product is computed from a scratch that calls share.

    Results and decoded weights are memory of their own.
    """
    (first, weight), (second, _) = finite_rows("Q4_K", 8), finite_rows("Q4_K", 16)
    x = torch.randn(3, 512)
    y = torch_backend.linear(x, Packed(first, FORMATS["Q4_K"]), None, "exact")
    kept, decoded = y.clone(), torch_backend.dequantize(Packed(first, FORMATS["Q4_K"]), torch.float32)
    torch_backend.linear(x, Packed(second.flip(0).contiguous(), FORMATS["Q4_K"]), None, "exact")
    assert torch.equal(y, kept) and torch.equal(decoded, weight)


def test_planes_and_other_devices_take_the_torch_decode():
    data, _ = finite_rows("Q8_0", 2)
    assert not cpu_decode.serves(Packed(data, FORMATS["Q8_0"], True), torch.float32)
    assert not cpu_decode.serves(Packed(data.to("meta"), FORMATS["Q8_0"]), torch.float32)
    assert not cpu_decode.serves(Packed(data, FORMATS["Q8_0"]), torch.float64)


@pytest.mark.parametrize("name", ["Q6_K", "Q4_K", "IQ4_XS"])
def test_without_libggml_torch_decodes(name, threads, monkeypatch):
    cpu_decode._routine.cache_clear()
    monkeypatch.setattr(libggml, "available", lambda: False)
    monkeypatch.setattr(cpu_decode, "CHUNK_WEIGHTS", 1024)
    data, weight = finite_rows(name, 5)
    for dtype in DTYPES:
        assert torch.equal(torch_backend.dequantize(Packed(data, FORMATS[name]), dtype), weight.to(dtype))
    cpu_decode._routine.cache_clear()
