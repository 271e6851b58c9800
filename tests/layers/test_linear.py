"""GGUFLinear: construction, the lazy weight, state dicts, moves and its refusals."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

import flux_kernels as fk
from flux_kernels.layers.lazy_weight import LazyWeight

N, K = 12, 512


@pytest.fixture
def data(packed):
    return packed("Q4_K", N, K)


@pytest.fixture
def layer(data):
    return fk.GGUFLinear.from_packed(data, "Q4_K", torch.randn(N))


@pytest.fixture
def decoded(data):
    return fk.dequantize(data, "Q4_K")


def test_from_packed_shares_the_bytes(layer, data):
    assert layer.qweight.data_ptr() == data.data_ptr()
    assert isinstance(layer, nn.Linear) and (layer.out_features, layer.in_features) == (N, K)
    assert {name for name, _ in layer.named_parameters()} == {"qweight", "bias"}


def test_from_linear_quantizes_and_keeps_bias_and_mode():
    linear = nn.Linear(K, N).eval()
    layer = fk.GGUFLinear.from_linear(linear, "Q8_0")
    assert layer.bias is linear.bias and layer.bias.requires_grad and not layer.training
    assert layer.compute_dtype == torch.float32
    error = (layer.dequantize().weight - linear.weight).square().mean().sqrt() / linear.weight.square().mean().sqrt()
    assert error < fk.FORMATS["Q8_0"].relative_rms


def test_dequantize_gives_an_equal_linear(layer, decoded):
    linear = layer.dequantize()
    assert type(linear) is nn.Linear and torch.equal(linear.weight, decoded) and linear.bias is layer.bias
    assert layer.dequantize(torch.bfloat16).bias.dtype == torch.bfloat16


@pytest.mark.parametrize("planes", [False, True])
def test_file_bytes_are_the_bytes_of_the_file(packed, planes):
    data, fmt = packed("Q8_0", N, K), fk.FORMATS["Q8_0"]
    stored = fmt.layout.to_planes(data) if planes else data
    layer = fk.GGUFLinear.from_packed(stored, "Q8_0", planes=planes, compute_dtype=torch.float32)
    assert torch.equal(layer.file_bytes(), data)
    x = torch.randn(2, K)
    torch.testing.assert_close(layer(x), x @ fk.dequantize(data, "Q8_0").T)


def test_the_weight_costs_nothing_to_ask_about(layer, monkeypatch):
    def decode(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(LazyWeight, "decode", decode)
    weight = layer.weight
    assert weight.shape == (N, K) and weight.dtype == torch.float32 and weight.device == layer.qweight.device
    assert weight.data.shape == weight.detach().shape == (N, K) and not weight.requires_grad
    assert weight.numel() == N * K and "Q4_K" in repr(weight)


def test_the_weight_decodes_when_computed_with(layer, decoded):
    x = torch.randn(3, K, requires_grad=True)
    for got, want in (
        (layer.weight + 0, decoded),
        (layer.weight.T @ torch.ones(N), decoded.T @ torch.ones(N)),
        (torch.cat([layer.weight.data, layer.weight.data]), torch.cat([decoded, decoded])),
        (nn.functional.linear(x, layer.weight), nn.functional.linear(x, decoded)),
        (layer.weight[2:4, :3], decoded[2:4, :3]),
        (torch.zeros(N, K).copy_(layer.weight), decoded),
        (layer.weight.to(torch.bfloat16), decoded.to(torch.bfloat16)),
        (copy.deepcopy(layer.weight), decoded),
    ):
        assert type(got) is torch.Tensor and torch.equal(got, want)
    nn.functional.linear(x, layer.weight).sum().backward()
    torch.testing.assert_close(x.grad, decoded.sum(0).expand(3, K))


def merge_as_peft_does(layer):
    layer.weight.data += 1


WRITES = {
    "add to data": lambda layer: layer.weight.data.add_(1),
    "merge as peft does": merge_as_peft_does,
    "assign data": lambda layer: setattr(layer.weight, "data", torch.zeros(N, K)),
    "copy": lambda layer: layer.weight.copy_(torch.zeros(N, K)),
    "zero": lambda layer: nn.init.zeros_(layer.weight),
    "set an element": lambda layer: layer.weight.__setitem__((0, 0), 1.0),
    "assign a parameter": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(N, K))),
    "out=": lambda layer: torch.add(torch.zeros(N, K), 1, out=layer.weight),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_the_weight_is_refused_and_says_what_to_do(layer, write):
    before = layer.qweight.clone()
    with pytest.raises(fk.FormatError, match=r"packed Q4_K and cannot be .*layer\.dequantize\(\)"):
        WRITES[write](layer)
    assert torch.equal(layer.qweight, before)


def test_casting_leaves_the_bytes_and_moves_the_compute_dtype(layer, data):
    layer.to(torch.float16)
    assert layer.qweight.dtype == torch.uint8 and torch.equal(layer.qweight, data)
    assert layer.compute_dtype == layer.weight.dtype == layer.bias.dtype == torch.float16
    layer.to(torch.float8_e4m3fn)
    assert layer.compute_dtype == torch.float16
    with pytest.raises(fk.FormatError, match="stay uint8"):
        layer.type(torch.float16)
    assert layer.to("meta").weight.device.type == "meta"


# state dicts


def test_the_state_dict_describes_itself(layer):
    state = layer.state_dict()
    assert state["weight"].tolist() == [12, N, K, 0] and set(state) == {"weight", "qweight", "bias"}


def test_a_meta_layer_takes_over_the_format(layer):
    empty = fk.GGUFLinear(K, N, format="Q8_0", device="meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert empty.format == "Q4_K"
    x = torch.randn(2, K)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("saved_as_planes", [False, True])
def test_rows_are_rearranged_on_loading(packed, saved_as_planes):
    data, layout = packed("Q8_0", N, K), fk.FORMATS["Q8_0"].layout
    stored = {False: data, True: layout.to_planes(data)}
    source = fk.GGUFLinear.from_packed(stored[saved_as_planes], "Q8_0", planes=saved_as_planes)
    target = fk.GGUFLinear.from_packed(torch.zeros_like(data), "Q8_0", planes=not saved_as_planes)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.qweight, stored[not saved_as_planes]) and torch.equal(target.file_bytes(), data)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([8, N, K, 0]), "is Q8_0, this layer holds Q4_K. Load into"),
        (torch.tensor([12, N, 256, 0]), r"is \[12, 256\], this layer is \[12, 512\]"),
        (torch.tensor([999, N, K, 0]), "unknown ggml type 999. Known: .*12 Q4_K"),
        (torch.zeros(N, K), "Load 16-bit weights before swap_linear"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(layer, weight, message):
    before = layer.qweight.clone()
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict({**layer.state_dict(), "weight": weight})
    assert torch.equal(layer.qweight, before)


def test_missing_keys_are_reported(layer):
    state = layer.state_dict()
    del state["weight"]
    with pytest.raises(RuntimeError, match='Missing key.*"weight"'):
        layer.load_state_dict(state)


# refusals and display


def test_shapes_that_do_not_fit_are_refused(data):
    with pytest.raises(fk.FormatError, match=r"bias must have shape \[12\], got \[13\]"):
        fk.GGUFLinear.from_packed(data, "Q4_K", torch.zeros(13))
    with pytest.raises(fk.FormatError, match=r"shape \[N, row bytes\]"):
        fk.GGUFLinear.from_packed(data[0], "Q4_K")
    with pytest.raises(fk.FormatError, match="Q4_K needs K % 256 == 0, got K=64"):
        fk.GGUFLinear(64, N, format="Q4_K")
    with pytest.raises(fk.FormatError, match="NaN or infinity"):
        linear = nn.Linear(K, N)
        linear.weight.data[3, 5] = torch.inf
        fk.GGUFLinear.from_linear(linear, "Q8_0")


def test_repr_says_what_runs(layer):
    assert "format=Q4_K, backend=auto (torch on cpu), compute=exact" in repr(layer)


def test_rows_are_rearranged_when_a_layer_is_moved(monkeypatch):
    """A layer gets field planes once where its backend wants them on the device it is moved to.

    It still computes the same.
    """
    layer = fk.GGUFLinear.from_linear(nn.Linear(64, 8), "Q8_0", backend="torch")
    file_order, x = layer.qweight.clone(), torch.randn(3, 64)
    before = layer(x)
    monkeypatch.setattr(sys.modules[fk.GGUFLinear.__module__], "wants_planes", lambda backend, device, fmt: True)
    layer.to("cpu")
    assert layer.planes and not torch.equal(layer.qweight, file_order)
    assert torch.equal(layer.file_bytes(), file_order)
    assert torch.equal(layer(x), before)
    rows = layer.qweight
    assert layer.to("cpu").qweight is rows
