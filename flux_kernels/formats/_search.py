"""What every quantizer search shares: the layout of sub-blocks, exact sums, selection, fp16 scales.

Searches work on float32 [G, B, n]: n blocks in the last dimension, each of G sub-blocks of B weights. All reductions are then
sums of whole contiguous planes. Only operations with one correct result (add, multiply, divide, round, compare) are used,
and sums are added up in one fixed order, so that the bytes of a block depend on nothing but its weights: not on the chunk
it is in, the number of threads or the device. Selections are arithmetic on masks of 0 and 1: on a CPU `torch.where` costs
fifty times as much as a multiplication, `argmin` two hundred times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HALF_MAX = 65504.0
# Smallest fp16 number, and the step of subnormal numbers.
HALF_STEP = 2.0**-24
# Smallest fp16 number of full precision.
HALF_NORMAL = 2.0**-14
# More than a block with fp16 scales can hold, while its square fits float32: what lies beyond saturates.
LARGEST = 1e9


@dataclass
class Blocks:
    """Lay out the weights of n blocks for a search, with what each counts.

    Attributes:
        x: weights, float32 [G, B, n].
        w: importance, at most 1 in each block, or None where all count the same.
        sum_x: sum of w * x over each sub-block, [G, 1, n].
        sum_w: sum of w over each sub-block, [G, 1, n].
    """

    x: Tensor
    w: Tensor | None

    def __post_init__(self) -> None:
        self.sum_x = total(self.weighted(self.x))
        self.sum_w = torch.full_like(self.sum_x, self.x.shape[1]) if self.w is None else total(self.w)
        self._scratch = (torch.empty_like(self.x), torch.empty_like(self.x))

    @classmethod
    def of_rows(cls, rows: Tensor, importance: Tensor | None, sub_blocks: int, size: int) -> Blocks:
        """Lay out rows [rows, K] as blocks of `sub_blocks` times `size` weights.

        Blocks without importance count evenly.
        """
        x = _planes(rows, sub_blocks, size).clamp_(-LARGEST, LARGEST)
        if importance is None:
            return cls(x, None)
        w = _planes(importance, sub_blocks, size)
        largest = w.amax((0, 1), keepdim=True)
        none = (largest == 0).float()
        return cls(x, w.div_(largest + none).add_(none))

    def take(self, columns: Tensor) -> Blocks:
        """Return the blocks of these positions in n."""
        return Blocks(self.x[..., columns], None if self.w is None else self.w[..., columns])

    def repeated(self, times: int) -> Blocks:
        """Return all blocks so many times, set after set: to try as many candidates at once."""
        return Blocks(self.x.repeat(1, 1, times), None if self.w is None else self.w.repeat(1, 1, times))

    def scratch(self, index: int) -> Tensor:
        """Return either of two buffers like x, for what does not outlive a function.

        Fresh memory costs as much as arithmetic.
        """
        return self._scratch[index]

    def weighted(self, t: Tensor) -> Tensor:
        """Multiply by the importance."""
        return t if self.w is None else t * self.w

    def error(self, y: Tensor) -> Tensor:
        """Sum w * (x - y)^2 over each sub-block: [G, 1, n]."""
        return total(self.weighted((self.x - y).square_()))

    def products(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums of w*y, w*x*y and w*y*y over each sub-block, [G, 1, n] each."""
        wy = self.weighted(y)
        return total(wy), total(wy * self.x), total(wy * y)

    def constant(self) -> Tensor:
        """Return 1 for each block of equal weights other than 0, else 0: [1, 1, n]."""
        low, high = self.x.amin((0, 1), keepdim=True), self.x.amax((0, 1), keepdim=True)
        return ((low == high) & (low != 0)).float()

    def one_sided(self) -> Tensor:
        """Return 1 for blocks with weights of one sign in a quarter of the sub-blocks, else 0: [1, 1, n]."""
        low, high = self.x.amin(1, keepdim=True), self.x.amax(1, keepdim=True)
        return (((low > 0) | (high < 0)).float().mean(0, keepdim=True) >= 0.25).float()

    def worth(self, y: Tensor) -> Tensor:
        """Return 1 for each block that y serves better than all zeros would, else 0: [1, 1, n]."""
        return improvement(total(self.error(y), 0), total(self.error(torch.zeros_like(y)), 0))


def _planes(rows: Tensor, sub_blocks: int, size: int) -> Tensor:
    return rows.reshape(-1, sub_blocks * size).t().clone(memory_format=torch.contiguous_format).unflatten(0, (sub_blocks, size))


def total(t: Tensor, dim: int = 1) -> Tensor:
    """Sum over one dimension, a power of two long, which is kept.

    Halves are added, so that the order is the same everywhere.
    """
    size = t.shape[dim]
    while size > 1:
        size //= 2
        t = t.narrow(dim, 0, size) + t.narrow(dim, size, size)
    return t


def outermost(t: Tensor, dim: int) -> Tensor:
    """Return the value of the largest magnitude along `dim`, with its sign."""
    low, high = t.amin(dim, keepdim=True), t.amax(dim, keepdim=True)
    return torch.lerp(high, low, improvement(low, -high))


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """Divide a by b >= 0; 0 where b is 0."""
    return torch.sign(b) * a / b.clamp(min=1e-37)


def total_(t: Tensor, dim: int = 1) -> Tensor:
    """Sum as `total` does, overwriting t: half the time, without fresh memory."""
    size = t.shape[dim]
    while size > 1:
        size //= 2
        t = t.narrow(dim, 0, size).add_(t.narrow(dim, size, size))
    return t


def signed_ratio(a: Tensor, b: Tensor) -> Tensor:
    """Divide a by b of either sign; 0 where b is 0."""
    return torch.sign(b) * a / b.abs().clamp(min=1e-37)


def improvement(new: Tensor, old: Tensor) -> Tensor:
    """Return 1.0 where new < old, else 0.0."""
    return torch.sign(old - new).clamp_(min=0)


def keep(best: list[Tensor], candidate: list[Tensor]) -> list[Tensor]:
    """Overwrite `best` by `candidate` where its error, first in both lists, is smaller; return `best`."""
    better = improvement(candidate[0], best[0])
    for old, new in zip(best, candidate, strict=True):
        old.lerp_(new, better)
    return best


def best_of(candidates: list[Tensor], times: int) -> list[Tensor]:
    """Keep the best of candidates for `repeated` blocks."""
    first, *others = zip(*(t.chunk(times, -1) for t in candidates), strict=True)
    best = [t.clone() for t in first]
    for other in others:
        keep(best, list(other))
    return best


def chosen(mask: Tensor) -> Tensor:
    """Return the positions of what is not 0 in a mask [1, 1, n]: [columns]."""
    return mask.flatten().nonzero().flatten()


def portions(columns: Tensor, b: Blocks) -> tuple[Tensor, ...]:
    """Cut columns so that sixteen or more copies of a portion are about as many blocks as b.

    No portion where there are no columns.
    """
    return columns.split(max(1, b.x.shape[2] // 16)) if columns.numel() else ()


def put_better(best: list[Tensor], candidate: list[Tensor], columns: Tensor) -> None:
    """Overwrite these columns of `best` by their `candidate` where its error is smaller.

    The error is the first of both lists.
    """
    for old, new in zip(best, keep([t[..., columns] for t in best], candidate), strict=True):
        old[..., columns] = new


def half(t: Tensor) -> Tensor:
    """Round to the nearest finite fp16 value, as float32."""
    return t.clamp(-HALF_MAX, HALF_MAX).half().float()


def half_above(t: Tensor) -> Tensor:
    """Round t >= 0 to fp16, subnormal values upwards.

    Sub-block scales must reach what they are multiples of.
    """
    return torch.maximum(half(t), torch.ceil(t.clamp(max=HALF_NORMAL) / HALF_STEP) * HALF_STEP)


def refitted(old: Tensor, fit: Tensor) -> Tensor:
    """Take the fit, rounded to fp16, in place of the old scale where it has the same sign and is not 0."""
    new = half(fit)
    return torch.lerp(old, new, torch.sign((new * torch.sign(old)).clamp(min=0)))


def nonzero(scale: Tensor) -> Tensor:
    """Replace zeros by the smallest fp16 number."""
    return scale + (scale == 0) * HALF_STEP


def round_to(t: Tensor, low: float, high: float) -> Tensor:
    """Round in place to integers from `low` to `high`."""
    return t.round_().clamp_(low, high)
