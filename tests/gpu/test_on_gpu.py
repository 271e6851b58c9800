"""What only a real GPU can show: `pytest -m gpu`. Every format, dtype and shape class; streams, graphs, devices, size, bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import flux_kernels as fk
from flux_kernels import kernels
from flux_kernels.formats import FORMATS
from flux_kernels.kernels import exact
from flux_kernels.kernels.choice import Choice
from flux_kernels.kernels.tuning import fused_tile
from tests.kernels.samples import finite_rows, golden

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU in this machine"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 70, 2), (2, 64, 1), (5, 37, 2), (16, 128, 2), (33, 130, 3), (512, 384, 6), (4608, 256, 6)]


def packed(name: str, n: int, repeats: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed rows as the Triton backend stores them, and their float32 values, on the GPU."""
    fmt = FORMATS[name]
    data, weight = finite_rows(name, n, repeats)
    return (fmt.layout.to_planes(data) if fmt.planes else data).cuda(), weight.cuda()


@pytest.mark.parametrize("planes", [False, True], ids=["file order", "planes"])
@pytest.mark.parametrize("name", FORMATS)
def test_decode_is_bit_equal_to_libggml(name, planes):
    fmt, vectors = FORMATS[name], golden(name)
    data = fmt.layout.to_planes(vectors["random_q"]) if planes else vectors["random_q"]
    got = kernels.dequantize(data.cuda(), fmt, torch.float32, planes).cpu()
    finite = vectors["random_y"].isfinite()
    assert torch.equal(got[finite].view(torch.int32), vectors["random_y"][finite].view(torch.int32))
    assert torch.equal(got.isnan(), vectors["random_y"].isnan())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_linear_is_within_twice_the_error_of_cublas(name, dtype, shape, monkeypatch):
    """Against float64, at most 2x the error of torch's matmul on the decoded weight, plus half an output rounding."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    m, n, repeats = shape
    data, weight = packed(name, n, repeats)
    torch.manual_seed(m)
    x = torch.randn(m, weight.shape[1], device="cuda").to(dtype)
    bias = torch.randn(n, device="cuda").to(dtype)
    oracle = x.double() @ weight.to(dtype).double().T + bias.double()
    reference = torch.nn.functional.linear(x, weight.to(dtype), bias)
    got = kernels.linear(x, data, bias, FORMATS[name], "exact", FORMATS[name].planes)
    slack = torch.finfo(dtype).eps * oracle.norm() / 2
    assert (got.double() - oracle).norm() <= 2 * (reference.double() - oracle).norm() + slack


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_identity_gives_the_weight(name, dtype):
    data, weight = packed(name, 40, 1)
    got = kernels.linear(torch.eye(512, dtype=dtype, device="cuda"), data, None, FORMATS[name], "exact", FORMATS[name].planes)
    assert torch.equal(got, weight.to(dtype).T)


def test_several_streams_do_not_disturb_each_other():
    data, _ = packed("Q4_K", 256, 4)
    inputs = [torch.randn(64 + i, 2048, device="cuda", dtype=torch.bfloat16) for i in range(8)]
    expected = [fk.linear(x, data, "Q4_K", backend="triton") for x in inputs]
    torch.cuda.synchronize()
    results = []
    for x in inputs:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results.append([fk.linear(x, data, "Q4_K", backend="triton") for _ in range(4)])
    torch.cuda.synchronize()
    assert all(torch.equal(y, e) for ys, e in zip(results, expected, strict=True) for y in ys)


@pytest.mark.parametrize("m", [1, 300])
def test_a_cuda_graph_replays_the_call(m):
    data, _ = packed("Q6_K", 128, 4)
    fmt = FORMATS["Q6_K"]
    x = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)
    kernels.linear(x, data, None, fmt, "exact", fmt.planes)  # compile before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.linear(x, data, None, fmt, "exact", fmt.planes)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, kernels.linear(x, data, None, fmt, "exact", fmt.planes))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_than_the_current_device():
    data, weight = packed("Q8_0", 32, 1)
    x = torch.randn(3, 512, device="cuda:1")
    got = kernels.linear(x, data.to("cuda:1"), None, FORMATS["Q8_0"], "exact", True)
    torch.testing.assert_close(got.cpu(), x.cpu() @ weight.cpu().T, rtol=1e-5, atol=1e-4)


def test_more_than_2_to_the_31_weights():
    """Row offsets pass 2^31 bytes and output offsets 2^31 elements: the last rows are still right."""
    fmt = FORMATS["Q8_0"]
    k, n = 12288, 190_000
    if torch.cuda.get_device_properties(0).total_memory < 16 << 30:
        pytest.skip("needs 16 GB of GPU memory")
    data = torch.randint(0, 120, (n, k // 32 * 34), dtype=torch.uint8, device="cuda")
    x = torch.randn(16, k, device="cuda", dtype=torch.bfloat16)
    got = kernels.linear(x, data, None, fmt, "exact")
    tail = kernels.linear(x, data[-64:].clone(), None, fmt, "exact")
    assert torch.equal(got[:, -64:], tail)
    weights = kernels.dequantize(data, fmt, torch.bfloat16)
    assert torch.equal(weights[-64:], kernels.dequantize(data[-64:].clone(), fmt, torch.bfloat16))


@pytest.mark.parametrize("m", [1, 2, 16, 600])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "IQ2_XS"])
def test_same_bits_on_every_run(name, m):
    data, _ = packed(name, 200, 4)
    x = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)
    first = kernels.linear(x, data, None, FORMATS[name], "exact", FORMATS[name].planes)
    for _ in range(20):
        assert torch.equal(first, kernels.linear(x, data, None, FORMATS[name], "exact", FORMATS[name].planes))


@pytest.mark.parametrize("compute", ["exact", "int8", "fp16_accumulate"])
def test_out_of_memory_leaves_a_usable_layer(compute):
    """A call that finds no memory for its result raises torch's error; the next call with memory gives the same bits."""
    data, _ = packed("Q4_K", 4096, 4)
    x = torch.randn(20_000, 2048, device="cuda", dtype=torch.float16)
    expected = fk.linear(x, data, "Q4_K", backend="triton", compute=compute)
    kept = expected.sum(dtype=torch.float64)
    del expected
    torch.cuda.empty_cache()
    fraction = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction(min(1.0, fraction + 1e-4))
        with pytest.raises(torch.OutOfMemoryError):
            fk.linear(x, data, "Q4_K", backend="triton", compute=compute)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    again = fk.linear(x, data, "Q4_K", backend="triton", compute=compute)
    assert torch.equal(again.sum(dtype=torch.float64), kept)


