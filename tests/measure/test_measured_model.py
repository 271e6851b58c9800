"""16-bit models of the user: files of every kind are the same model, and others are refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import flux_kernels as fk
from flux_kernels.errors import FormatError, GGUFError
from flux_kernels.measure.measured_model import find_source, open_transformer


def test_16_bit_files_of_every_kind_are_the_same_model(tmp_path):
    cpu = torch.device("cpu")
    expected, kind = open_transformer(find_source(), cpu, torch.float32)
    fk.save_gguf(expected.half(), tmp_path / "f16.gguf")
    tensors = {name: tensor.data for name, tensor in fk.read_gguf(tmp_path / "f16.gguf").tensors.items()}
    save_file(tensors, tmp_path / "bfl.safetensors")
    for source in (find_source(gguf=tmp_path / "f16.gguf"), find_source(model=tmp_path / "bfl.safetensors")):
        model, found = open_transformer(source, cpu, torch.float32)
        assert found == kind == "F16"
        got = dict(model.named_parameters())
        assert all(torch.equal(got[name], parameter.float()) for name, parameter in expected.named_parameters())
    del tensors["img_in.weight"]
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(GGUFError, match=r"short.safetensors: "):
        open_transformer(find_source(model=tmp_path / "short.safetensors"), cpu, torch.float32)
    fk.swap_linear(expected, "torch", format="Q8_0", include="*transformer_blocks.*")
    fk.save_gguf(expected, tmp_path / "q8.gguf")
    with pytest.raises(FormatError, match=r"is quantized \(Q8_0\)"):
        open_transformer(find_source(gguf=tmp_path / "q8.gguf"), cpu, torch.float32)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(GGUFError, match=r"no\.gguf does not exist"):
        find_source(gguf=tmp_path / "no.gguf")
    with pytest.raises(GGUFError, match="holds no model"):
        find_source(model=tmp_path)
    with pytest.raises(FormatError, match="not both"):
        find_source(gguf=tmp_path / "a", model=tmp_path / "b")
    with pytest.raises(FormatError, match="without a transformer"):
        find_source(base=tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_in_the_dtype_of_their_file_stay_mapped():
    """The memory check counts on it: FLUX.1-dev in bfloat16 on a CPU holds nothing but its file."""
    source = find_source()
    model, _ = open_transformer(source, torch.device("cpu"), torch.float16)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(source.files[0]) in line]
    ranges = [tuple(int(end, 16) for end in fields[0].split("-")) for fields in maps]
    # All but the halves of the last modulation, which change places.
    moved = {"norm_out.linear.weight", "norm_out.linear.bias"}
    for name, parameter in model.named_parameters():
        is_mapped = any(first <= parameter.data_ptr() < last for first, last in ranges)
        assert is_mapped or name in moved, name
