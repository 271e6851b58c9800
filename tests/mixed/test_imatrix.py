"""Importance matrices: both formats of llama.cpp, against bytes made by hand and by gguf-py."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
import torch

from flux_kernels.errors import FormatError
from flux_kernels.mixed.imatrix import load_imatrix, save_imatrix

NAME = "double_blocks.0.img_attn.qkv.weight"


def legacy_bytes(calls=4, values=(4.0, 8.0, 0.0), tail=b""):
    """Make a legacy file of one tensor, as imatrix.cpp's save_imatrix_legacy lays it out."""
    name = NAME.encode()
    data = struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", calls, len(values))
    return data + np.array(values, "<f4").tobytes() + tail


def test_legacy_bytes_made_by_hand_are_read(tmp_path):
    path = tmp_path / "hand.dat"
    path.write_bytes(legacy_bytes(tail=struct.pack("<ii", 7, 4) + b"wiki"))
    assert {name: mean.tolist() for name, mean in load_imatrix(path).items()} == {NAME: [1.0, 2.0, 0.0]}


def test_a_tensor_that_was_never_called_counts_evenly(tmp_path):
    path = tmp_path / "never.dat"
    path.write_bytes(legacy_bytes(calls=0))
    assert load_imatrix(path)[NAME].tolist() == [1.0, 1.0, 1.0]


def test_the_legacy_writer_writes_those_bytes(tmp_path):
    path = tmp_path / "own.dat"
    save_imatrix(path, {NAME: (torch.tensor([4.0, 8.0, 0.0]), 4)}, datasets=["wiki"])
    assert path.read_bytes() == legacy_bytes(tail=struct.pack("<ii", 4, 4) + b"wiki")
    assert list(tmp_path.iterdir()) == [path]


def test_a_gguf_matrix_of_gguf_py_is_read(tmp_path):
    path = tmp_path / "oracle.gguf"
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a.txt"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor(f"model.diffusion_model.{NAME}.in_sum2", np.array([[3.0, 6.0]], np.float32))
    writer.add_tensor(f"model.diffusion_model.{NAME}.counts", np.array([[3.0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert load_imatrix(path)[NAME].tolist() == [1.0, 2.0]


def test_gguf_py_reads_what_we_write(tmp_path):
    path = tmp_path / "own.gguf"
    save_imatrix(path, {NAME: (torch.tensor([3.0, 6.0]), 3)}, datasets=["prompts.txt"])
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: (tensor.data.tolist(), tensor.shape.tolist()) for tensor in reader.tensors}
    assert tensors == {f"{NAME}.in_sum2": ([[3.0, 6.0]], [2, 1]), f"{NAME}.counts": ([[3.0]], [1, 1])}
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["prompts.txt"]
    assert reader.fields["imatrix.chunk_count"].contents() == 3


@pytest.mark.parametrize("suffix", ["dat", "gguf"])
def test_what_is_saved_is_loaded(tmp_path, suffix):
    generator = torch.Generator().manual_seed(0)
    sums = {f"blocks.{i}.weight": (torch.rand(512, generator=generator), 10**i) for i in (1, 5, 11)}
    save_imatrix(tmp_path / f"m.{suffix}", sums)
    loaded = load_imatrix(tmp_path / f"m.{suffix}")
    assert loaded.keys() == sums.keys()
    for name, (total, count) in sums.items():
        # float32 roundings: of the sum, of its rescaling where the count passes int32, of the count, of the quotient
        torch.testing.assert_close(loaded[name], total / count, rtol=4 * 2**-24, atol=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut short: 4 bytes wanted at byte 0, the file has 0"),
        (struct.pack("<i", -1), "is no importance matrix: it begins with"),
        (b"PK\x03\x04 something else", r"is no importance matrix: it begins with b'PK"),
        (legacy_bytes()[:-1], "cut short: 12 bytes wanted"),
        (legacy_bytes(values=(1.0, -1.0)), "negative, NaN or infinite"),
        (legacy_bytes(values=(1.0, float("nan"))), "negative, NaN or infinite"),
        (legacy_bytes(calls=-1), "calls of .* would be -1"),
    ],
)
def test_damaged_files_are_named(tmp_path, data, message):
    path = tmp_path / "bad.dat"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message):
        load_imatrix(path)


def test_a_model_is_no_importance_matrix(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_tensor(NAME, np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match="no importance matrix: no tensor ends in '.in_sum2'. Is it a model"):
        load_imatrix(path)


@pytest.mark.parametrize(
    ("total", "count", "message"),
    [
        (torch.ones(2, 2), 1, r"shape \[K\], got \[2, 2\]"),
        (torch.tensor([-1.0]), 1, "finite and non-negative"),
        (torch.tensor([float("inf")]), 1, "finite and non-negative"),
        (torch.ones(2), 0, "whole number from 1, got 0"),
    ],
)
def test_wrong_sums_are_refused_and_nothing_is_written(tmp_path, total, count, message):
    with pytest.raises(FormatError, match=message):
        save_imatrix(tmp_path / "m.dat", {NAME: (total, count)})
    assert not list(tmp_path.iterdir())
