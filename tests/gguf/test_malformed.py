"""The reader on bad files: each gives one GGUFError that says what is wrong and where.

It does so at once, and in little memory.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import time
import tracemalloc

import pytest

from flux_kernels.errors import GGUFError
from flux_kernels.gguf.file import read_gguf

from .. import gguf_bytes as raw

HUGE = 2**64 - 1
ARCHITECTURE = raw.key_value("general.architecture", raw.STRING, raw.string("flux"))
NESTED = raw.u32(raw.ARRAY) + raw.u64(1)


def alignment_key(value: int) -> bytes:
    return raw.key_value("general.alignment", raw.UINT32, raw.u32(value))


def one_key(kind: int, payload: bytes) -> bytes:
    return raw.gguf([raw.key_value("a.key", kind, payload)])


def one_array(kind: int, count: int, payload: bytes = b"", fill: int = 0) -> bytes:
    return one_key(raw.ARRAY, raw.array(kind, count, payload)) + bytes(fill)


def tensors(*infos: bytes, size: int = 4096) -> bytes:
    return raw.gguf([ARCHITECTURE], list(infos), bytes(size))


def with_alignment(value: int) -> bytes:
    return raw.gguf([ARCHITECTURE, alignment_key(value)], [raw.info("x", (1024,))], bytes(4096))


MALFORMED = {
    # start of the file
    "one byte": (b"G", "starts with b'GGUF'"),
    "three bytes": (b"GGU", "starts with b'GGUF'"),
    "magic only": (b"GGUF", "the version needs 4 bytes, but the file has 0 left of 4"),
    "half a version": (b"GGUF\3\0", "the version needs 4 bytes"),
    "no counts": (b"GGUF\3\0\0\0", "the tensor count needs 8 bytes"),
    "one count": (b"GGUF\3\0\0\0" + raw.u64(0), "the key-value count needs 8 bytes"),
    "wrong magic": (raw.gguf(magic=b"GGML"), "starts with b'GGUF', this one with b'GGML'"),
    "swapped magic": (raw.gguf(magic=b"FUGG"), "byte-swapped"),
    "older ggml": (raw.gguf(magic=b"tjgg"), "older than GGUF"),
    "safetensors": (raw.u64(64) + b'{"__metadata__":{}}' + bytes(64), "looks like a safetensors file"),
    "torch checkpoint": (b"PK\3\4" + bytes(60), "zip archive"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "web page": (b"<!DOCTYPE html><html></html>", "web page"),
    "zeros": (bytes(4096), "starts with b'GGUF'"),
    "version 0": (raw.gguf(version=0), "version 0 is not read, versions 2 and 3 are"),
    "version 1": (raw.gguf(version=1), "version 1 is not read"),
    "version 4": (raw.gguf(version=4), "version 4 is not read"),
    "version huge": (raw.gguf(version=2**32 - 1), "version 4294967295 is not read"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    # counts
    "tensor count 2^64-1": (raw.gguf(tensor_count=HUGE), "0 key-values and 18446744073709551615 tensors"),
    "tensor count 2^40": (raw.gguf(infos=[raw.info("x", (8,))], data=bytes(32), tensor_count=2**40), "1099511627776 tensors"),
    "tensor count one too large": (raw.gguf(infos=[raw.info("x", (8,))], data=bytes(32), tensor_count=2), "tensor 2 of 2"),
    "tensor count one too small": (
        raw.gguf(infos=[raw.info("x", (8,)), raw.info("y", (8,), offset=32)], data=bytes(64), tensor_count=1),
        "belong to none: the tensor count is wrong",
    ),
    "key count 2^63": (raw.gguf([ARCHITECTURE], key_count=2**63), "9223372036854775808 key-values"),
    "key count one too large": (raw.gguf([ARCHITECTURE], key_count=2), "key-value 2 of 2"),
    "key count one too small": (
        raw.gguf(
            [ARCHITECTURE, raw.key_value("b", raw.STRING, raw.string("c"))], [raw.info("x", (8,))], bytes(32), key_count=1
        ),
        "tensor 'b'.*8 dimensions",
    ),
    # keys and values
    "key length 2^64-1": (raw.gguf([raw.u64(HUGE) + bytes(64)]), "the key needs 18446744073709551615 bytes"),
    "key length 2^63": (raw.gguf([raw.u64(2**63) + bytes(64)]), "the key needs 9223372036854775808 bytes"),
    "key empty": (raw.gguf([raw.key_value("", raw.UINT8, b"\0\0")]), "the key is '', legal are 1 to 65535 bytes"),
    "key too long": (raw.gguf([raw.key_value("k" * 65536, raw.UINT8, b"\0")]), r"'k+'\.\.\. \(65536 characters\)"),
    "key with NUL": (raw.gguf([raw.key_value("a\0b", raw.UINT8, b"\0")]), "without NUL"),
    "key not UTF-8": (raw.gguf([raw.key_value(b"a\xff", raw.UINT8, b"\0")]), "the key is not UTF-8"),
    "key twice": (raw.gguf([ARCHITECTURE, ARCHITECTURE]), "key 'general.architecture'.*stands twice"),
    "value type 13": (one_key(13, bytes(64)), "key 'a.key'.*unknown value type 13. Legal: 0 UINT8"),
    "value type 2^32-1": (one_key(2**32 - 1, bytes(64)), "unknown value type 4294967295"),
    "value cut off": (b"GGUF" + raw.u32(3) + raw.u64(0) + raw.u64(1) + raw.string("abc") + raw.u32(raw.UINT64), "1 x UINT64"),
    "bool 2": (one_key(raw.BOOL, b"\2"), "a BOOL is the byte 0 or 1, got 2"),
    "bool in an array": (one_array(raw.BOOL, 3, b"\1\0\xff"), "got 255"),
    "string length 2^64-1": (one_key(raw.STRING, raw.u64(HUGE) + bytes(64)), "the string needs 18446744073709551615 bytes"),
    "string past the end": (one_key(raw.STRING, raw.u64(4000) + bytes(64)), "the string needs 4000 bytes"),
    "string not UTF-8": (one_key(raw.STRING, raw.string(b"\xc3\x28")), "the string is not UTF-8"),
    # arrays
    "array of 2^64-1 u8": (one_array(raw.UINT8, HUGE, fill=4096), "18446744073709551615 x UINT8 needs"),
    "array of 2^61 u64": (one_array(raw.UINT64, 2**61, fill=4096), "2305843009213693952 x UINT64 needs 18446744073709551616"),
    "array of 2^63 bool": (one_array(raw.BOOL, 2**63, fill=4096), "x BOOL needs"),
    "array of 2^61 strings": (one_array(raw.STRING, 2**61, fill=4096), "the lengths of 2305843009213693952 strings"),
    "array of strings, one too many": (
        one_array(raw.STRING, 3, raw.string("a") * 2 + raw.u64(10**6)),
        "string 3 of 3 needs 1000000",
    ),
    "array of strings, length 2^64-1": (one_array(raw.STRING, 2, raw.string("a") + raw.u64(HUGE), 64), "string 2 of 2 needs"),
    "array of strings, not UTF-8": (
        one_array(raw.STRING, 2, raw.string("a") + raw.string(b"\xff")),
        "string 2 of 2 is not UTF-8",
    ),
    "array of strings, length cut off": (
        b"GGUF" + raw.u32(3) + raw.u64(0) + raw.u64(1) + raw.string("a") + raw.u32(9) + raw.array(8, 2, raw.string(b"x" * 12)),
        "the length of string 2 of 2 needs 8 bytes",
    ),
    "array of unknown type": (one_array(99, 0, fill=64), "unknown value type 99"),
    "array of 2^62 arrays": (one_array(raw.ARRAY, 2**62, fill=4096), "4611686018427387904 arrays"),
    "array nested 5 deep": (one_key(raw.ARRAY, NESTED * 4 + raw.array(raw.UINT8, 1, b"\1")), "nested deeper than 4"),
    "array nested 300 deep": (one_key(raw.ARRAY, NESTED * 300), "nested deeper than 4"),
    "nested array of 2^32 u8": (one_key(raw.ARRAY, NESTED + raw.array(raw.UINT8, 2**32, bytes(4096))), "4294967296 x UINT8"),
    "array of mixed arrays": (
        one_key(raw.ARRAY, raw.array(raw.ARRAY, 2, raw.array(raw.UINT8, 1, b"\1") + raw.array(raw.INT8, 1, b"\1"))),
        r"both ARRAY\[UINT8\] and ARRAY\[INT8\]",
    ),
    # alignment
    "alignment 0": (with_alignment(0), "alignment 0 is not legal: a power of two from 8"),
    "alignment 1": (with_alignment(1), "alignment 1 is not legal"),
    "alignment 4": (with_alignment(4), "alignment 4 is not legal"),
    "alignment 24": (with_alignment(24), "alignment 24 is not legal"),
    "alignment 33": (with_alignment(33), "alignment 33 is not legal"),
    "alignment 2^32-1": (with_alignment(2**32 - 1), "alignment 4294967295 is not legal"),
    "alignment 2^31": (with_alignment(2**31), "the tensor data has 0 bytes, from byte 2147483648"),
    "alignment as UINT64": (
        raw.gguf([raw.key_value("general.alignment", raw.UINT64, raw.u64(32))]),
        "the alignment is stored as UINT64, legal is UINT32",
    ),
    "alignment as INT32": (raw.gguf([raw.key_value("general.alignment", raw.INT32, raw.u32(32))]), "stored as INT32"),
    "alignment as STRING": (raw.gguf([raw.key_value("general.alignment", raw.STRING, raw.string("32"))]), "stored as STRING"),
    "alignment as array": (
        raw.gguf([raw.key_value("general.alignment", raw.ARRAY, raw.array(raw.UINT32, 1, raw.u32(32)))]),
        r"stored as ARRAY\[UINT32\]",
    ),
    "alignment twice": (raw.gguf([alignment_key(32), ARCHITECTURE, alignment_key(64)]), "'general.alignment'.*stands twice"),
    # tensor infos
    "tensor name length 2^64-1": (raw.gguf(infos=[raw.u64(HUGE) + bytes(64)]), "the tensor name needs"),
    "tensor name empty": (tensors(raw.info("", (1024,))), "the tensor name is ''"),
    "tensor name not UTF-8": (tensors(raw.info(b"\xff\xfe", (1024,))), "the tensor name is not UTF-8"),
    "tensor name with NUL": (tensors(raw.info("a\0", (1024,))), "without NUL"),
    "tensor name too long": (tensors(raw.info("x" * 70000, (1024,))), "70000 characters"),
    "tensor name twice": (tensors(raw.info("x", (512,)), raw.info("x", (512,), offset=2048)), "tensor 'x'.*stands twice"),
    "6 dimensions": (tensors(raw.info("x", (2, 2, 2, 2, 2, 2))), "tensor 'x'.*6 dimensions, legal are 0 to 5"),
    "2^32-1 dimensions": (tensors(raw.info("x", (2,), n_dims=2**32 - 1)), "4294967295 dimensions"),
    "dimension 2^64-1": (tensors(raw.info("x", (HUGE,))), "18446744073709551615.* is 2\\^63 elements or bytes or more"),
    "dimension 2^63": (tensors(raw.info("x", (2**63,), 24)), "2\\^63 elements or bytes or more"),
    "dimension product 2^64": (tensors(raw.info("x", (2**32, 2**32))), "2\\^63 elements or bytes or more"),
    "dimension product wraps to 0": (tensors(raw.info("x", (2**16,) * 4, raw.Q4_K)), "2\\^63 elements or bytes or more"),
    "dimension product wraps to 1024": (tensors(raw.info("x", (2**60 + 2**6, 16))), "2\\^63 elements or bytes or more"),
    "bytes wrap": (tensors(raw.info("x", (2**62,), 28)), "2\\^63 elements or bytes or more"),
    "no elements, yet huge": (tensors(raw.info("x", (2**62, 2**62, 0)), size=0), "2\\^63 elements or bytes or more"),
    "type 4": (tensors(raw.info("x", (32,), 4)), "removed type 4 .Q4_2."),
    "type 5": (tensors(raw.info("x", (32,), 5)), "removed type 5 .Q4_3."),
    "type 31": (tensors(raw.info("x", (32,), 31)), "removed type 31 .Q4_0_4_4."),
    "type 38": (tensors(raw.info("x", (32,), 38)), "removed type 38 .IQ4_NL_8_8."),
    "type 9": (tensors(raw.info("x", (32,), 9)), "type 9 .Q8_1. holds activations"),
    "type 15": (tensors(raw.info("x", (256,), 15)), "type 15 .Q8_K. holds activations"),
    "type 1000": (tensors(raw.info("x", (32,), 1000)), "unknown tensor type 1000. Legal: 0 F32, 1 F16"),
    "type 2^32-1": (tensors(raw.info("x", (32,), 2**32 - 1)), "unknown tensor type 4294967295"),
    "half a block": (tensors(raw.info("x", (16, 2), raw.Q8_0)), "Q8_0 rows are whole blocks of 32 weights, got rows of 16"),
    "K 64 of Q4_K": (tensors(raw.info("img_in.weight", (64, 3072), raw.Q4_K)), "'img_in.weight'.*whole blocks of 256"),
    "scalar of Q8_0": (tensors(raw.info("x", (), raw.Q8_0)), "whole blocks of 32 weights, got rows of 1 "),
    "info cut off": (
        raw.gguf(infos=[raw.info("x", (8,))], alignment=1)[:-3],
        "tensor 'x', byte 49: the data offset needs 8 bytes",
    ),
    # where the data is
    "no data": (tensors(raw.info("x", (1024,)), size=0), "4096 bytes at offset 0 pass the end of the file"),
    "one byte of data short": (tensors(raw.info("x", (1024,)), size=4095), "the tensor data has 4095 bytes"),
    "offset 2^64-32": (tensors(raw.info("x", (1024,), offset=2**64 - 32)), "4096 bytes at offset 18446744073709551584 pass"),
    "offset and size wrap": (tensors(raw.info("x", (1024,), offset=2**64 - 4096)), "pass the end of the file"),
    "offset 2^63": (tensors(raw.info("x", (1024,), offset=2**63)), "pass the end of the file"),
    "offset misaligned": (tensors(raw.info("x", (8,), offset=4)), "data offset 4 is not a multiple of the alignment, 32"),
    "offset misaligned to 64": (
        raw.gguf([alignment_key(64)], [raw.info("x", (8,)), raw.info("y", (8,), offset=32)], bytes(128), alignment=64),
        "tensor 'y'.*data offset 32 is not a multiple of the alignment, 64",
    ),
    "alignment after other keys holds too": (
        raw.gguf([ARCHITECTURE, alignment_key(128)], [raw.info("x", (8,), offset=64)], bytes(256), alignment=128),
        "data offset 64 is not a multiple of the alignment, 128",
    ),
    "same offset": (tensors(raw.info("x", (1024,)), raw.info("y", (1024,))), "tensor 'y'.*overlaps that of tensor 'x'"),
    "overlap": (tensors(raw.info("x", (64,)), raw.info("y", (8,), offset=32)), "tensor 'y'.*overlaps that of tensor 'x'"),
    "overlap out of order": (tensors(raw.info("x", (8,), offset=32), raw.info("y", (64,))), "'x'.*overlaps that of tensor 'y'"),
    "one inside another": (
        tensors(raw.info("x", (1000,)), raw.info("y", (8,), offset=2048), raw.info("z", (24,), offset=4000)),
        "'y'.*overlaps that of tensor 'x'",
    ),
    "gap": (tensors(raw.info("x", (8,)), raw.info("y", (8,), offset=96)), "64 bytes before its data belong to no tensor"),
    "first tensor not first": (tensors(raw.info("x", (8,), offset=32)), "32 bytes before its data"),
    "appended to": (tensors(raw.info("x", (1024,)), size=4097), "1 bytes after the last tensor belong to none"),
    "twice the file": (raw.small() * 2, "bytes after the last tensor"),
}


def error_of(path) -> str:
    with pytest.raises(GGUFError) as caught:
        read_gguf(path)
    return str(caught.value)


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_with_what_and_where(tmp_path, name):
    content, expected = MALFORMED[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    message = error_of(path)
    assert re.search(expected, message), message
    assert message.startswith(f"{path}: ") and re.search(r", byte \d+: .*\.$", message), message
    assert message.isprintable() and len(message) < 2000


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_cost_little(tmp_path, name):
    path = tmp_path / "bad.gguf"
    path.write_bytes(MALFORMED[name][0])
    tracemalloc.start()
    start = time.process_time()
    error_of(path)
    elapsed = time.process_time() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert elapsed < 0.5 and peak < 8 * 2**20, (elapsed, peak)  # allowed: 1 s, 64 MB; measured 0.01 s, 0.5 MB


def test_hostile_names_cannot_reach_the_terminal(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(tensors(raw.info("\x1b[2J\r\n\u202ename" + "x" * 500, (7,), raw.Q8_0)))
    message = error_of(path)
    assert message.isprintable() and r"\x1b[2J\r\n\u202ename" in message and len(message) < 500


def test_a_hostile_path_cannot_reach_the_terminal(tmp_path):
    path = tmp_path / "\x1b[2J.gguf"
    path.write_bytes(b"junk")
    assert error_of(path).isprintable()


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.gguf").touch()
    assert re.search("empty.gguf: the file is empty", error_of(tmp_path / "empty.gguf"))


def test_a_directory_is_refused(tmp_path):
    assert error_of(tmp_path).startswith(f"{tmp_path}: not a regular file")


def test_a_missing_file_is_refused_with_the_reason(tmp_path):
    assert error_of(tmp_path / "no.gguf") == f"{tmp_path / 'no.gguf'}: cannot be read: {os.strerror(2)}."
    assert "cannot be read" in error_of("a\0b.gguf")


@pytest.mark.skipif(os.name == "nt", reason="POSIX file types")
def test_pipes_devices_sockets_and_links_to_nowhere_are_refused_without_waiting(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "to_pipe").symlink_to(tmp_path / "pipe")
    start = time.perf_counter()
    for path in (tmp_path / "pipe", tmp_path / "to_pipe", "/dev/zero", "/dev/null"):
        assert "not a regular file" in error_of(path)
    assert "cannot be read" in error_of(tmp_path / "loop")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # a socket's path is limited to about 100 bytes
        server.bind("socket")
        assert "not a regular file" in error_of("socket")
    assert time.perf_counter() - start < 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(tmp_path):
    path = tmp_path / "secret.gguf"
    path.write_bytes(raw.small())
    path.chmod(0)
    assert "cannot be read: Permission denied" in error_of(path)


def test_a_sparse_file_cannot_ask_for_unbounded_work(tmp_path):
    """Zeros are empty strings: a sparse file of no size on disk would otherwise announce 2^36 of them."""
    path = tmp_path / "sparse.gguf"
    path.write_bytes(one_array(raw.STRING, 2**36))
    try:
        os.truncate(path, 2**40)
    except OSError as error:
        pytest.skip(f"no sparse file of this size here: {error}")
    assert "a header may take 268435456 bytes in all" in error_of(path)
