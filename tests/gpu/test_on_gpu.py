"""What only a real GPU can show: `pytest -m gpu`.

Every type and kernel against float64, streams, graphs, devices, size, bits.

Shapes share K and the divisibility of M and N, which is all that Triton compiles for: the whole file launches few distinct kernels
(222, as the dry run counts them), which `bench.gpu_session.cache` compiles ahead.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import flux_kernels as fk
from flux_kernels import kernels
from flux_kernels.compute import COMPUTE_MODES, group_width
from flux_kernels.formats import FORMATS, Packed
from flux_kernels.kernels import exact, fp16_accumulate, int8
from flux_kernels.kernels.choice import Choice, choose
from flux_kernels.kernels.tiles import fused_tile
from flux_kernels.torch_backend.low_precision import linear_fp16_accumulate, linear_int8, quantize_groups

from ..kernels.samples import finite_rows, golden
from . import compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU in this machine"),
]
REPEATS = 6  # golden rows of 512 weights side by side: K = 3072, FLUX.1's width
K = 512 * REPEATS
SOME = ["Q4_K", "Q6_K", "Q8_0"]
# M, N: small M (padded columns and ragged rows, too), narrow, ragged, wide and two-stage on a Hopper
SHAPES = [
    (1, 256),
    (5, 70),
    (8, 256),
    (16, 256),
    (33, 70),
    (512, 256),
    (640, 256),
]
MANY = SHAPES[4:]  # rows for which the other modes are not exact mode
BF16 = torch.bfloat16


def packed(name: str, n: int, repeats: int = REPEATS) -> tuple[torch.Tensor, torch.Tensor]:
    """Return packed rows as the Triton backend stores them, and their float32 values, on the GPU."""
    fmt = FORMATS[name]
    data, weight = finite_rows(name, n, repeats)
    return (fmt.layout.to_planes(data) if fmt.planes else data).cuda(), weight.cuda()


def operands(name: str, m: int, n: int, dtype: torch.dtype = BF16):
    """Return x, packed rows, their values, a bias, and the float64 product of x and the weight in `dtype`."""
    data, weight = packed(name, n)
    generator = torch.Generator().manual_seed(m + n)
    x, bias = (torch.randn(*size, generator=generator).to("cuda", dtype) for size in ((m, K), (n,)))
    return x, data, weight, bias, x.double() @ weight.to(dtype).double().T + bias.double()


def exact_linear(name: str, x, data, bias, choice: Choice | None = None) -> torch.Tensor:
    """Compute in exact mode, with a choice of the caller's where there is one."""
    weight = Packed(data, FORMATS[name], FORMATS[name].planes)
    if choice is None:
        return kernels.linear(x, weight, bias, "exact")
    y = torch.empty(x.shape[0], data.shape[0], dtype=x.dtype, device=x.device)
    exact.linear(x, weight, bias, y, choice=choice)
    return y


