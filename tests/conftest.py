"""Share fixtures: packed weights with sane values, and a tiny Flux as diffusers loads it from GGUF."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch

# Before any kernel is decorated. Tests that compile start a process of their own, with TRITON_INTERPRET=0.
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "0":
    os.environ["TRITON_INTERPRET"] = "1"

from flux_kernels._triton import interpreting
from flux_kernels.formats import FORMATS, Packed, get_format

from .poisoned_memory import poisoned


@pytest.fixture(scope="session", autouse=True)
def triton_interpreter():
    """Mend the interpreter's bf16 arithmetic, and spare it repeated work, for the session."""
    if not interpreting():
        yield
        return
    from .bf16_interpreter import mend
    from .interpreter_speed import quicken

    with pytest.MonkeyPatch.context() as monkeypatch:
        mend(monkeypatch)
        quicken(monkeypatch)
        yield


_GUARDED, _POISONED = ("kernels", "torch_backend", "layers"), ("gpu",)


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """Poison every torch.empty of the tests of kernels, ops, layers and the torch backend.

    On a CPU it gets guards, too; see poisoned_memory.py.
    """
    folder, is_plain = request.path.parent.name, request.node.get_closest_marker("plain_memory")
    is_guarded = folder in _GUARDED or request.path.name.startswith("test_ops")
    if is_plain or not (is_guarded or folder in _POISONED):
        yield
        return
    with poisoned(("cpu",) if is_guarded else ()):
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Name the device kernels run on: the GPU where there is one, otherwise the CPU.

    On a CPU they run in Triton's interpreter.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


TINY_FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 256,
    "guidance_embeds": True,
    "axes_dims_rope": (8, 28, 28),
}
PACKED_TYPES = [name for name in ("Q4_K", "Q8_0", "Q5_0", "Q6_K") if name in FORMATS]  # the tiny model cycles through them


def random_packed(format: str, n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Make packed rows uint8 [n, row bytes] of random codes.

    The scales give the weights an RMS of 0.05.
    """
    fmt = get_format(format)
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (n, k // fmt.block_size, fmt.type_size), dtype=torch.uint8, generator=generator)

    def scaled(factor: float) -> torch.Tensor:
        for field in fmt.layout.fields:
            if field.dtype == "f16":
                start = fmt.layout.offsets[field.name]
                value = (1 + torch.arange(field.count) / 8).half() * factor
                data[..., start : start + field.size] = value.half().view(torch.uint8)
        return data.flatten(1)

    from flux_kernels.torch_backend import reference

    rms = reference.dequantize(Packed(scaled(0.01), fmt)).square().mean().sqrt()
    return scaled(0.01 * 0.05 / float(rms)).clone()


@pytest.fixture
def packed():
    """Return `random_packed`."""
    return random_packed


@pytest.fixture
def tiny_flux():
    """Build a FluxTransformer2DModel of 7 M parameters in float32.

    All block matrices have K % 256 == 0.
    """
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(**TINY_FLUX).eval()


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory):
    """Write a GGUF file of the tiny Flux under diffusers' names.

    Its block matrices are packed in several types.
    """
    gguf = pytest.importorskip("gguf")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**TINY_FLUX)
    folder = tmp_path_factory.mktemp("tiny_flux")
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", **TINY_FLUX}))
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "flux")
    for position, (name, value) in enumerate(model.state_dict().items()):
        if value.dim() == 2 and "transformer_blocks" in name:
            type_name = PACKED_TYPES[position % len(PACKED_TYPES)]
            data = random_packed(type_name, *value.shape, seed=position).numpy()
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[type_name])
        else:
            writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def load_stock(folder):
    """Load the tiny GGUF file with diffusers alone: its own GGUFLinear layers, float32 compute."""
    import diffusers

    return diffusers.FluxTransformer2DModel.from_single_file(
        str(folder / "tiny.gguf"),
        config=str(folder),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    ).eval()


@pytest.fixture
def stock_flux(tiny_gguf):
    """Load the tiny GGUF file with diffusers alone."""
    return load_stock(tiny_gguf)


@pytest.fixture(scope="session")
def _swapped_flux(tiny_gguf):
    import flux_kernels

    model = load_stock(tiny_gguf)
    flux_kernels.swap_linear(model)
    return model


@pytest.fixture
def swapped_flux(_swapped_flux):
    """Copy the tiny Flux that diffusers loaded from a GGUF file and swap_linear swapped."""
    return copy.deepcopy(_swapped_flux)


def flux_inputs(batch: int = 1, tokens: int = 16, text: int = 8, dtype: torch.dtype = torch.float32) -> dict:
    """Make the inputs of one forward of the tiny Flux."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    image_ids = torch.zeros(tokens, 3)
    image_ids[:, 2] = torch.arange(tokens)
    return {
        "hidden_states": normal(batch, tokens, 64),
        "encoder_hidden_states": normal(batch, text, 256),
        "pooled_projections": normal(batch, 256),
        "timestep": torch.full((batch,), 0.5, dtype=dtype),
        "guidance": torch.full((batch,), 3.5, dtype=dtype),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }
