"""Split files: any part stands for all of them; what is missing or foreign is named."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from flux_kernels.errors import GGUFError
from flux_kernels.gguf.file import read_gguf


def write_parts(folder, count=3, stated=None, tensors_stated=None, name="model"):
    """Write parts as llama.cpp's gguf-split does, a tensor each."""
    paths = []
    for number in range(count):
        path = folder / f"{name}-{number + 1:05}-of-{count:05}.gguf"
        writer = gguf.GGUFWriter(None, "flux")
        if number:
            writer.kv_data[0].clear()
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", stated or count)
        writer.add_int32("split.tensors.count", tensors_stated or count)
        writer.add_tensor(f"t{number}", np.full((2, 4), number, np.float32))
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


@pytest.mark.parametrize("given", range(3))
def test_any_part_stands_for_all(tmp_path, given):
    paths = write_parts(tmp_path)
    file = read_gguf(paths[given])
    assert file.parts == tuple(map(str, paths)) and file.size == sum(path.stat().st_size for path in paths)
    assert [tensor.data[0, 0].item() for tensor in file.tensors.values()] == [0, 1, 2]
    assert file.metadata["general.architecture"] == "flux"
    assert [tensor.path for tensor in file.tensors.values()] == list(map(str, paths))


def test_a_missing_part_is_named(tmp_path):
    paths = write_parts(tmp_path)
    paths[1].unlink()
    with pytest.raises(GGUFError, match="one of 3 parts; model-00002-of-00003.gguf is not beside it"):
        read_gguf(paths[2])


def test_a_renamed_part_does_not_say_where_the_others_are(tmp_path):
    path = write_parts(tmp_path)[0].rename(tmp_path / "model.gguf")
    with pytest.raises(GGUFError, match="one of 3 parts by its keys, but its name does not end in -00001-of-00003"):
        read_gguf(path)


def test_hostile_counts_are_refused_fast(tmp_path):
    for stated in (60000, 4):
        folder = tmp_path / str(stated)
        folder.mkdir()
        with pytest.raises(GGUFError, match=f"one of {stated} parts by its keys"):
            read_gguf(write_parts(folder, stated=stated)[0])


def test_a_part_of_another_file_is_refused(tmp_path):
    """Its name fits, its keys do not: another count, another number, or none."""
    for folder, change in (("count", dict(count=4)), ("number", None)):
        (tmp_path / folder).mkdir()
        paths = write_parts(tmp_path / folder)
        if change:
            (tmp_path / "four").mkdir()
            write_parts(tmp_path / "four", **change)[1].replace(paths[1])
        else:
            third = paths[2].read_bytes()
            paths[1].replace(paths[2])
            paths[1].write_bytes(third)
        with pytest.raises(GGUFError, match=r"the keys of part 2 of 3 say . parts and number .\. It is a part of another file"):
            read_gguf(paths[0])


@pytest.mark.parametrize("count", ["three", -1, True])
def test_a_count_that_is_no_number_of_parts_is_refused(tmp_path, count):
    writer = gguf.GGUFWriter(None, "flux")
    writer.add_key_value(
        "split.count",
        count,
        {str: gguf.GGUFValueType.STRING, bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.INT32}[type(count)],
    )
    writer.add_tensor("t", np.zeros(4, np.float32))
    path = tmp_path / "x-00001-of-00003.gguf"
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GGUFError, match="'split.count' is .*; legal is a number of parts"):
        read_gguf(path)


def test_parts_of_two_models_are_refused(tmp_path):
    paths = write_parts(tmp_path, tensors_stated=5)
    with pytest.raises(GGUFError, match="hold 3 tensors, their keys say 5"):
        read_gguf(paths[0])
    other = tmp_path / "other"
    other.mkdir()
    write_parts(other)[0].replace(paths[1])
    with pytest.raises(GGUFError, match="'t0' is in two parts"):
        read_gguf(paths[0])
