"""The exact product of few tokens on a CPU: every thread multiplies the rows that it has just decoded.

They are still in its cache, and no thread waits for another before the end (docs/decisions/torch-backend-on-cpu.md has the times).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FormatError
from ..formats import Packed
from . import cpu_decode
from .cpu_threads import Scratch, share_rows

CHUNK_WEIGHTS = 1 << 20  # about, decoded and multiplied at a time
# More tokens are not worth it: x is packed again for every chunk of rows.
LARGEST_M = 512
# Chunks of a multiple of this give the bits of one product over all rows (but for M = 5 and 7 on several threads).
ROWS = 64


def serves(x: Tensor, weight: Packed) -> bool:
    """Tell whether `linear` computes this product."""
    fits = x.shape[0] <= LARGEST_M and weight.n % ROWS == 0
    return fits and cpu_decode.serves(weight, x.dtype) and cpu_decode.decoder(weight.fmt) is not None


def linear(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """Compute x [M, K] @ weight.T + bias [N] -> [M, N] of x's dtype.

    Raises:
        FormatError: where `serves` says that no decoder is there.
    """
    decode, k, n = cpu_decode.decoder(weight.fmt), x.shape[1], weight.n
    if decode is None:
        raise FormatError(f"{weight.fmt.name} has no decoder here that runs on one thread.")
    x, y = x.contiguous(), torch.empty(x.shape[0], n, dtype=x.dtype, device="cpu")

    def rows(first: int, end: int, scratch: Scratch) -> None:
        decoded = scratch.tensor("weight", x.dtype, end - first, k)
        decode.rows(weight.data[first:end], decoded, scratch)
        if bias is None:
            torch.mm(x, decoded.t(), out=y[:, first:end])
        else:
            torch.addmm(bias[first:end].to(x.dtype), x, decoded.t(), out=y[:, first:end])

    share_rows(n, k, CHUNK_WEIGHTS, rows, ROWS)
    return y
