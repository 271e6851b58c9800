"""Where packed bytes live: moves and offloading neither decode nor copy them.

Loading maps them, processes share them.

Sequential and group offloading, copies and state dicts as such are in test_operations_table.py; here is what they cost.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flux_kernels as fk

from ..conftest import TINY_FLUX, flux_inputs

diffusers = pytest.importorskip("diffusers")
accelerate = pytest.importorskip("accelerate")

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class CountOps(TorchDispatchMode):
    """Count calls of the library's ops, and remember every result that holds bytes."""

    def __init__(self):
        super().__init__()
        self.decodes = self.products = 0
        self.byte_results: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.decodes += func is torch.ops.flux_kernels.dequantize.default
        self.products += func is torch.ops.flux_kernels.linear.default
        if isinstance(result, torch.Tensor) and result.dtype == torch.uint8 and not result.is_meta:
            self.byte_results.add(result.data_ptr())
        return result


@pytest.fixture(scope="module")
def packed_flux():
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**TINY_FLUX).eval()
    fk.swap_linear(model, format={"*transformer_blocks*": "Q4_K"})
    return model


@pytest.fixture
def model(packed_flux):
    return copy.deepcopy(packed_flux)


@pytest.fixture(scope="module")
def expected(packed_flux):
    return run(packed_flux)


def run(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**flux_inputs())[0]


def addresses(model) -> dict[str, int]:
    """Return where the packed rows of each layer lie; offloaded ones lie nowhere (0)."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, fk.GGUFLinear)}
    return {name: 0 if layer.qweight.is_meta else layer.qweight.data_ptr() for name, layer in layers.items()}


def offload_model(model):
    return accelerate.cpu_offload_with_hook(model, CPU)[1].offload()


def offload_sequentially(model):
    accelerate.cpu_offload(model, execution_device=CPU)


def offload_groups(model, **options):
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level", **options)


MOVES = {
    "to the device it is on": lambda model: model.to("cpu"),
    "to another dtype and back": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "half and float": lambda model: model.half().float(),
    "swap_linear again": lambda model: fk.swap_linear(model, compute="int8") and fk.swap_linear(model),
    "state_dict and back": lambda model: model.load_state_dict(model.state_dict(), assign=True),
    "eval and train": lambda model: model.train().eval(),
    "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "model offload": offload_model,
    "group offload": offload_groups,
    "layerwise casting": lambda model: model.enable_layerwise_casting(torch.float16, torch.float32),
    "dispatch": lambda model: accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True),
}


@pytest.mark.parametrize("move", MOVES)
def test_moves_neither_decode_nor_copy(model, move):
    before = addresses(model)
    with CountOps() as counted:
        MOVES[move](model)
        assert counted.decodes == 0 and counted.products == 0
        run(model)
    assert counted.decodes == 0 and counted.products == len(before), "one product a layer, nothing decoded beside it"
    assert addresses(model) == before


def test_sequential_offload_keeps_the_rows_where_they_were(model, expected):
    """The hooks keep the original tensors, and each product sees those.

    They are not copied on the device they are on.
    """
    before = set(addresses(model).values())
    with CountOps() as counted:
        offload_sequentially(model)
        result = run(model)
    assert counted.decodes == 0 and counted.byte_results <= before
    assert set(addresses(model).values()) == {0}
    torch.testing.assert_close(result, expected, **CLOSE)


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_a_device_map_over_cpu_and_disk(model, expected, tmp_path, fused):
    if fused:
        fk.fuse_projections(model, "linear1")
    places = {name: "disk" if name.startswith("single") else "cpu" for name, _ in model.named_children()}
    accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.single_transformer_blocks[0].proj_out.qweight.is_meta and any(tmp_path.iterdir())
    with CountOps() as counted:
        torch.testing.assert_close(run(model), expected, **CLOSE)
    assert counted.decodes == 0


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload_to_disk(model, expected, tmp_path, kind):
    count = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    options = dict(onload_device=CPU, offload_device=CPU, offload_type=kind, offload_to_disk_path=str(tmp_path), **count)
    model.enable_group_offload(**options)
    assert list(tmp_path.glob("*.safetensors"))
    for _ in range(2):
        torch.testing.assert_close(run(model), expected, **CLOSE)


def test_copies_copy_the_bytes_once_and_decode_nothing(model):
    with CountOps() as counted:
        clone = copy.deepcopy(model)
    assert counted.decodes == 0
    assert not set(addresses(clone).values()) & set(addresses(model).values())
    assert fk.memory_footprint(clone) == fk.memory_footprint(model)


def test_a_model_on_meta_has_no_bytes_and_gets_them_by_assignment(model, expected):
    state = model.state_dict()
    empty = copy.deepcopy(model).to("meta")
    assert set(addresses(empty).values()) == {0}
    empty.load_state_dict(state, assign=True)
    assert addresses(empty) == addresses(model)
    assert torch.equal(run(empty), expected)


CHILD_WRITES = """
import sys, torch, torch.multiprocessing as mp

def work(model, x, y):
    with torch.no_grad():
        y.copy_(model(x))
        model[0].qweight.data.zero_()

if __name__ == "__main__":
    import flux_kernels as fk
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 32))
    fk.swap_linear(model, format="Q4_K")
    model.share_memory()
    x = torch.randn(4, 256)
    with torch.no_grad():
        expected = model(x)
    y = torch.zeros_like(expected).share_memory_()
    child = mp.get_context("spawn").Process(target=work, args=(model, x, y))
    child.start()
    child.join()
    assert torch.equal(y, expected), "the other process computes something else"
    assert model[0].qweight.count_nonzero() == 0, "the rows were copied for the other process"
