"""Scales of weight rows are computed once and kept by the layer.

Launches are counted; results are unchanged and never stale.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import flux_kernels as fk
from flux_kernels import kernels, ops
from flux_kernels._triton import interpreting
from flux_kernels.formats import FORMATS, Packed
from flux_kernels.kernels import int8
from flux_kernels.kernels.choice import default_choice
from flux_kernels.kernels.launching import Launch
from flux_kernels.kernels.unpack_int8 import row_largest_kernel, row_scale_kernel, unpack_int8_kernel
from flux_kernels.layers import eager
from flux_kernels.layers import row_scale as layer_row_scale
from flux_kernels.layers.fused_linear import FusedPart, join_layers
from flux_kernels.torch_backend import low_precision

from .samples import finite_rows

pytestmark = pytest.mark.skipif(not interpreting(), reason="kernels are interpreted only where there is no GPU")
N, K = 24, 512
OP = torch.ops.flux_kernels.linear
Q4_K = FORMATS["Q4_K"]


@pytest.fixture(autouse=True)
def rows_have_one_scale(monkeypatch):
    """Choose as a card does that gives each row one scale."""
    choice = default_choice("int8", Q4_K, 32, N, K, (9, 0))
    assert choice.algorithm == "row_scales"
    monkeypatch.setattr(kernels, "choose", lambda *call: choice)
    eager.prepared.cache_clear()
    yield
    eager.prepared.cache_clear()


@pytest.fixture
def launched(monkeypatch) -> list:
    """Collect the kernels that are launched."""
    launched, original = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda self, *given: launched.append(self.kernel) or original(self, *given))
    return launched


def packed(seed: int = 0) -> torch.Tensor:
    return finite_rows("Q4_K", N + seed)[0][seed:].clone()


def layer(seed: int = 0, compute: str = "int8") -> fk.GGUFLinear:
    return fk.GGUFLinear.from_packed(packed(seed), "Q4_K", torch.randn(N), backend="triton", compute=compute)


def found_anew(made: fk.GGUFLinear) -> torch.Tensor:
    return int8.row_scale(Packed(made.qweight.detach(), Q4_K))


X = torch.randn(17, K, generator=torch.Generator().manual_seed(0))


def test_row_scales_are_those_of_the_twin_nan_where_a_row_holds_nan_or_inf():
    data = packed()
    data[3, 0:2], data[5, 144:146] = torch.tensor([0, 0x7C], dtype=torch.uint8), torch.tensor([1, 0x7E], dtype=torch.uint8)
    scale = kernels.row_scale(Packed(data, Q4_K), "int8")
    weight = fk.dequantize(data, "Q4_K")
    assert torch.equal(scale.isnan().nonzero().flatten(), torch.tensor([3, 5]))
    twin = low_precision.quantize_groups(weight, K)[1].flatten()
    torch.testing.assert_close(scale, twin, rtol=0, atol=0, equal_nan=True)


def test_they_are_found_once_not_at_every_call(launched):
    made = layer()
    with torch.no_grad():
        results = [made(X) for _ in range(3)]
    assert launched.count(row_largest_kernel) == launched.count(row_scale_kernel) == 1
    assert launched.count(unpack_int8_kernel) == 3
    assert torch.equal(results[0], results[2])
    without = fk.linear(X, made.qweight, "Q4_K", made.bias, backend="triton", compute="int8")
    assert launched.count(row_largest_kernel) == 2
    assert torch.equal(results[0], without)


def test_chunks_of_a_weight_share_one_search(launched, monkeypatch):
    from dataclasses import replace

    whole = layer()
    with torch.no_grad():
        expected = whole(X)
    chunked = replace(kernels.choose(), rows=10)
    del launched[:]
    y = torch.empty(17, N)
    int8.linear(X, Packed(whole.qweight, Q4_K), whole.bias.detach(), y, choice=chunked)
    assert launched.count(row_largest_kernel) == 1 and launched.count(unpack_int8_kernel) == 3
    assert torch.equal(y, expected)


def test_the_op_takes_them_with_and_without_a_branch(launched):
    made = layer()
    scale = found_anew(made)
    hidden, up = torch.randn(17, 3), torch.randn(N, 3)
    arguments = (X, made.qweight, made.bias, "Q4_K", "triton", "int8", False)
    for branch in ((None, None), (hidden, up)):
        expected = OP(*arguments, *branch, None, None)
        del launched[:]
        assert torch.equal(OP(*arguments, *branch, None, None, scale), expected)
        assert row_largest_kernel not in launched
    with torch.autocast("cpu", torch.bfloat16):
        assert OP(*arguments, None, None, None, None, scale).dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [torch.ones(N + 1), torch.ones(N, dtype=torch.float16), torch.ones(N, device="meta")])
def test_the_op_refuses_what_does_not_fit(wrong):
    arguments = (X, packed(), None, "Q4_K", "triton", "int8", False)
    with pytest.raises(fk.FormatError, match=r"row scales must be float32 \[24\] on cpu"):
        OP(*arguments, None, None, None, None, wrong)


@pytest.mark.plain_memory
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    """The torch backend takes and ignores them."""
    x = torch.randn(17, K, requires_grad=requires_grad)
    arguments = (x, packed(), torch.zeros(N), "Q4_K", "torch", "int8", False)
    torch.library.opcheck(OP.default, (*arguments, None, None, None, None, torch.ones(N)))


def test_modes_cards_and_backends_that_need_none_keep_none(monkeypatch):
    assert layer(compute="exact")._kept_row_scale() is None
    on_torch = fk.GGUFLinear.from_packed(packed(), "Q4_K", backend="torch", compute="int8")
    assert on_torch._kept_row_scale() is None
    groups = default_choice("int8", Q4_K, 32, N, K, (8, 9))
    monkeypatch.setattr(kernels, "choose", lambda *call: groups)
    assert layer()._kept_row_scale() is None


def test_a_backend_that_cannot_run_here_says_so_at_the_call_not_when_the_layer_is_moved(monkeypatch):
    def refuse(*call):
        raise fk.BackendUnavailable("not here")

    monkeypatch.setattr(layer_row_scale.ops, "row_scale", refuse)
    assert layer().arrange().row_scale is None


CHANGES = {
    "assigned": lambda made: setattr(made, "qweight", nn.Parameter(packed(1), requires_grad=False)),
    "loaded in place": lambda made: made.load_state_dict(layer(1).state_dict()),
    "loaded by assignment": lambda made: made.load_state_dict(layer(1).state_dict(), assign=True),
    "copied into": lambda made: made.qweight.copy_(packed(1)),
    "replaced by a hook": lambda made: made._parameters.update(qweight=nn.Parameter(packed(1), requires_grad=False)),
    "data replaced": lambda made: setattr(made.qweight, "data", packed(1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_they_follow_the_rows(change):
    made = layer()
    with torch.no_grad():
        made(X)
        CHANGES[change](made)
        y = made(X)
    assert torch.equal(made.qweight, packed(1)) and not torch.equal(packed(1), packed())
    assert torch.equal(made.row_scale, found_anew(made))
    assert torch.equal(y, fk.linear(X, made.qweight, "Q4_K", made.bias, backend="triton", compute="int8"))


def test_rows_loaded_in_place_refill_the_same_memory_at_once():
    """A captured graph reads the scales at the address they had, as it does the rows."""
    made = layer()
    before = made._kept_row_scale()
    made.load_state_dict(layer(1).state_dict())
    assert made.row_scale is before and torch.equal(before, found_anew(made))


def test_they_stay_where_a_cast_is_refused():
    made = layer().arrange()
    before = made.row_scale
    with pytest.raises(fk.FormatError, match="stay uint8"):
        made.type(torch.float16)
    assert before is not None and made.row_scale is before and made._kept_row_scale() is before


def test_they_are_in_no_state_dict_and_stay_float32():
    made = layer().arrange()
    kept = made.row_scale.clone()
    assert "row_scale" not in made.state_dict()
    for cast in (made.half(), made.to(torch.bfloat16), made.float()):
        assert cast.row_scale.dtype == torch.float32 and torch.equal(cast.row_scale, kept)
    assert made.to("meta").row_scale is None


def test_copies_and_pickles_compute_the_same():
    made = layer().arrange()
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    copies = copy.deepcopy(made), pickle.loads(pickle.dumps(made)), torch.load(file, weights_only=False)
    with torch.no_grad():
        for again in copies:
            assert torch.equal(again(X), made(X)) and again.row_scale is not made.row_scale


def test_a_capture_makes_none_and_computes_them_inside(launched, monkeypatch):
    made = layer()
    monkeypatch.setattr(layer_row_scale, "_capturing", lambda device: True)
    with torch.no_grad():
        captured = made(X)
        assert made.row_scale is None and launched.count(row_largest_kernel) == 1
        monkeypatch.setattr(layer_row_scale, "_capturing", lambda device: False)
        assert torch.equal(made(X), captured) and made.row_scale is not None


def test_rows_that_torch_does_not_count_writes_to_keep_none():
    with torch.inference_mode():
        made = layer()
        y = made(X)
        assert made.row_scale is None
        assert torch.equal(y, fk.linear(X, made.qweight, "Q4_K", made.bias, backend="triton", compute="int8"))


def test_scales_made_in_inference_mode_can_be_refilled_outside():
    made = layer()
    with torch.inference_mode():
        made(X)
    made.load_state_dict(layer(1).state_dict())
    assert torch.equal(made.row_scale, found_anew(made))


def test_compilers_read_the_buffer_and_exported_programs_do_not():
    made = layer().arrange()
    seen = []

    def backend(graph, inputs):
        seen.extend(tensor for tensor in inputs if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32)
        return graph.forward

    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(made, backend=backend, fullgraph=True)(X)
        assert torch.equal(compiled, made(X))
    assert any(tensor.shape == (N,) and torch.equal(tensor, made.row_scale) for tensor in seen)
    exported = torch.export.export(made, (X,))
    (call,) = [node for node in exported.graph.nodes if node.target is OP.default]
    assert len(call.args) < 12 or call.args[11] is None


def fused() -> tuple[nn.Module, fk.GGUFLinear]:
    home = nn.Module()
    home.a, home.b = layer(), layer(1)
    whole = join_layers({"a": home.a, "b": home.b}, home)
    for rows in whole.parts:
        setattr(home, rows.path, FusedPart(whole, rows, getattr(home, rows.path)))
    return home, whole


def test_parts_of_a_fused_layer_share_its_scales(launched):
    home, whole = fused()
    assert torch.equal(whole.row_scale, found_anew(whole))
    del launched[:]
    with torch.no_grad():
        together, apart = whole(X), torch.cat([home.a(X), home.b(X)], -1)
    assert row_largest_kernel not in launched
    assert torch.equal(together, apart)
    separated = whole.separate(home.b)
    assert torch.equal(separated.row_scale, whole.row_scale[N:])


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_offloading_hooks_move_rows_and_results_stay(offload_buffers):
    accelerate = pytest.importorskip("accelerate")
    plain, model = layer(), nn.Sequential(layer())
    model[0].bias = plain.bias
    accelerate.cpu_offload(model, "cpu", offload_buffers=offload_buffers)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(X), plain(X))
    assert model[0].qweight.is_meta


def test_a_layer_keeps_scales_where_any_size_of_call_uses_them():
    """A record may choose scales of rows for some M alone."""
    asked = []
    with pytest.MonkeyPatch.context() as patched:
        groups, rows = (default_choice("int8", Q4_K, 32, N, K, card) for card in ((8, 9), (9, 0)))
        patched.setattr(kernels, "choose", lambda mode, fmt, m, *rest: asked.append(m) or (rows if m == 4096 else groups))
        assert ops.row_scale(Packed(packed(), Q4_K), "triton", "int8") is not None
    assert asked[-1] == 4096
