"""The reader on good files: what gguf-py writes reads identically.

Files are mapped, tensors have storages of their own, and it is fast.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
import time
import warnings

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flux_kernels.errors import FormatError, GGUFError
from flux_kernels.formats import FORMATS, PLAIN_TYPES
from flux_kernels.gguf.file import read_gguf

from .. import gguf_bytes as raw

# Fixtures are shared by examples on purpose, and drawing them is slow where the machine is busy.
HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
ALL_TYPES = {**PLAIN_TYPES, **FORMATS}
# gguf-py's own table: (weights, bytes) of a block; Q2_0 is newer than the pinned gguf-py
ORACLE_TYPES = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items() if kind.name in ALL_TYPES}
INTEGERS = {"UINT8": (0, 2**8), "INT8": (-(2**7), 2**7), "UINT16": (0, 2**16), "INT16": (-(2**15), 2**15)}
INTEGERS |= {"UINT32": (0, 2**32), "INT32": (-(2**31), 2**31), "UINT64": (0, 2**64), "INT64": (-(2**63), 2**63)}


def read_bytes(tmp_path, data: bytes):
    path = tmp_path / "file.gguf"
    path.write_bytes(data)
    return read_gguf(path)


def element_types():
    numbers = [
        st.tuples(st.just(kind), st.lists(st.integers(low, high - 1), min_size=1)) for kind, (low, high) in INTEGERS.items()
    ]
    floats = [
        st.tuples(st.just("FLOAT32"), st.lists(st.floats(width=32, allow_nan=False), min_size=1)),
        st.tuples(st.just("FLOAT64"), st.lists(st.floats(allow_nan=False), min_size=1)),
    ]
    texts = st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1)
    others = [st.tuples(st.just("BOOL"), st.lists(st.booleans(), min_size=1)), st.tuples(st.just("STRING"), texts)]
    return st.one_of(*numbers, *floats, *others)


KEYS = st.text("abcdefghijklmnopqrstuvwxyz0123456789_.", min_size=1, max_size=20).filter(
    lambda key: key not in ("general.alignment", "general.architecture")
)
METADATA = st.dictionaries(KEYS, st.tuples(element_types(), st.booleans()), max_size=6)
TENSORS = st.lists(st.tuples(st.sampled_from(sorted(ORACLE_TYPES)), st.integers(1, 3), st.integers(1, 3)), max_size=5)


@settings(max_examples=60, deadline=None, suppress_health_check=HEALTH)
@given(metadata=METADATA, tensors=TENSORS, alignment=st.sampled_from([None, 8, 32, 64, 4096]), seed=st.integers(0, 99))
def test_reads_what_gguf_py_writes(tmp_path, metadata, tensors, alignment, seed):
    path = tmp_path / "oracle.gguf"
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "flux")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, ((kind, values), is_array) in metadata.items():
        element = gguf.GGUFValueType[kind]
        if is_array:
            writer.add_key_value(key, values, gguf.GGUFValueType.ARRAY, element)
        else:
            writer.add_key_value(key, values[0], element)
    blocks = {}
    for index, (kind, rows, count) in enumerate(tensors):
        type_size = ORACLE_TYPES[kind][1]
        blocks[f"t{index}"] = rng.integers(0, 256, (rows, count * type_size), dtype=np.uint8)
        writer.add_tensor(f"t{index}", blocks[f"t{index}"], raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = read_gguf(path)
    assert file.metadata.pop("general.architecture") == "flux"
    assert file.metadata.pop("general.alignment", None) == alignment
    assert file.alignment == (alignment or 32)
    assert file.metadata == {key: values if is_array else values[0] for key, ((_, values), is_array) in metadata.items()}
    for key, ((kind, _), is_array) in metadata.items():
        assert file.metadata_types[key] == (f"ARRAY[{kind}]" if is_array else kind)

    oracle = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert list(file.tensors) == list(oracle)
    for (kind, _, _), (name, tensor) in zip(tensors, file.tensors.items()):
        assert tensor.format == kind
        assert tensor.shape == tuple(reversed(oracle[name].shape.tolist()))
        assert (tensor.offset, tensor.nbytes) == (oracle[name].data_offset, oracle[name].n_bytes)
        assert tensor.data.contiguous().view(torch.uint8).numpy().tobytes() == blocks[name].tobytes()


@pytest.mark.parametrize("name", ALL_TYPES)
def test_every_registered_type_reads_with_its_shape_and_dtype(tmp_path, name):
    row = ALL_TYPES[name]
    k, nbytes = 2 * row.block_size, 2 * row.type_size
    content = bytes(i % 251 for i in range(3 * nbytes))
    file = read_bytes(tmp_path, raw.gguf(infos=[raw.info("x", (k, 3), row.ggml_type)], data=content))
    tensor = file.tensors["x"]
    assert (tensor.format, tensor.block_format, tensor.shape, tensor.nbytes) == (name, row, (3, k), len(content))
    if name in PLAIN_TYPES:
        assert tensor.data.dtype == row.dtype and tensor.data.shape == (3, k)
    else:
        assert tensor.data.dtype == torch.uint8 and tensor.data.shape == (3, nbytes)
    assert tensor.data.view(torch.uint8).numpy().tobytes() == content


def test_the_small_file_reads_by_value(tmp_path):
    file = read_bytes(tmp_path, raw.small())
    assert file.metadata == {
        "general.architecture": "flux",
        "a.bool": True,
        "a.float": 1.5,
        "a.numbers": [3072, -64],
        "a.names": ["x", "ü"],
        "a.big": 2**64 - 1,
    }
    assert file.metadata_types["a.names"] == "ARRAY[STRING]" and file.typed_metadata["a.bool"] == ("BOOL", True)
    assert (file.version, file.alignment, file.size) == (3, 32, len(raw.small()))
    assert file.tensors["b"].data.tolist() == list(range(8))
    assert file.tensors["w"].data.tolist() == [list(range(34)), list(range(34, 68))]
    assert "3 tensors" in repr(file) and "Q8_0" in repr(file.tensors["w"])


def test_version_2_is_the_same(tmp_path):
    data = bytearray(raw.small())
    data[4] = 2
    file = read_bytes(tmp_path, bytes(data))
    assert file.version == 2 and file.tensors["b"].data.tolist() == list(range(8))


def test_the_last_padding_may_be_missing(tmp_path):
    file = read_bytes(tmp_path, raw.small()[:-30])
    assert file.tensors["s"].data.tolist() == list(range(34))


def test_tensors_may_lie_in_any_order(tmp_path):
    infos = [raw.info("late", (8,), raw.F32, 32), raw.info("early", (8,), raw.F32, 0)]
    file = read_bytes(tmp_path, raw.gguf(infos=infos, data=struct.pack("<16f", *range(16))))
    assert list(file.tensors) == ["late", "early"]
    assert file.tensors["late"].data.tolist() == list(range(8, 16))


def test_scalars_and_empty_tensors_read_as_ggml_reads_them(tmp_path):
    infos = [
        raw.info("scalar", (), raw.F32, 0),
        raw.info("empty", (32, 0), raw.Q8_0, 32),
        raw.info("none", (0, 3), raw.F32, 32),
    ]
    file = read_bytes(tmp_path, raw.gguf(infos=infos, data=struct.pack("<f", 2.5) + bytes(28)))
    assert file.tensors["scalar"].data.shape == () and file.tensors["scalar"].data.item() == 2.5
    assert file.tensors["empty"].data.shape == (0, 34) and file.tensors["none"].data.shape == (3, 0)


def test_arrays_of_arrays_read_to_the_stated_depth(tmp_path):
    inner = raw.array(raw.UINT8, 2, b"\1\2") + raw.array(raw.UINT8, 0, b"")
    keys = [
        raw.key_value("nested", raw.ARRAY, raw.array(raw.ARRAY, 2, inner)),
        raw.key_value("none", raw.ARRAY, raw.array(raw.ARRAY, 0, b"")),
    ]
    file = read_bytes(tmp_path, raw.gguf(keys))
    assert file.metadata == {"nested": [[1, 2], []], "none": []}
    assert file.metadata_types == {"nested": "ARRAY[ARRAY[UINT8]]", "none": "ARRAY[ARRAY]"}


def test_names_longer_than_ggmls_limit_read(tmp_path):
    name = "model.diffusion_model." + "x" * 200
    file = read_bytes(tmp_path, raw.gguf(infos=[raw.info(name, (8,))], data=bytes(32)))
    assert list(file.tensors) == [name]


def test_each_tensor_has_a_storage_of_its_own_size(tmp_path):
    file = read_bytes(tmp_path, raw.small())
    for tensor in file.tensors.values():
        assert tensor.data.untyped_storage().nbytes() == tensor.nbytes


def test_saving_one_tensor_saves_no_other(tmp_path):
    infos = [raw.info("large", (2**18,)), raw.info("small", (8,), raw.F32, 2**20)]
    file = read_bytes(tmp_path, raw.gguf(infos=infos, data=bytes(2**20) + struct.pack("<8f", *range(8))))
    buffer = io.BytesIO()
    torch.save(file.tensors["small"].data, buffer)
    assert len(buffer.getvalue()) < 2**14
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True).tolist() == list(range(8))


def test_data_is_mapped_and_never_written_back(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = read_bytes(tmp_path, raw.small())
        data = file.tensors["b"].data
    assert data.data_ptr() == file.tensors["b"].data.data_ptr() == file.tensors["b"].rows(0, 8).data_ptr()
    data.fill_(7)
    assert file.tensors["b"].rows(2, 3).tolist() == [7]
    assert (tmp_path / "file.gguf").read_bytes() == raw.small()


def test_tensors_outlive_the_file_object(tmp_path):
    data = read_bytes(tmp_path, raw.small()).tensors["b"].data
    os.unlink(tmp_path / "file.gguf")
    assert data.tolist() == list(range(8))


def test_rows_are_slices_with_a_storage_of_their_own(tmp_path):
    file = read_bytes(tmp_path, raw.small())
    second = file.tensors["w"].rows(1, 2)
    assert torch.equal(second, file.tensors["w"].data[1:2]) and second.untyped_storage().nbytes() == 34
    assert file.tensors["w"].rows(1, 1).shape == (0, 34)
    assert torch.equal(file.tensors["b"].rows(3, 8), file.tensors["b"].data[3:])
    for start, stop in [(-1, 1), (0, 3), (2, 1)]:
        with pytest.raises(IndexError, match="'w' has rows 0 to 2"):
            file.tensors["w"].rows(start, stop)


def test_rows_of_a_quantized_bias_are_whole_blocks(tmp_path):
    content = bytes(range(68))
    file = read_bytes(tmp_path, raw.gguf(infos=[raw.info("bias", (64,), raw.Q8_0)], data=content + bytes(28)))
    assert file.tensors["bias"].data.shape == (68,)
    assert file.tensors["bias"].rows(32, 64).tolist() == list(range(34, 68))
    with pytest.raises(FormatError, match="multiples of 32"):
        file.tensors["bias"].rows(8, 64)


def test_a_million_strings_read_in_seconds(tmp_path):
    """A million strings read in seconds; gguf-py's reader takes 27 s.

    Measured here 0.3 s; the bound leaves room for a busy machine.
    """
    count = 1_000_000
    words = b"".join([raw.string(f"token{index}") for index in range(count)])
    scores = np.arange(count, dtype="<f4")
    keys = [
        raw.key_value("tokens", raw.ARRAY, raw.array(raw.STRING, count, words)),
        raw.key_value("scores", raw.ARRAY, raw.array(raw.FLOAT32, count, scores.tobytes())),
    ]
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(raw.gguf(keys))
    start = time.process_time()
    file = read_gguf(path)
    elapsed = time.process_time() - start
    assert len(file.metadata["tokens"]) == count and file.metadata["tokens"][-1] == "token999999"
    assert file.metadata["scores"][-1] == 999_999.0
    assert elapsed < 2


def sparse(path, tensor_count: int, rows: int, k: int = 3072):
    """Write the header of a file of Q4_K tensors and set its size, without data."""
    nbytes = rows * k // 256 * 144
    infos = [raw.info(f"double_blocks.{i}.weight", (k, rows), raw.Q4_K, i * nbytes) for i in range(tensor_count)]
    header = raw.gguf(infos=infos)
    path.write_bytes(header)
    try:
        os.truncate(path, len(header) + tensor_count * nbytes)
    except OSError as error:
        pytest.skip(f"no sparse file of this size here: {error}")


def test_a_12_gb_file_of_780_tensors_opens_at_once(tmp_path):
    path = tmp_path / "flux.gguf"
    sparse(path, 780, 9216)
    assert path.stat().st_size > 12e9
    start = time.process_time()
    file = read_gguf(path)
    first, last = (list(file.tensors.values())[index].data for index in (0, -1))
    elapsed = time.process_time() - start
    assert first.shape == last.shape == (9216, 1728) and int(last[-1, -1]) == 0
    assert elapsed < 0.2  # measured 0.01 s


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_file_larger_than_memory_opens(tmp_path):
    with contextlib.suppress(OSError), open("/proc/sys/vm/overcommit_memory") as setting:
        if setting.read().strip() == "2":
            pytest.skip("strict overcommit refuses every mapping larger than memory")
    path = tmp_path / "huge.gguf"
    sparse(path, 1000, 2**20)
    assert path.stat().st_size > 1.7e12
    assert int(list(read_gguf(path).tensors.values())[-1].data[-1, -1]) == 0


def test_reading_needs_torch_alone(tmp_path):
    (tmp_path / "file.gguf").write_bytes(raw.small())
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['gguf', 'numpy', 'diffusers', 'triton']))\n"
        "from flux_kernels.gguf.file import read_gguf\n"
        "print(read_gguf(sys.argv[1]).tensors['b'].data.tolist())"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "file.gguf")]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.stdout.strip() == str([float(i) for i in range(8)]), run.stderr


def test_the_path_may_be_a_string_and_must_be_a_path(tmp_path):
    (tmp_path / "file.gguf").write_bytes(raw.small())
    assert read_gguf(str(tmp_path / "file.gguf")).path == str(tmp_path / "file.gguf")
    with pytest.raises(TypeError):
        read_gguf(3)
    with pytest.raises(GGUFError, match="cannot be read"):
        read_gguf("")
