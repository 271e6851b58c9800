"""The torch decode of every format against oracles that do not know our layouts.

They are golden bytes, libggml and gguf-py.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from flux_kernels.formats import FORMATS, Packed
from flux_kernels.torch_backend import reference

from .. import libggml_oracle
from .bits import assert_same_bits

GOLDEN = Path(__file__).parents[1] / "golden"
MANIFEST = json.loads((GOLDEN / "manifest.json").read_text())
every_format = pytest.mark.parametrize("name", FORMATS)


@pytest.fixture
def libggml():
    """Return the libggml oracle, where its wheel exists for this machine."""
    pytest.importorskip("libggml", reason="libggml-python has no wheel for this machine")
    return libggml_oracle


def golden(name: str) -> dict[str, np.ndarray]:
    """Load a type's golden vectors."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def decoded(name: str, packed: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Decode packed rows with the library."""
    return reference.dequantize(Packed(torch.from_numpy(packed), FORMATS[name]), dtype)


def random_packed(name: str, rows: int, k: int, seed: int) -> np.ndarray:
    """Make uniformly random packed rows; the row size comes from the manifest, not from the library."""
    row_bytes = k // MANIFEST[name]["block_size"] * MANIFEST[name]["type_size"]
    return np.random.default_rng(seed).integers(0, 256, (rows, row_bytes), dtype=np.uint8)


@every_format
def test_golden_bytes(name):
    vectors = golden(name)
    pairs = [("q", "y"), ("random_q", "random_y"), ("q_importance", "y_importance")]
    checked = 0
    for packed, expected in pairs:
        if packed in vectors:
            assert_same_bits(decoded(name, vectors[packed]).numpy(), vectors[expected])
            checked += 1
    assert checked >= 2


@every_format
def test_random_bytes_against_libggml(name, libggml):
    """Random bytes reach every code, scale, subnormal, Inf and NaN; 64 * 2048 weights."""
    packed = random_packed(name, rows=64, k=2048, seed=FORMATS[name].ggml_type)
    assert_same_bits(decoded(name, packed).numpy(), libggml.dequantize(name, packed, 2048))


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith(("IQ1", "IQ2"))])
def test_quantized_weights_against_libggml(name, libggml):
    """Weights of many sizes decode as libggml decodes them, quantized by libggml.

    For IQ1 and IQ2 it builds tables for up to 20 s: the golden bytes serve those.
    """
    generator = np.random.default_rng(2)
    x = generator.standard_normal((12, 1024), dtype=np.float32) * np.logspace(-6, 3, 12, dtype=np.float32)[:, None]
    packed = libggml.quantize(name, x, generator.random(1024, dtype=np.float32))
    assert_same_bits(decoded(name, packed).numpy(), libggml.dequantize(name, packed, 1024))


@every_format
def test_error_on_gaussian_weights_is_bounded(name):
    """`relative_rms` bounds libggml's own quantizer, and is no idle bound.

    The gaussian golden row comes within a quarter of it.
    """
    vectors = golden(name)
    x, y = vectors["x"][0], decoded(name, vectors["q"])[0].numpy()
    rms = float(np.sqrt(np.mean((x - y) ** 2) / np.mean(x**2)))
    assert rms <= FORMATS[name].relative_rms <= 1.25 * rms


@every_format
def test_fresh_bytes_against_gguf_py(name):
    quants = pytest.importorskip("gguf.quants", reason="gguf-py is a test dependency")
    from gguf import GGMLQuantizationType

    if not hasattr(quants, name):
        pytest.skip(f"this gguf-py has no decode of {name}")
    packed = random_packed(name, rows=4, k=512, seed=7)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(packed, GGMLQuantizationType[name])
    assert_same_bits(decoded(name, packed).numpy(), expected.astype(np.float32))


@every_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_is_the_float32_value_rounded_once(name, dtype):
    vectors = golden(name)
    got, expected = decoded(name, vectors["q"], dtype), torch.from_numpy(vectors["y"]).to(dtype)
    assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


@every_format
def test_leading_dimensions_are_batch(name):
    packed = torch.from_numpy(golden(name)["q"])
    rows, row_bytes = packed.shape
    batched = reference.dequantize(Packed(packed.view(2, 3, rows // 6, row_bytes), FORMATS[name]))
    flat = reference.dequantize(Packed(packed, FORMATS[name]))
    assert torch.equal(batched, flat.view(2, 3, rows // 6, -1))
    assert torch.equal(reference.dequantize(Packed(packed[0], FORMATS[name])), flat[0])
    assert reference.dequantize(Packed(packed[:0], FORMATS[name])).shape == (0, flat.shape[1])


@every_format
def test_strided_and_odd_rows(name):
    """Rows that are slices of a wider buffer, from an even offset, decode like rows of their own.

    Row and column splits of a file make such rows.
    """
    fmt, packed = FORMATS[name], torch.from_numpy(golden(name)["q"])
    wide = torch.zeros(packed.shape[0], packed.shape[1] + 34, dtype=torch.uint8)
    wide[:, 2:-32] = packed
    assert torch.equal(reference.dequantize(Packed(wide[:, 2:-32], fmt)), reference.dequantize(Packed(packed, fmt)))
    assert torch.equal(
        reference.dequantize(Packed(wide[3:4, 2 : 2 + fmt.type_size], fmt)),
        reference.dequantize(Packed(packed[3:4, : fmt.type_size], fmt)),
    )


@every_format
def test_field_planes_decode_alike_and_are_undone(name):
    fmt, packed = FORMATS[name], torch.from_numpy(golden(name)["random_q"])
    planes = fmt.layout.to_planes(packed)
    assert planes.shape == packed.shape
    assert torch.equal(fmt.layout.from_planes(planes), packed)
    got = reference.dequantize(Packed(planes, fmt, True))
    assert_same_bits(got.numpy(), reference.dequantize(Packed(packed, fmt)).numpy())
    one_block = packed[:, : fmt.type_size]
    assert torch.equal(fmt.layout.to_planes(one_block), one_block)


@every_format
def test_decode_traces(name):
    """On fake tensors there is no data to branch on; the graph gives the same weights for other data."""
    fmt, vectors = FORMATS[name], golden(name)
    packed, other = torch.from_numpy(vectors["q"][:2]), torch.from_numpy(vectors["random_q"][:2])
    graph = make_fx(lambda data: reference.decode_rows(Packed(data, fmt)), tracing_mode="fake", _allow_non_fake_inputs=True)(
        packed
    )
    assert_same_bits(graph(other).numpy(), reference.decode_rows(Packed(other, fmt)).numpy())
