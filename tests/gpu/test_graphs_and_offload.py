"""What a GPU alone can show of compute modes and memory.

CUDA graphs, streams, no waits, streamed offload, page-locked memory.
"""

from __future__ import annotations

import copy

import pytest
import torch

import flux_kernels as fk
from flux_kernels import kernels
from flux_kernels.compute import COMPUTE_MODES
from flux_kernels.formats import FORMATS, Packed

from ..conftest import TINY_FLUX, flux_inputs
from .test_on_gpu import packed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,  # left out of bench.gpu_session, which has minutes for everything
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU in this machine"),
]
FORMAT_NAMES = ["Q4_K", "Q6_K", "Q8_0", "IQ4_XS"]  # IQ4_XS has a table
ROWS = [4, 300]  # with and without WEIGHT_ONLY_M


def call(name: str, m: int, compute: str):
    """Return a function that runs one product into a new tensor, warmed up, and its x."""
    fmt = FORMATS[name]
    data, _ = packed(name, 256, 4)
    x = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(256, device="cuda", dtype=torch.bfloat16)

    def run(x):
        return kernels.linear(x, Packed(data, fmt, fmt.planes), bias, compute)

    for _ in range(3):
        run(x)
    torch.cuda.synchronize()
    return run, x


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("compute", COMPUTE_MODES)
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_cuda_graph_replays_every_mode(name, compute, m):
    """A captured product, replayed with another x, equals the call itself, bit for bit."""
    run, x = call(name, m, compute)
    static = x.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(static)
    for _ in range(2):
        x = torch.randn_like(x)
        static.copy_(x)
        graph.replay()
        assert torch.equal(y, run(x))


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("compute", COMPUTE_MODES)
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_no_call_waits_for_the_device(name, compute, m):
    run, x = call(name, m, compute)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compute", COMPUTE_MODES)
def test_streams_share_no_scratch(compute):
    run, _ = call("Q4_K", 300, compute)
    inputs = [torch.randn(300 + i, 2048, device="cuda", dtype=torch.bfloat16) for i in range(6)]
    expected = [run(x) for x in inputs]
    torch.cuda.synchronize()
    results = []
    for x in inputs:
        with torch.cuda.stream(torch.cuda.Stream()):
            results.append([run(x) for _ in range(4)])
    torch.cuda.synchronize()
    assert all(torch.equal(y, e) for ys, e in zip(results, expected, strict=True) for y in ys)


# a whole tiny model


@pytest.fixture(scope="module")
def host_model():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**TINY_FLUX).eval().to(torch.bfloat16)
    fk.swap_linear(model, format={"*transformer_blocks*": "Q4_K"}, backend="triton")
    return model


def inputs(**sizes):
    made = flux_inputs(dtype=torch.bfloat16, **sizes)
    return {name: value.cuda() if torch.is_tensor(value) else value for name, value in made.items()}


@pytest.fixture(scope="module")
def expected(host_model):
    model = copy.deepcopy(host_model).cuda()
    with torch.no_grad():
        return model(**inputs(tokens=64, text=32))[0]


def assert_close(got, expected):
    """Compare at the size of bfloat16 rounding that a tiny model amplifies to some percent."""
    assert (got - expected).float().norm() <= 0.05 * expected.float().norm()


@pytest.mark.parametrize(("compute", "fused"), [("exact", False), ("fp16_accumulate", False), ("int8", True)])
def test_a_compiled_model_runs_as_cuda_graphs(host_model, compute, fused):
    model = copy.deepcopy(host_model).cuda()
    fk.swap_linear(model, backend="triton", compute=compute)
    if fused:
        fk.fuse_projections(model, "linear1")
    arguments = inputs(tokens=64, text=32)
    with torch.no_grad():
        want = model(**arguments)[0]
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):  # the first two record
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(**arguments)[0].clone()
    assert_close(got, want)


@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "page-locked"])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload_with_a_stream(host_model, expected, kind, pinned):
    model = copy.deepcopy(host_model)
    if pinned:
        assert fk.pin_memory(model) > 0
        assert all(parameter.is_pinned() for parameter in model.parameters())
    count = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(
        onload_device=torch.device("cuda"),
        offload_device=torch.device("cpu"),
        offload_type=kind,
        use_stream=True,
        low_cpu_mem_usage=pinned,
        **count,
    )
    with torch.no_grad():
        for _ in range(3):
            assert_close(model(**inputs(tokens=64, text=32))[0], expected)
    layer = model.single_transformer_blocks[0].proj_mlp
    assert layer.qweight.device.type == "cpu"


def test_sequential_and_model_offload(host_model, expected):
    accelerate = pytest.importorskip("accelerate")
    sequential = copy.deepcopy(host_model)
    accelerate.cpu_offload(sequential, execution_device=torch.device("cuda"))
    whole, hook = accelerate.cpu_offload_with_hook(copy.deepcopy(host_model), torch.device("cuda"))
    with torch.no_grad():
        assert_close(sequential(**inputs(tokens=64, text=32))[0], expected)
        assert_close(whole(**inputs(tokens=64, text=32))[0], expected)
    hook.offload()
    assert whole.single_transformer_blocks[0].proj_mlp.qweight.device.type == "cpu"
