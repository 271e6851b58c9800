"""What C code writes is dropped while it shall be silent, and nothing else is."""

from __future__ import annotations

import ctypes
import os

import pytest

from flux_kernels.machine.silence import STDERR, STDOUT, silenced

pytestmark = pytest.mark.skipif(os.name != "posix", reason="C's stdio is reached by its Linux and macOS name")


def say(word: str, descriptor: int) -> None:
    """Write by C's buffered stdio on standard output, and unbuffered on either."""
    if descriptor == STDOUT:
        ctypes.CDLL(None).puts(f"C {word}".encode())
    os.write(descriptor, f"descriptor {word}\n".encode())


@pytest.mark.parametrize("descriptor", [STDOUT, STDERR])
def test_what_is_written_meanwhile_is_dropped(capfd, descriptor):
    say("before", descriptor)
    with pytest.raises(KeyError), silenced(descriptor):
        say("meanwhile", descriptor)
        raise KeyError
    say("after", descriptor)
    ctypes.CDLL(None).fflush(None)
    expected = {"descriptor before", "descriptor after"} | ({"C before", "C after"} if descriptor == STDOUT else set())
    assert set(capfd.readouterr()[descriptor - 1].splitlines()) == expected


def test_the_other_stream_is_left_alone(capfd):
    with silenced(STDERR):
        say("meanwhile", STDOUT)
    ctypes.CDLL(None).fflush(None)
    assert set(capfd.readouterr().out.splitlines()) == {"C meanwhile", "descriptor meanwhile"}
