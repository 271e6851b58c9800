"""Unpack Q6_K on a CPU, eight bytes at a time.

Times: docs/decisions/torch-backend-on-cpu.md.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Unpacker:
    """Unpack superblocks on a CPU with operations on 8-byte words.

    ggml's loop over them does not vectorise. Every intermediate is memory kept from call to call, all views of it are made
    once: at this size both cost more than the arithmetic. Nibbles lie as decoded, the low halves of 64 bytes and then the high;
    the four 2-bit planes of 32 bytes of qh are brought to bits 4 and 5, two of them as they are and shifted by 2, the other
    two from these by a shift of 4.
    """

    def __init__(self, blocks: int):
        """Allocate for `blocks` superblocks."""
        self.ql, self.qh, low, high = (
            torch.empty(blocks, size, dtype=torch.uint8, device="cpu") for size in (128, 64, 256, 256)
        )
        self.codes = low.view(torch.int8)
        self.low, self.high = low.view(torch.int64), high.view(torch.int64)
        self.nibbles = self.ql.view(torch.int64).view(blocks, 2, 8)
        self.low_nibbles, self.high_nibbles = self.low.view(blocks, 2, 2, 8).unbind(2)
        self.pairs = self.qh.view(torch.int64).view(blocks, 2, 4)
        self.third, self.fourth = self.high.view(blocks, 2, 4, 4).unbind(2)[2:]
        self.first_two, self.last_two = self.high.view(blocks, 2, 2, 8).unbind(2)
        self.scales = torch.empty(blocks, 16, dtype=torch.float32, device="cpu")
        self.d = torch.empty(blocks, 1, dtype=torch.float16, device="cpu")
        self.d_bytes = self.d.view(torch.uint8)
        self.two, self.four = (torch.tensor(shift, device="cpu") for shift in (2, 4))
        self.bits_0_to_3, self.bits_4_and_5 = (torch.tensor(byte * 0x0101010101010101, device="cpu") for byte in (0x0F, 0x30))
        self.middle = torch.tensor(32, dtype=torch.int8, device="cpu")

    def __call__(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """Unpack uint8 [blocks, 210] to q - 32, int8 [blocks, 256], and d * sc, float32 [blocks, 16]."""
        self.ql.copy_(data[:, :128])
        self.low_nibbles.copy_(self.nibbles)
        torch.bitwise_right_shift(self.nibbles, self.four, out=self.high_nibbles)
        torch.bitwise_and(self.low, self.bits_0_to_3, out=self.low)
        self.qh.copy_(data[:, 128:192])
        self.third.copy_(self.pairs)
        torch.bitwise_right_shift(self.pairs, self.two, out=self.fourth)
        torch.bitwise_left_shift(self.last_two, self.four, out=self.first_two)
        torch.bitwise_and(self.high, self.bits_4_and_5, out=self.high)
        torch.bitwise_or(self.low, self.high, out=self.low)
        torch.sub(self.codes, self.middle, out=self.codes)
        self.scales.copy_(data[:, 192:208].view(torch.int8))
        self.d_bytes.copy_(data[:, 208:])
        return self.codes, self.scales.mul_(self.d)