@pytest.mark.parametrize("splits", [2, 3])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_split_k_is_right_and_repeats(name, splits):
    """Programs that share K: within twice the error of cuBLAS, and the same bits on every run."""
    fmt = FORMATS[name]
    data, weight = packed(name, 384, 6)
    x = torch.randn(512, 3072, device="cuda", dtype=torch.bfloat16)
    oracle = x.double() @ weight.to(x.dtype).double().T
    reference = torch.nn.functional.linear(x, weight.to(x.dtype))
    tile = replace(fused_tile(fmt, 512, 384, 3072, torch.cuda.get_device_capability()), splits=splits)
    results = []
    for _ in range(5):
        y = torch.empty_like(reference)
        exact.linear(x, data, None, y, fmt, fmt.planes, choice=Choice("split_k", tile, ""))
        results.append(y)
    slack = torch.finfo(x.dtype).eps * oracle.norm() / 2
    assert (results[0].double() - oracle).norm() <= 2 * (reference.double() - oracle).norm() + slack
    assert all(torch.equal(y, results[0]) for y in results[1:])


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0", "Q4_0", "Q5_1", "IQ4_NL", "MXFP4", "NVFP4"])
def test_loading_x_by_ldmatrix_only_changes_the_order_of_sums(name):
    """The opaque move (kernels/ldmatrix.py) changes which K a tensor-core product sums together: results differ by roundings."""
    fmt = FORMATS[name]
    data, weight = packed(name, 256, 6)
    x = torch.randn(300, 3072, device="cuda", dtype=torch.bfloat16)
    base = replace(fused_tile(fmt, 64, 256, 3072, None), num_stages=2)
    results = []
    for ldmatrix in (False, True):
        y = torch.empty(300, 256, device="cuda", dtype=x.dtype)
        exact.linear(x, data, None, y, fmt, fmt.planes, choice=Choice("fused", replace(base, ldmatrix=ldmatrix), ""))
        results.append(y)
    reordered = 3072 * 2**-24 * (x.abs().float() @ weight.abs().T).max()  # K float32 roundings of the largest partial sum
    torch.testing.assert_close(*results, rtol=torch.finfo(x.dtype).eps, atol=reordered.item())


def test_auto_chooses_triton_on_the_device_it_runs_on():
    linear = torch.nn.Linear(512, 64, bias=False)
    layer = fk.GGUFLinear.from_linear(linear, "Q8_0", backend="auto").cuda()
    y = layer(torch.randn(2, 512, device="cuda", dtype=torch.float16))
    assert y.shape == (2, 64)
    if torch.cuda.get_device_capability() >= (8, 0):
        assert "triton" in layer.extra_repr()
