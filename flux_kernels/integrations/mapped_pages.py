"""Give memory back that a mapped file took while one of its tensors was read."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

# Linux 5.4: reclaim pages now; what they hold stays readable (Source: madvise(2)).
_MADV_PAGEOUT = 21


def page_out(tensor: Tensor) -> None:
    """Let the system take back the pages of a tensor that lies in a mapped file.

    Its values stay; reading them takes longer. Does nothing for other tensors, and where the system has no such call.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu" or tensor.is_meta:
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes - start) // page * page
    if length > 0 and _in_mapped_file(start):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_PAGEOUT)


def _in_mapped_file(address: int) -> bool:
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            span, _, _, _, inode, *_ = line.split()
            first, last = (int(end, 16) for end in span.split("-"))
            if first <= address < last:
                return inode != "0"
    return False
