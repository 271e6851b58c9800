"""The writer: the bytes gguf-py writes, and bit-exact round trips.

It takes one tensor at a time, and leaves nothing behind where it fails.
"""

from __future__ import annotations

import gc
import math
import os
import struct
import weakref

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flux_kernels.errors import GGUFError
from flux_kernels.formats import FORMATS, PLAIN_TYPES
from flux_kernels.gguf.file import planned_size, read_gguf, write_gguf

from .. import gguf_bytes as raw

# Fixtures are shared by examples on purpose, and drawing them is slow where the machine is busy.
HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
ALL_TYPES = {**PLAIN_TYPES, **FORMATS}
ONE = ("x", "F32", (8,), torch.arange(8.0))


def content(name: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random stored data of a type, as GGUFTensor.data gives it."""
    row = ALL_TYPES[name]
    generator = torch.Generator().manual_seed(seed)
    nbytes = math.prod(shape) // row.block_size * row.type_size
    data = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
    if name in PLAIN_TYPES:
        return data.view(row.dtype).view(shape)
    return data.view(*shape[:-1], shape[-1] // row.block_size * row.type_size)


def copied(file, path, **options):
    """Write a read file again."""
    write_gguf(
        path, [(t.name, t.format, t.shape, lambda t=t: t.data) for t in file.tensors.values()], file.typed_metadata, **options
    )


def gguf_py_file(path, types=("F32", "F16", "BF16", "Q8_0", "Q4_K"), alignment: int | None = None) -> None:
    """Write a file with gguf-py: every kind of value, one tensor [3, 512] a type."""
    writer = gguf.GGUFWriter(path, "flux")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_uint32("general.quantization_version", 2)
    for kind, value in (("UINT8", 255), ("INT8", -128), ("UINT16", 2**16 - 1), ("INT16", -(2**15)), ("INT32", -(2**31))):
        writer.add_key_value(f"a.{kind.lower()}", value, gguf.GGUFValueType[kind])
    for kind, value in (("UINT64", 2**64 - 1), ("INT64", -(2**63)), ("FLOAT32", 0.1), ("FLOAT64", 0.1), ("BOOL", True)):
        writer.add_key_value(f"a.{kind.lower()}", value, gguf.GGUFValueType[kind])
        writer.add_key_value(f"b.{kind.lower()}", [value, value], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[kind])
    writer.add_string("a.string", "naïve\n\0 ü")
    writer.add_array("b.strings", ["", "x", "ü" * 100])
    writer.add_key_value("c.nested", [[1, 2], [3]], gguf.GGUFValueType.ARRAY)
    rng = np.random.default_rng(0)
    for kind in types:
        type_bytes = 512 // ALL_TYPES[kind].block_size * ALL_TYPES[kind].type_size
        data = rng.integers(0, 256, (3, type_bytes), dtype=np.uint8)
        writer.add_tensor(f"{kind}.weight", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alignment", [None, 8, 64])
def test_a_file_of_gguf_py_is_written_again_byte_for_byte(tmp_path, alignment):
    known = {kind.name for kind in gguf.GGMLQuantizationType}
    gguf_py_file(tmp_path / "theirs.gguf", [name for name in ALL_TYPES if name in known], alignment)
    file = read_gguf(tmp_path / "theirs.gguf")
    copied(file, tmp_path / "ours.gguf")
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()
    specs = [(t.name, t.format, t.shape) for t in file.tensors.values()]
    assert planned_size(specs, file.typed_metadata) == file.size


def test_gguf_py_reads_what_we_write(tmp_path):
    path = tmp_path / "ours.gguf"
    data = {name: content(name, (3, 512)) for name in ("Q4_K", "Q8_0", "F16")}
    metadata = {"general.architecture": ("STRING", "flux"), "k": ("ARRAY[INT32]", [3072, 64]), "f": ("FLOAT32", 0.5)}
    write_gguf(path, [(name, name, (3, 512), value) for name, value in data.items()], metadata, alignment=128)
    reader = gguf.GGUFReader(path)
    assert reader.alignment == 128
    assert reader.fields["general.architecture"].contents() == "flux"
    assert reader.fields["k"].contents() == [3072, 64] and reader.fields["f"].contents() == 0.5
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == tensor.name and tensor.shape.tolist() == [512, 3]
        assert tensor.data.tobytes() == data[tensor.name].view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", ALL_TYPES)
def test_every_type_round_trips(tmp_path, name):
    block = ALL_TYPES[name].block_size
    tensors = [(f"{len(shape)}-D", name, shape, content(name, shape)) for shape in ((2 * block,), (3, block), (2, 1, 2, block))]
    write_gguf(tmp_path / "a.gguf", tensors, {})
    file = read_gguf(tmp_path / "a.gguf")
    for stored, (key, _, shape, data) in zip(file.tensors.values(), tensors):
        assert (stored.name, stored.format, stored.shape) == (key, name, shape)
        assert torch.equal(stored.data.view(torch.uint8), data.view(torch.uint8))


NUMBERS = st.integers(-(2**63), 2**63 - 1)
VALUES = st.one_of(
    st.tuples(st.just("INT64"), NUMBERS),
    st.tuples(st.just("FLOAT64"), st.floats(allow_nan=False)),
    st.tuples(st.just("BOOL"), st.booleans()),
    st.tuples(st.just("STRING"), st.text()),
    st.tuples(st.just("ARRAY[INT64]"), st.lists(NUMBERS)),
    st.tuples(st.just("ARRAY[STRING]"), st.lists(st.text())),
    st.tuples(st.just("ARRAY[ARRAY[BOOL]]"), st.lists(st.lists(st.booleans()), min_size=1)),
    st.tuples(st.just("ARRAY[ARRAY]"), st.just([])),
)
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=80)
SHAPES = st.lists(st.integers(0, 4), max_size=4)


@settings(max_examples=100, deadline=None, suppress_health_check=HEALTH)
@given(
    metadata=st.dictionaries(NAMES.filter(lambda key: key != "general.alignment"), VALUES, max_size=5),
    shapes=st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(PLAIN_TYPES)), SHAPES), max_size=5),
    alignment=st.sampled_from([None, 8, 32, 256]),
)
def test_any_metadata_and_shapes_round_trip(tmp_path, metadata, shapes, alignment):
    path, again = tmp_path / "a.gguf", tmp_path / "b.gguf"
    tensors = [(name, kind, tuple(shape), content(kind, tuple(shape))) for name, (kind, shape) in shapes.items()]
    write_gguf(path, tensors, metadata, alignment=alignment)
    file = read_gguf(path)
    stored = file.typed_metadata
    assert stored.pop("general.alignment", ("UINT32", 32)) == ("UINT32", alignment or 32)
    assert stored == metadata and list(stored) == list(metadata)
    assert [(t.name, t.format, t.shape) for t in file.tensors.values()] == [entry[:3] for entry in tensors]
    assert path.stat().st_size == planned_size([entry[:3] for entry in tensors], metadata, alignment=alignment)
    copied(file, again)
    assert again.read_bytes() == path.read_bytes()


def test_planned_size_follows_the_format(tmp_path):
    """The size is a sum of known parts, header and tensors padded to the alignment.

    24 + key-values + 8 + len(name) + 4 + 8 * dimensions + 4 + 8 a tensor.
    """
    metadata = {
        "general.architecture": ("STRING", "flux"),
        "general.quantization_version": ("UINT32", 2),
        "general.file_type": ("UINT32", 14),
    }
    header = 24 + 121 + (8 + 1 + 4 + 16 + 12) + (8 + 2 + 4 + 8 + 12)
    padded = -(-header // 32) * 32
    specs = [("w", "Q8_0", (3, 32)), ("bb", "F16", (5,))]
    assert planned_size(specs, metadata) == padded + 128 + 32


def test_one_tensor_is_held_at_a_time_and_progress_is_told(tmp_path):
    alive: list[weakref.ref] = []
    reports = []

    def make():
        gc.collect()
        assert not any(tensor() is not None for tensor in alive)
        tensor = torch.zeros(1000)
        alive.append(weakref.ref(tensor))
        return tensor

    tensors = [(f"t{index}", "F32", (1000,), make) for index in range(3)]
    write_gguf(tmp_path / "a.gguf", tensors, {}, progress=lambda *report: reports.append(report))
    size = (tmp_path / "a.gguf").stat().st_size
    assert [name for name, _, _ in reports] == ["t0", "t1", "t2"]
    assert reports[-1][1:] == (size, size) and [done for _, done, _ in reports] == [size - 8000 - 0, size - 4000, size]


def test_strided_data_is_written_in_order(tmp_path):
    data = torch.arange(12.0).view(3, 4).t()
    write_gguf(tmp_path / "a.gguf", [("x", "F32", (4, 3), data)], {})
    assert torch.equal(read_gguf(tmp_path / "a.gguf").tensors["x"].data, data)


def test_a_large_tensor_is_written_in_chunks(tmp_path):
    data = torch.arange(2**23 + 5, dtype=torch.int32)  # 32 MiB and 20 bytes
    write_gguf(tmp_path / "a.gguf", [("x", "I32", tuple(data.shape), data)], {})
    assert torch.equal(read_gguf(tmp_path / "a.gguf").tensors["x"].data, data)


def test_a_file_may_replace_the_one_it_is_read_from(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(raw.small())
    copied(read_gguf(path), path)
    assert path.read_bytes() == raw.small()


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link.gguf").symlink_to(tmp_path / "target.gguf")
    write_gguf(tmp_path / "link.gguf", [ONE], {})
    assert (tmp_path / "link.gguf").is_symlink() and list(read_gguf(tmp_path / "target.gguf").tensors) == ["x"]


def failing():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (failing, KeyboardInterrupt),
        (torch.zeros(7), GGUFError),
        (torch.zeros(2, 4), GGUFError),
        (torch.zeros(8, dtype=torch.float16), GGUFError),
        (torch.zeros(32, dtype=torch.uint8), GGUFError),
    ],
)
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, data, error):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    with pytest.raises(error):
        write_gguf(path, [ONE, ("bad", "F32", (8,), data)], {})
    assert os.listdir(tmp_path) == ["a.gguf"] and path.read_bytes() == b"old"


REFUSED = {
    "name twice": ([ONE, ONE], {}, None, "tensor 'x' is given twice"),
    "name empty": ([("", *ONE[1:])], {}, None, "tensor name '' is not legal"),
    "name with NUL": ([("a\0", *ONE[1:])], {}, None, "without NUL"),
    "name too long": ([("x" * 65536, *ONE[1:])], {}, None, "65535 bytes"),
    "name not UTF-8": ([("\ud800", *ONE[1:])], {}, None, "encodable as UTF-8"),
    "type": ([("x", "Q9_9", (8,), ONE[3])], {}, None, "unknown type 'Q9_9'. Legal: F32"),
    "row": ([("x", "Q8_0", (2, 16), ONE[3])], {}, None, "whole blocks of 32 weights, got rows of 16"),
    "dimensions": ([("x", "F32", (1,) * 5, ONE[3])], {}, None, "5 dimensions, legal are 0 to 4"),
    "negative": ([("x", "F32", (-8,), ONE[3])], {}, None, "negative dimension"),
    "data": ([("x", "Q8_0", (2, 32), ONE[3])], {}, None, r"stored as torch.uint8 \[2, 34\], got torch.float32 \[8\]"),
    "key empty": ([], {"": ("UINT8", 1)}, None, "key '' is not legal"),
    "value type": ([], {"k": ("UINT128", 1)}, None, "key 'k': unknown value type 'UINT128'. Legal: UINT8"),
    "value range": ([], {"k": ("UINT8", 256)}, None, "key 'k': not UINT8"),
    "value kind": ([], {"k": ("UINT32", 1.5)}, None, "key 'k': not UINT32"),
    "float range": ([], {"k": ("FLOAT32", 1e300)}, None, "key 'k': not FLOAT32"),
    "bool": ([], {"k": ("BOOL", 1)}, None, "a BOOL must be True or False"),
    "string": ([], {"k": ("STRING", 1)}, None, "a STRING must be str, got int"),
    "array": ([], {"k": ("ARRAY[INT32]", "text")}, None, "must be a list, got str"),
    "array element": ([], {"k": ("ARRAY[INT8]", [1, 128])}, None, "key 'k': not INT8"),
    "array of unknown": ([], {"k": ("ARRAY[X]", [])}, None, "unknown value type 'X'"),
    "array of arrays of what": ([], {"k": ("ARRAY[ARRAY]", [[1]])}, None, "name the innermost type"),
    "array too deep": ([], {"k": ("ARRAY[" * 5 + "INT8" + "]" * 5, [[[[[1]]]]])}, None, "nest at most 4"),
    "alignment": ([], {}, 12, "alignment 12 is not legal"),
    "alignments differ": ([], {"general.alignment": ("UINT32", 64)}, 32, "general.alignment is UINT32 64"),
    "alignment type": ([], {"general.alignment": ("UINT64", 64)}, None, "general.alignment is UINT64 64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_reader_could_read_is_refused(tmp_path, name):
    tensors, metadata, alignment, expected = REFUSED[name]
    with pytest.raises(GGUFError, match=expected):
        write_gguf(tmp_path / "a.gguf", tensors, metadata, alignment=alignment)
    assert os.listdir(tmp_path) == []


def test_a_directory_or_device_is_not_overwritten(tmp_path):
    for target in (tmp_path, os.devnull):
        with pytest.raises(GGUFError, match="not a regular file"):
            write_gguf(target, [ONE], {})
    with pytest.raises(GGUFError, match="is no folder. Make it first"):
        write_gguf(tmp_path / "missing" / "a.gguf", [ONE], {})


def test_a_written_header_is_the_documented_one(tmp_path):
    write_gguf(tmp_path / "a.gguf", [("x", "F32", (2, 4), torch.arange(8.0).view(2, 4))], {"k": ("UINT32", 7)})
    expected = raw.gguf([raw.key_value("k", raw.UINT32, raw.u32(7))], [raw.info("x", (4, 2))], struct.pack("<8f", *range(8)))
    assert (tmp_path / "a.gguf").read_bytes() == expected
