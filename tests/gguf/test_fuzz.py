"""The reader on mutated files: it returns a file that is sound throughout, or raises GGUFError.

It is quick either way.
"""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flux_kernels.errors import GGUFError
from flux_kernels.gguf.file import GGUFFile, read_gguf

from .. import gguf_bytes as raw

# Fixtures are shared by examples on purpose, and drawing them is slow where the machine is busy.
HEALTH = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
SMALL = raw.small()
LAST_BYTE = len(SMALL) - 30
# The three tensors: 96, 32 and 34 bytes, padding but the last included
HEADER_END = LAST_BYTE - 162
NUMBERS = [0, 1, 7, 8, 9, 31, 33, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
NUMBERS += [2**32, 2**40, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 4096, 2**64 - 32, 2**64 - 1]
# Of processor time a file; the requirement is 1 s, measured are below 1 ms
SECONDS = 0.5


def outcome(tmp_path, content: bytes) -> GGUFFile | None:
    """Read `content`; return None where it is refused, else the file.

    Every byte of every tensor is touched.
    """
    path = tmp_path / "fuzz.gguf"
    path.unlink(missing_ok=True)  # truncating a file with data takes milliseconds on ext4
    path.write_bytes(content)
    start = time.process_time()
    try:
        file = read_gguf(path)
    except GGUFError as error:
        assert str(path) in str(error) and str(error).isprintable()
        return None
    finally:
        assert time.process_time() - start < SECONDS
    claimed = []
    for tensor in file.tensors.values():
        assert 0 <= tensor.offset and tensor.offset + tensor.nbytes <= len(content)
        assert tensor.offset % file.alignment == 0
        data = tensor.data
        assert data.numel() * data.element_size() == tensor.nbytes == data.untyped_storage().nbytes()
        data.clone()  # touches every byte
        claimed += [(tensor.offset, tensor.offset + tensor.nbytes)] if tensor.nbytes else []
    claimed.sort()
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(claimed))
    return file


def test_a_file_cut_anywhere_is_refused(tmp_path):
    assert outcome(tmp_path, SMALL) is not None
    for length in range(LAST_BYTE):
        assert outcome(tmp_path, SMALL[:length]) is None, length
    for length in range(LAST_BYTE, len(SMALL)):  # only the end of the last padding is missing
        assert outcome(tmp_path, SMALL[:length]) is not None, length


def test_flips_of_one_bit_in_any_byte_are_refused_or_sound(tmp_path):
    accepted = 0
    for position in range(HEADER_END):
        for bit in (0, 3, 7):
            content = bytearray(SMALL)
            content[position] ^= 1 << bit
            accepted += outcome(tmp_path, bytes(content)) is not None
    assert 0 < accepted < HEADER_END * 3 * 0.8  # names and values may change, structure may not


@pytest.mark.parametrize("size", [4, 8])
def test_hostile_numbers_everywhere_are_refused_or_sound(tmp_path, size):
    for position in range(HEADER_END - size):
        for number in (0, 9, 2**31, 2**32 - 1) if size == 4 else (0, 255, 2**32, 2**61, 2**63, 2**64 - 32, 2**64 - 1):
            patch = number.to_bytes(size, "little")
            outcome(tmp_path, SMALL[:position] + patch + SMALL[position + size :])


@settings(max_examples=300, deadline=None, suppress_health_check=HEALTH)
@given(st.binary(max_size=2048), st.integers(0, 3), st.integers(0, 3))
@example(b"\0" * 2048, 3, 3)
def test_random_bytes_after_a_good_start_are_refused_or_sound(tmp_path, tail, tensor_count, key_count):
    outcome(tmp_path, b"GGUF" + raw.u32(3) + raw.u64(tensor_count) + raw.u64(key_count) + tail)


@st.composite
def edits(draw):
    """Several edits of the small file: numbers, removed, doubled and inserted spans."""
    content = bytearray(SMALL)
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, min(len(content), HEADER_END)))
        length = draw(st.integers(0, 40))
        kind = draw(st.sampled_from(["number", "remove", "double", "insert"]))
        if kind == "number":
            content[at : at + 8] = draw(st.sampled_from(NUMBERS)).to_bytes(8, "little")
        elif kind == "remove":
            del content[at : at + length]
        elif kind == "double":
            content[at:at] = content[at : at + length]
        else:
            content[at:at] = draw(st.binary(max_size=40))
    return bytes(content)


@settings(max_examples=400, deadline=None, suppress_health_check=HEALTH)
@given(edits())
def test_edited_files_are_refused_or_sound(tmp_path, content):
    outcome(tmp_path, content)


DIMS = st.one_of(st.integers(0, 64), st.sampled_from(NUMBERS))
INFOS = st.tuples(
    st.text("ab", max_size=3),
    st.lists(DIMS, max_size=5),
    st.one_of(st.sampled_from([raw.F32, raw.F16, raw.Q8_0, raw.Q4_K]), st.integers(0, 50)),
    st.one_of(st.integers(0, 8).map(lambda n: 32 * n), st.sampled_from(NUMBERS)),
)


@settings(max_examples=400, deadline=None, suppress_health_check=HEALTH)
@given(st.lists(INFOS, max_size=4), st.integers(0, 1024), st.sampled_from([8, 32, 64]))
def test_arbitrary_tensor_tables_are_refused_or_sound(tmp_path, infos, size, alignment):
    key = raw.key_value("general.alignment", raw.UINT32, raw.u32(alignment))
    table = [raw.info(name, tuple(dims), kind, offset) for name, dims, kind, offset in infos]
    outcome(tmp_path, raw.gguf([key], table, bytes(size), alignment=alignment))