@pytest.mark.parametrize("name", FORMATS)
def test_decode_is_bit_equal_to_libggml(name):
    fmt, vectors = FORMATS[name], golden(name)
    data = fmt.layout.to_planes(vectors["random_q"]) if fmt.planes else vectors["random_q"]
    got, expected = kernels.dequantize(Packed(data.cuda(), fmt, fmt.planes), torch.float32).cpu(), vectors["random_y"]
    finite = expected.isfinite()
    compare.same_bits(got[finite].view(torch.int32), expected[finite].view(torch.int32), name)
    compare.same_bits(got.isnan(), expected.isnan(), name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_linear_is_within_twice_the_error_of_cublas(name, shape):
    """The error is at most 2x that of torch's matmul on the decoded weight, plus half a rounding.

    Both against float64; the rounding is the output's.
    """
    x, data, weight, bias, oracle = operands(name, *shape)
    reference = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
    got = kernels.linear(x, Packed(data, FORMATS[name], FORMATS[name].planes), bias, "exact")
    compare.within(got, oracle, 2 * compare.error(reference, oracle), name)


@pytest.mark.parametrize(
    ("dtype", "m"), [(torch.float16, 1), (torch.float16, 512), *((torch.float32, m) for m in (1, 16, 640))]
)
@pytest.mark.parametrize("name", SOME)
def test_other_activation_dtypes(name, dtype, m):
    x, data, weight, bias, oracle = operands(name, m, 256, dtype)
    reference = torch.nn.functional.linear(x, weight.to(dtype), bias)
    got = kernels.linear(x, Packed(data, FORMATS[name], FORMATS[name].planes), bias, "exact")
    compare.within(got, oracle, 2 * compare.error(reference, oracle), name)


def int8_error(name: str, x, data, bias, oracle) -> float:
    """Return the error of the torch twin, with the scales that are coarser."""
    fmt = FORMATS[name]
    twins = (linear_int8(x, Packed(data, fmt, fmt.planes), bias, row_scales=rows) for rows in (False, True))
    return max(compare.error(twin, oracle) for twin in twins)


@pytest.mark.parametrize("shape", MANY, ids=str)
@pytest.mark.parametrize("name", SOME)
def test_int8_is_as_far_from_float64_as_its_twin(name, shape):
    """One code in some hundreds is one off: a fused multiply-add rounds a tie otherwise.

    That is far less than 5 % of the error.
    """
    x, data, _, bias, oracle = operands(name, *shape)
    got = kernels.linear(x, Packed(data, FORMATS[name], FORMATS[name].planes), bias, "int8")
    compare.within(got, oracle, 1.05 * int8_error(name, x, data, bias, oracle), name)


def fp16_linear(name: str, x, data, bias) -> torch.Tensor:
    """Compute with fp16 sums, also on cards for which the mode is refused because it is slow there."""
    fmt = FORMATS[name]
    y = torch.empty(x.shape[0], data.shape[0], dtype=x.dtype, device=x.device)
    choice = choose("fp16_accumulate", fmt, *y.shape, x.shape[1], x.device, x.dtype)
    fp16_accumulate.linear(x, Packed(data, fmt, fmt.planes), bias, y, choice=choice)
    return y


@pytest.mark.parametrize("shape", MANY, ids=str)
@pytest.mark.parametrize("name", SOME)
def test_fp16_accumulate_is_as_far_from_float64_as_its_twin(name, shape):
    """Twice, because the order in which tensor cores sum products of 16 along K is not documented."""
    x, data, _, bias, oracle = operands(name, *shape)
    twin = linear_fp16_accumulate(x, Packed(data, FORMATS[name], FORMATS[name].planes), bias)
    compare.within(fp16_linear(name, x, data, bias), oracle, 2 * compare.error(twin, oracle), name)


def test_activations_are_quantized_as_by_the_twin():
    """Bit for bit: a code is one fused multiply-add, and the only division is IEEE's."""
    x, group = torch.randn(640, K, generator=torch.Generator().manual_seed(1)).to("cuda", BF16), group_width(K)
    codes, scale = int8.quantize_activation(x, group)
    twin, twin_scale = quantize_groups(x, group)
    compare.same_bits(codes, twin.flatten(1).to(torch.int8), "codes")
    compare.same_bits(scale.T.contiguous(), twin_scale.squeeze(-1), "scales")


@pytest.mark.parametrize("name", SOME)
def test_weights_are_unpacked_to_int8_as_by_the_twin(name):
    fmt, group = FORMATS[name], group_width(K)
    data, weight = packed(name, 256)
    codes, _ = int8.unpack_weight(Packed(data, fmt, fmt.planes), group)
    compare.same_bits(codes, quantize_groups(weight, group)[0].flatten(1).to(torch.int8), name)


@pytest.mark.parametrize("m", [1, 33, 640])
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_a_layer_computes_what_the_op_does(compute, m):
    """The way past the dispatcher gives the same numbers, with kept row scales and prepared launches.

    Called twice, captured, replayed, after a load in place.
    """
    fmt = FORMATS["Q4_K"]
    x, data, _, bias, _ = operands("Q4_K", m, 256)
    other = packed("Q4_K", 512)[0][256:].contiguous()
    layer = fk.GGUFLinear.from_packed(data.clone(), "Q4_K", bias, planes=fmt.planes, backend="triton", compute=compute)
    op = lambda rows: torch.ops.flux_kernels.linear(x, rows, bias, "Q4_K", "triton", compute, fmt.planes)
    with torch.no_grad():
        compare.same_bits(layer(x), op(data), "first call")
        compare.same_bits(layer(x), op(data), "second call")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
        compare.same_bits(y, op(data), "replay")
        layer.qweight.copy_(other)
        compare.same_bits(layer(x), op(other), "after a load in place")
        graph.replay()
        compare.same_bits(y, op(other), "replay after a load in place")


@pytest.mark.parametrize(("compute", "m"), [("exact", 8), ("exact", 512), ("int8", 640)])
def test_a_product_repeats_its_bits(compute, m):
    """A hundred calls at N = 3072 give the same bits.

    What races, or reads before it may (Triton 3.6 on Hopper lacks a fence), shows by chance alone.
    """
    fmt = FORMATS["Q4_K"]
    x, data, _, bias, _ = operands("Q4_K", m, 3072)
    first = kernels.linear(x, Packed(data, fmt, fmt.planes), bias, compute)
    for turn in range(100):
        compare.same_bits(kernels.linear(x, Packed(data, fmt, fmt.planes), bias, compute), first, f"turn {turn}")


@pytest.mark.parametrize("m", [1, 512, 640])
@pytest.mark.parametrize("compute", COMPUTE_MODES)
def test_a_cuda_graph_replays_every_mode(compute, m):
    """A captured product, replayed with another x, equals the call itself, bit for bit."""
    x, data, _, bias, _ = operands("Q6_K", m, 256)
    fmt = FORMATS["Q6_K"]

    def call() -> torch.Tensor:
        if compute == "fp16_accumulate" and m > 16:
            return fp16_linear("Q6_K", x, data, bias)
        return kernels.linear(x, Packed(data, fmt, fmt.planes), bias, "exact" if m == 1 else compute)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    x.copy_(torch.randn_like(x))
    graph.replay()
    compare.same_bits(y, call(), compute)


@pytest.mark.parametrize("compute", COMPUTE_MODES)
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("card", ["RTX 3090", "RTX 4090"])
def test_code_for_geforce_runs_here_through_its_ptx(card, name, compute):
    """The driver translates the PTX of other cards, and their kernels are right against float64.

    Their choices, tiles and decoders are used.
    """
    pytest.importorskip("triton", reason="the code is compiled here")
    from bench.stand_in import CARDS
    from bench.stand_in_ptx import compiled_for

    if torch.cuda.get_device_capability() < CARDS[card].capability:
        pytest.skip("an older GPU cannot run code for a newer one")
    x, data, weight, bias, oracle = operands(name, 256, 256)  # fewer rows than those from which such cards unpack
    fmt = FORMATS[name]
    if compute == "exact":
        allowed = 2 * compare.error(torch.nn.functional.linear(x, weight.to(x.dtype), bias), oracle)
    elif compute == "int8":
        allowed = 1.05 * int8_error(name, x, data, bias, oracle)
    else:
        allowed = 2 * compare.error(linear_fp16_accumulate(x, Packed(data, fmt, fmt.planes), bias), oracle)
    with compiled_for(CARDS[card]):
        got = kernels.linear(x, Packed(data, fmt, fmt.planes), bias, compute)
    torch.cuda.synchronize()
    compare.within(got, oracle, allowed, f"{card} {name} {compute}")


@pytest.mark.parametrize("name", SOME)
def test_identity_gives_the_weight(name):
    data, weight = packed(name, 256)
    rows = torch.eye(K, dtype=BF16, device="cuda")[:512]
    got = kernels.linear(rows, Packed(data, FORMATS[name], FORMATS[name].planes), None, "exact")
    compare.same_bits(got, weight.to(BF16).T[:512], name)


def test_several_streams_do_not_disturb_each_other():
    fmt = FORMATS["Q4_K"]
    data, _ = packed("Q4_K", 256)
    inputs = [torch.randn(512 + 16 * i, K, device="cuda").to(BF16) for i in range(8)]

    def call(x):
        return kernels.linear(x, Packed(data, fmt, fmt.planes), None, "exact")

    expected = [call(x) for x in inputs]
    torch.cuda.synchronize()
    results = []
    for x in inputs:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append([call(x) for _ in range(4)])
    torch.cuda.synchronize()
    for ys, one in zip(results, expected, strict=True):
        for y in ys:
            compare.same_bits(y, one)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_than_the_current_device():
    data, weight = packed("Q8_0", 32)
    x = torch.randn(3, K, device="cuda:1")
    got = kernels.linear(x, Packed(data.to("cuda:1"), FORMATS["Q8_0"], True), None, "exact")
    torch.testing.assert_close(got.cpu(), x.cpu() @ weight.cpu().T, rtol=1e-5, atol=1e-4)


def test_more_than_2_to_the_31_weights():
    """Row offsets pass 2^31 bytes and output offsets 2^31 elements: the last rows are still right."""
    fmt, n = FORMATS["Q8_0"], 700_000
    if torch.cuda.get_device_properties(0).total_memory < 16 << 30:
        pytest.skip("needs 16 GB of GPU memory")
    data = torch.empty(n, fmt.row_bytes(K), dtype=torch.uint8, device="cuda").random_(0, 120)  # of scales, finite halves
    x = torch.randn(16, K, device="cuda").to(BF16)
    last = data[-256:].clone()
    got = kernels.linear(x, Packed(data, fmt, True), None, "exact")
    compare.same_bits(got[:, -256:], kernels.linear(x, Packed(last, fmt, True), None, "exact"), "product")
    weights = kernels.dequantize(Packed(data, fmt, True), BF16)
    compare.same_bits(weights[-256:], kernels.dequantize(Packed(last, fmt, True), BF16), "weights")


@pytest.mark.parametrize("m", [1, 16, 640])
@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_same_bits_on_every_run(name, m):
    x, data, _, bias, _ = operands(name, m, 256)
    first = exact_linear(name, x, data, bias)
    for _ in range(10):
        compare.same_bits(exact_linear(name, x, data, bias), first, name)


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["exact", "int8"])
def test_out_of_memory_leaves_a_usable_layer(compute):
    """A call that finds no memory for its result raises torch's error.

    The next call with memory gives the same bits.
    """
    data, _ = packed("Q4_K", 4096)
    x = torch.randn(20_000, K, device="cuda", dtype=torch.float16)
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


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_split_k_is_right_and_repeats(name):
    """Programs that share K: within twice the error of cuBLAS, and the same bits on every run."""
    x, data, weight, bias, oracle = operands(name, 512, 256)
    tile = replace(fused_tile(FORMATS[name], 512, 256, K, torch.cuda.get_device_capability()), splits=2)
    results = [exact_linear(name, x, data, bias, Choice("split_k", tile, "")) for _ in range(4)]
    reference = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
    compare.within(results[0], oracle, 2 * compare.error(reference, oracle), name)
    for y in results[1:]:
        compare.same_bits(y, results[0], name)


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
def test_loading_x_by_ldmatrix_only_changes_the_order_of_sums(name):
    """The opaque move changes which K a tensor-core product sums together.

    Results differ by roundings (kernels/ldmatrix.py).
    """
    x, data, weight, _, _ = operands(name, 512, 256)
    base = replace(fused_tile(FORMATS[name], 64, 256, K, None), num_stages=2)
    results = [
        exact_linear(name, x, data, None, Choice("fused", replace(base, ldmatrix=ldmatrix), "")) for ldmatrix in (False, True)
    ]
    reordered = K * 2**-24 * (x.abs().float() @ weight.abs().T).max()  # K float32 roundings of the largest partial sum
    off = (results[0].float() - results[1].float()).abs() - torch.finfo(BF16).eps * results[0].float().abs()
    compare.right(bool(off.max() <= reordered), f"{name}: {off.max().item():.3g} apart, {reordered.item():.3g} explained")


@pytest.mark.slow  # bench.gpu_session runs it under compute-sanitizer
@pytest.mark.parametrize("m", [1, 16, 512])
def test_racecheck_sample(m):
    x, data, weight, bias, oracle = operands("Q4_K", m, 256)
    reference = torch.nn.functional.linear(x, weight.to(x.dtype), bias)
    compare.within(exact_linear("Q4_K", x, data, bias), oracle, 2 * compare.error(reference, oracle))


def test_auto_chooses_triton_on_the_device_it_runs_on():
    linear = torch.nn.Linear(K, 256, bias=False)
    layer = fk.GGUFLinear.from_linear(linear, "Q8_0", backend="auto").cuda()
    y = layer(torch.randn(1, K, device="cuda").to(BF16))
    compare.right(y.shape == (1, 256), "shape")
    if torch.cuda.get_device_capability() >= (8, 0):
        compare.right("triton" in layer.extra_repr(), layer.extra_repr())