"""


def test_processes_share_one_copy_of_the_rows(tmp_path):
    script = tmp_path / "share.py"
    script.write_text(CHILD_WRITES)
    environment = {**os.environ, "PYTHONPATH": str(Path(fk.__file__).parents[1])}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr


# Loading. Memory of a process that is not backed by a file: what loading and saving cost beside the page cache.

MEASURE = """
import json, sys, threading, time
root, small, wide, again = sys.argv[1:]
sys.path.insert(0, root)
import torch
import flux_kernels as fk

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))

class Watch(threading.Thread):
    def __enter__(self):
        self.before = self.peak = anonymous()
        self.watching = True
        self.start()
        return self
    def run(self):
        while self.watching:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.0005)
    def __exit__(self, *_):
        self.watching = False
        self.join()
        self.final = anonymous() - self.before
        self.peak = max(self.peak - self.before, self.final)

model = fk.load_flux(small)  # imports, and what is allocated once
fk.save_gguf(model, again)
peaks = {}
for name, work in {
    "load": lambda: fk.load_flux(wide),
    "load fused": lambda: fk.load_flux(wide, fuse="linear1"),
    "load in float32": lambda: fk.load_flux(wide, dtype=torch.float32),
    "save": lambda: fk.save_gguf(model, again),
}.items():
    with Watch() as watch:
        model = work() or model
    peaks[name] = (watch.peak, watch.final)
    if name != "load in float32":
        model = None
print(json.dumps(peaks))
"""
SLACK = 12 << 20  # bytes: 500 modules, Python objects, arenas of the allocator


@dataclass(frozen=True)
class Wide:
    """Hold what is known about a file and what was measured with it, in bytes."""

    path: Path
    again: Path
    largest: int
    plain: int
    measured: dict[str, tuple[int, int]]


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Wide:
    """Write a double and a single block at the true width; measure in a process.

    Q4_K with F32 embedders, zeros throughout.
    """
    gguf = pytest.importorskip("gguf")
    import numpy as np

    from ..flux_files import Architecture

    if sys.platform != "linux":
        pytest.skip("reads /proc/self/status")
    folder = tmp_path_factory.mktemp("wide")
    sizes = {True: [0], False: [0]}
    for name, width in (("small.gguf", 256), ("wide.gguf", 3072)):
        writer = gguf.GGUFWriter(folder / name, "flux")
        for tensor, shape in Architecture(width=width, head=128 if width > 256 else 64, text=width).bfl_shapes().items():
            packed = len(shape) == 2 and "blocks" in tensor
            rows = (*shape[:-1], shape[-1] // 256 * 144) if packed else shape
            data = np.zeros(rows, np.uint8 if packed else np.float32)
            kind = gguf.GGMLQuantizationType.Q4_K if packed else gguf.GGMLQuantizationType.F32
            writer.add_tensor(tensor, data, raw_dtype=kind)
            sizes[packed].append(data.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    files = [str(folder / name) for name in ("small.gguf", "wide.gguf", "again.gguf")]
    command = [sys.executable, "-c", MEASURE, str(Path(fk.__file__).parents[1]), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    largest, plain = max(map(max, sizes.values())), sum(sizes[False])
    return Wide(Path(files[1]), Path(files[2]), largest, plain, json.loads(done.stdout))


@pytest.mark.parametrize("how", ["load", "load fused"])
def test_loading_peaks_below_twice_the_largest_tensor(wide, how):
    """270 MB of packed rows are loaded, apart or fused, and none is in memory of the process.

    Plain F32 becomes bfloat16.
    """
    assert wide.path.stat().st_size > 300 << 20
    peak, final = wide.measured[how]
    assert final < wide.plain / 2 + SLACK
    assert peak < wide.plain / 2 + 2 * wide.largest + SLACK


def test_loading_what_needs_no_cast_takes_no_memory_at_all(wide):
    peak, final = wide.measured["load in float32"]
    swapped_halves = 6144 * 3072 * 4  # final_layer.adaLN_modulation.1, whose rows change order
    assert final < swapped_halves + SLACK and peak < 2 * wide.largest + SLACK


def test_saving_a_mapped_model_peaks_below_twice_the_largest_tensor(wide):
    peak, _ = wide.measured["save"]
    assert peak < 2 * wide.largest + SLACK
    written, read = fk.read_gguf(wide.again).tensors, fk.read_gguf(wide.path).tensors
    assert {name: (tensor.format, tensor.shape) for name, tensor in written.items()} == {
        name: (tensor.format, tensor.shape) for name, tensor in read.items()
    }


def test_pinning_without_a_gpu_is_refused_with_a_sentence(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = addresses(model)
    with pytest.raises(fk.BackendUnavailable, match="torch sees no CUDA GPU here. Leave pin_memory out"):
        fk.pin_memory(model)
    assert addresses(model) == before


def test_pinning_replaces_every_host_tensor_once(model, monkeypatch):
    """Parameters stay the same objects, and shared ones are pinned once.

    With a stand-in for page-locked memory.
    """
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append(tensor.nbytes) or tensor.clone())
    monkeypatch.setattr(fk.GGUFLinear, "arrange", lambda layer: layer)
    model.single_transformer_blocks[0].proj_out.bias = model.single_transformer_blocks[1].proj_out.bias
    parameters = list(model.parameters())
    held = sum(tensor.nbytes for tensor in [*parameters, *model.buffers()])
    assert fk.pin_memory(model) == sum(calls) == held
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model.proj_out.weight, nn.Parameter)
