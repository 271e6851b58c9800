"""Search for the types without an offset: x = scale * level, the levels being integers or a codebook.

Candidates are judged by the error after rounding, with the scale as it will be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ._search import (
    Blocks,
    best_of,
    chosen,
    half,
    half_above,
    improvement,
    keep,
    nonzero,
    outermost,
    portions,
    put_better,
    ratio,
    refitted,
    round_to,
    total,
    total_,
)

# Fits, and steps from each, by which a thorough search chooses d.
_THOROUGH_SUPERS = 6

# Takes (z, out), writes the level nearest to each z to out, and returns out.
Snap = Callable[[Tensor, Tensor], Tensor]


def integers(low: int, high: int) -> Snap:
    """Make the snap to integers from `low` to `high`."""
    return lambda z, out: torch.round(z, out=out).clamp_(low, high)


def codebook(values: Sequence[int]) -> Snap:
    """Make the snap to integer `values` between -127 and 127.

    The middle between two of them is a multiple of 1/2, so floor(2 * z) decides: a table of 512.
    """
    levels = torch.tensor(values, dtype=torch.float32)
    cells = (torch.arange(512) - 255.5) / 2
    table = levels[(cells[:, None] - levels).abs().argmin(1)]

    tables = {table.device: table}

    def snap(z: Tensor, out: Tensor) -> Tensor:
        if z.device not in tables:
            tables[z.device] = table.to(z.device)
        torch.mul(z, 2, out=out).add_(256).clamp_(0, 511)
        return out.copy_(tables[z.device].index_select(0, out.to(torch.int32).flatten()).view_as(z))

    return snap


def codes_of(levels: Tensor, values: Sequence[int]) -> Tensor:
    """Turn levels [G, B, n], each among the integer `values`, into their positions: uint8 [n, G * B]."""
    table = torch.zeros(256, dtype=torch.uint8)
    # Of equal values the first counts.
    for code, value in reversed(list(enumerate(values))):
        table[value + 128] = code
    index = (levels + 128).to(torch.int32).flatten()
    return table.to(levels.device).index_select(0, index).view_as(levels).flatten(0, 1).t().contiguous()


def snapped(b: Blocks, scale: Tensor, snap: Snap) -> Tensor:
    """Return the level nearest to each x / scale: [G, B, n]."""
    z = b.x * torch.reciprocal(scale)
    return snap(z, torch.empty_like(z))


def best_scale(b: Blocks, snap: Snap, candidates: Iterable[Tensor]) -> list[Tensor]:
    """Find the candidate scale [G, 1, n] of the smallest error, the first of equals.

    No candidate may be 0.

    Returns:
        the error of each sub-block, [G, 1, n], and the scale.
    """
    best: list[Tensor] = []
    for scale in candidates:
        z = torch.mul(b.x, torch.reciprocal(scale), out=b.scratch(0))
        z.sub_(snap(z, b.scratch(1))).square_()
        if b.w is not None:
            z.mul_(b.w)
        candidate = [total_(z).mul(scale).mul_(scale), scale]
        best = keep(best, candidate) if best else [candidate[0], scale.clone()]
    return best


def fitted(b: Blocks, y: Tensor) -> Tensor:
    """Return the scale of the smallest squared error for levels y: [G, 1, n]."""
    _, xy, yy = b.products(y)
    return ratio(xy, yy)


@dataclass(frozen=True)
class HalfScaleSearch:
    """Search one fp16 scale per block (G = 1).

    Attributes:
        snap: rounds to levels.
        starts: levels (fractions too) that the largest weight is mapped to at first.
        weighted_starts: more of them for where there is importance and other weights may count more than the largest.
        refits: alternations of rounding and fitting.
    """

    snap: Snap
    starts: Sequence[float]
    weighted_starts: Sequence[float] = ()
    refits: int = 1

    def __call__(self, b: Blocks, *others: Tensor) -> tuple[Tensor, Tensor]:
        """Return d [1, 1, n] and levels [1, B, n]; `others` are scales [1, 1, n] to try as well."""
        peak = outermost(b.x, 1)
        starts = (*self.starts, *(self.weighted_starts if b.w is not None else ()))
        scales = chain((peak * (1 / start) for start in starts), others)
        _, d = best_scale(b, self.snap, (nonzero(half(scale)) for scale in scales))
        for _ in range(self.refits):
            _, d = best_scale(b, self.snap, (d, nonzero(half(fitted(b, snapped(b, d, self.snap))))))
        d = self._thorough(b, d)
        y = snapped(b, d, self.snap)
        return d * b.worth(d * y), y

    def _thorough(self, b: Blocks, d: Tensor) -> Tensor:
        """Refit every start where rounding d to fp16 is more than a hundredth of the error."""
        _, xy, yy = b.products(snapped(b, d, self.snap))
        columns = chosen(improvement(0.01 * best_scale(b, self.snap, [d])[0], (ratio(xy, yy) - d).square() * yy))
        if not columns.numel():
            return d
        hard = b.take(columns)
        peak = outermost(hard.x, 1)
        starts = self.snap(*torch.arange(-128.0, 128.0, device=d.device).repeat(2, 1)).unique().tolist()
        scales = (fitted(hard, snapped(hard, nonzero(peak * (1 / start)), self.snap)) for start in starts if start)
        _, hard_d = best_scale(hard, self.snap, chain([d[..., columns]], (nonzero(half(scale)) for scale in scales)))
        return d.index_copy(2, columns, hard_d)


@dataclass(frozen=True)
class SuperScaleSearch:
    """Search d * sc: one fp16 d per block, a signed integer sc per sub-block.

    Attributes:
        snap: rounds to levels.
        starts: levels that the largest weight of a sub-block is mapped to at first.
        weighted_starts: more of them for where there is importance.
        reach: largest -sc; the largest sc is one less.
        supers: (stretch, reach) by which d is tried: sub-block scales times stretch, the widest as -reach * d.
        moves: steps of sc that are tried.
        turns: searches over the moves, each followed by a fit of d.
        other: finds another (d, sc) to try.
        thorough_starts: instead of `starts` in a more thorough search, of blocks that are hard to get right.
        hard: a block is where its error is so many times that before d and sc were rounded.
    """

    snap: Snap
    starts: Sequence[float]
    weighted_starts: Sequence[float]
    reach: int
    supers: Sequence[tuple[float, int]]
    other: Callable[[Blocks], tuple[Tensor, Tensor]]
    thorough_starts: Sequence[float]
    moves: Sequence[int] = (-1, 1)
    turns: int = 1
    hard: float = 1.05

    def __call__(self, b: Blocks) -> tuple[Tensor, Tensor, Tensor]:
        """Return d [1, 1, n], sc [G, 1, n] and levels [G, B, n]."""
        ideal, d, sc = self._start(b)
        best = self._moved(b, d, sc)
        if b.w is not None:
            keep(best, self._moved_other(b))
        hard = chosen(improvement(ideal * self.hard, best[0]) + b.one_sided())
        for columns in portions(hard, b):
            part = b.take(columns)
            put_better(best, keep(self._thorough(part), self._moved_other(part)), columns)
        _, d, sc = best
        y = snapped(b, d * sc, self.snap)
        # Levels need not include 0.
        sc = sc * improvement(b.error(d * sc * y), b.error(torch.zeros_like(y)))
        d = d * b.worth(d * sc * y)
        self._put_constants(b, d, sc, y)
        return d, sc, y

    def _start(self, b: Blocks) -> tuple[Tensor, Tensor, Tensor]:
        """Fit each sub-block on its own, and the d that suits the fits best.

        Returns the fits' error before rounding, too.
        """
        peak = nonzero(outermost(b.x, 1))
        starts = (*self.starts, *(self.weighted_starts if b.w is not None else ()))
        _, scale = best_scale(b, self.snap, (peak * (1 / start) for start in starts))
        scale = fitted(b, snapped(b, scale, self.snap))
        ideal, _ = best_scale(b, self.snap, [nonzero(scale)])
        widest = outermost(scale, 0)
        best: list[Tensor] = []
        for stretch, reach in self.supers:
            top = widest * (-stretch / reach)
            d = nonzero(torch.copysign(half_above(top.abs()), top))
            error, rounded = best_scale(b, self.snap, [d * self._legal(scale * stretch / d)])
            candidate = [total(error, 0), d, rounded]
            best = keep(best, candidate) if best else candidate
        _, d, scale = best
        return total(ideal, 0), d, self._legal(scale / d)

    def _moved_other(self, b: Blocks) -> list[Tensor]:
        d, sc = self.other(b)
        return self._moved(b, nonzero(d), self._legal(sc))

    def _thorough(self, b: Blocks) -> list[Tensor]:
        """Try more d, and for each every fit in every sub-block.

        For blocks of which rounding d and sc is most of the error.
        """
        peak = nonzero(outermost(b.x, 1))
        fits = [nonzero(fitted(b, snapped(b, peak * (1 / start), self.snap))) for start in self.thorough_starts]
        trials = [
            nonzero(half(outermost(fit, 0) / -(self.reach - step)))
            for fit in fits[:: len(fits) // _THOROUGH_SUPERS]
            for step in range(_THOROUGH_SUPERS)
        ]
        wide, d = b.repeated(len(trials)), torch.cat(trials, -1)
        scales = (d * self._legal(fit.repeat(1, 1, len(trials)) / d) for fit in fits)
        _, scale = best_scale(wide, self.snap, scales)
        return best_of(self._moved(wide, d, self._legal(scale / d)), len(trials))

    def _moved(self, b: Blocks, d: Tensor, sc: Tensor) -> list[Tensor]:
        """Improve (d, sc) in turns: sc by its neighbours, d by a fit; return the error of each block and both."""
        for _ in range(self.turns):
            error, scale = best_scale(b, self.snap, (d * self._legal(sc + move) for move in (0, *self.moves)))
            sc = self._legal(scale / d)
            _, xy, yy = b.products(snapped(b, scale, self.snap))
            new_d = refitted(d, ratio(total(sc * xy, 0), total(sc * sc * yy, 0)))
            new_error, _ = best_scale(b, self.snap, [new_d * sc])
            block_error, d = keep([total(error, 0), d], [total(new_error, 0), new_d])
        return [block_error, d, sc]

    def _put_constants(self, b: Blocks, d: Tensor, sc: Tensor, y: Tensor) -> None:
        """Express blocks of equal weights, in place, by the sc * level that forgives d's rounding most."""
        columns = b.constant().flatten().nonzero().flatten()
        if not columns.numel():
            return
        levels = self.snap(*torch.arange(-128.0, 128.0, device=d.device).repeat(2, 1)).unique()
        steps = torch.arange(self.reach // 2, self.reach, device=d.device, dtype=levels.dtype)
        pairs = torch.cartesian_prod(steps, levels[levels != 0])
        products = pairs.prod(1, keepdim=True)
        c = b.x[0, 0, columns]
        scales = half(c / products)
        error = (scales * products - c).abs()
        order = torch.arange(len(products), device=d.device)[:, None].expand_as(error)
        # `argmin` may return any of equals.
        first = torch.where(error == error.amin(0), order, len(products)).amin(0)
        better = error.amin(0) < ((d * sc * y)[..., columns] - c).abs().amax((0, 1))
        columns, first = columns[better], first[better]
        d[..., columns] = scales[:, better].gather(0, first[None])
        sc[..., columns], y[..., columns] = pairs[first].t()

    def _legal(self, t: Tensor) -> Tensor:
        """Round to an sc other than 0: under any scale, rounding is no worse than zeros."""
        sc = round_to(t, -self.reach, self.reach - 1)
        return sc + (sc == 0)
