"""ggml's own C reader and writer as a second oracle.

libggml takes our files and writes the same header.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from flux_kernels.formats import FORMATS, PLAIN_TYPES
from flux_kernels.gguf.file import read_gguf, write_gguf

from .test_write import content

libggml = pytest.importorskip("libggml", reason="libggml-python has no wheel for this platform")
ALL_TYPES = {**PLAIN_TYPES, **FORMATS}
METADATA = {
    "general.architecture": ("STRING", "flux"),
    "general.quantization_version": ("UINT32", 2),
    "general.alignment": ("UINT32", 64),
    "a.float": ("FLOAT32", 0.5),
    "a.bool": ("BOOL", True),
    "a.big": ("UINT64", 2**64 - 1),
    "a.double": ("FLOAT64", 0.1),
    "b.numbers": ("ARRAY[INT32]", [3072, -64]),
    "b.names": ("ARRAY[STRING]", ["x", "", "ü"]),
    "b.flags": ("ARRAY[BOOL]", [True, False]),
    "b.none": ("ARRAY[UINT8]", []),
}


class _InitParams(ctypes.Structure):
    """Mirror struct gguf_init_params of gguf.h."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(Path(libggml.__file__).parent / "lib64" / "libggml-base.so"))
    handle, index = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("gguf_init_from_file", handle, [ctypes.c_char_p, _InitParams]),
        ("gguf_free", None, [handle]),
        ("gguf_get_n_kv", index, [handle]),
        ("gguf_get_n_tensors", index, [handle]),
        ("gguf_get_alignment", ctypes.c_size_t, [handle]),
        ("gguf_get_data_offset", ctypes.c_size_t, [handle]),
        ("gguf_get_tensor_name", ctypes.c_char_p, [handle, index]),
        ("gguf_get_tensor_type", ctypes.c_int, [handle, index]),
        ("gguf_get_tensor_offset", ctypes.c_size_t, [handle, index]),
        ("gguf_get_tensor_size", ctypes.c_size_t, [handle, index]),
        ("gguf_write_to_file", ctypes.c_bool, [handle, ctypes.c_char_p, ctypes.c_bool]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def test_ggml_reads_what_we_write_and_writes_the_same(tmp_path):
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    shapes = {name: (3, 2 * row.block_size) for name, row in ALL_TYPES.items()}
    write_gguf(ours, [(name, name, shape, content(name, shape)) for name, shape in shapes.items()], METADATA)
    file = read_gguf(ours)
    ggml = _library()
    context = ggml.gguf_init_from_file(bytes(ours), _InitParams(True, None))
    assert context, "ggml refuses the file; it says why on stderr"
    try:
        assert ggml.gguf_get_n_kv(context) == len(METADATA) and ggml.gguf_get_alignment(context) == 64
        start = ggml.gguf_get_data_offset(context)
        table = [
            (
                ggml.gguf_get_tensor_name(context, index).decode(),
                ggml.gguf_get_tensor_type(context, index),
                start + ggml.gguf_get_tensor_offset(context, index),
                ggml.gguf_get_tensor_size(context, index),
            )
            for index in range(ggml.gguf_get_n_tensors(context))
        ]
        assert ggml.gguf_write_to_file(context, bytes(theirs), True)  # the header alone
    finally:
        ggml.gguf_free(context)
    assert table == [(t.name, t.block_format.ggml_type, t.offset, t.nbytes) for t in file.tensors.values()]
    header = theirs.read_bytes()
    assert header == ours.read_bytes()[: len(header)] and len(header) == start

    theirs.write_bytes(header + ours.read_bytes()[start:])
    read_back = read_gguf(theirs)
    assert read_back.typed_metadata == METADATA
    assert [repr(tensor) for tensor in read_back.tensors.values()] == [repr(tensor) for tensor in file.tensors.values()]
