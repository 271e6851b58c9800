"""Search for the types with an offset: x = scale * q - offset, q = 0 .. top.

The super-block types search in steps: each sub-block is fitted on its own, from several grids; the best fits fix d and dmin;
every fit is rounded to (sc, m) and judged by the error after rounding the codes anew; (sc, m) moves to its best neighbour;
d and dmin are fitted to all that and stay so where it helps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._search import (
    HALF_STEP,
    LARGEST,
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
    signed_ratio,
    total,
    total_,
)

# Least importance of what such a grid spans, as a fraction of the largest.
_COUNTING = (1e-6, 0.01, 0.1)
_COUNTING_SHRINKS = [(low, high) for low in (-0.02, 0.03) for high in (-0.02, 0.03)]
# HalfAffineSearch goes on where rounding d and m makes the error so many times what it would be.
_HARD = 1.05
# Values of d and of dmin in a thorough search.
_THOROUGH_SUPERS = 4
# What float32's rounding may leave of a difference that is 0, relative to its terms.
_DEGENERATE = 1e-6

# Fractions of the range by which the two ends of a grid are drawn in.
Shrinks = Sequence[tuple[float, float]]


def codes(x: Tensor, scale: Tensor, offset: Tensor, top: int) -> Tensor:
    """Round (x + offset) / scale to codes 0 to `top`; 0 where the scale is 0."""
    return round_to((x + offset).mul_(ratio(torch.ones_like(scale), scale)), 0, top)


def solve(b: Blocks, wq: Tensor, wxq: Tensor, wqq: Tensor, bounded: bool) -> tuple[Tensor, Tensor]:
    """Fit (scale, offset), [G, 1, n], to codes by least squares; a `bounded` offset is at least 0."""
    determinant = b.sum_w * wqq - wq * wq
    determinant = determinant * improvement(b.sum_w * wqq * _DEGENERATE, determinant)
    scale = ratio(b.sum_w * wxq - wq * b.sum_x, determinant)
    offset = ratio(scale * wq - b.sum_x, b.sum_w)
    if bounded:
        scale = torch.lerp(scale, ratio(wxq, wqq), improvement(offset, torch.zeros_like(offset)))
        offset = offset.clamp(min=0)
    return scale.clamp(min=0), offset


def error_of(b: Blocks, scale: Tensor, offset: Tensor, top: int) -> Tensor:
    """Sum the squared error of each sub-block under a scale other than 0: [G, 1, n]."""
    z = torch.add(b.x, offset, out=b.scratch(0)).mul_(torch.reciprocal(scale))
    q = torch.round(z, out=b.scratch(1)).clamp_(0, top)
    z.sub_(q).square_()
    if b.w is not None:
        z.mul_(b.w)
    return total_(z).mul(scale).mul_(scale)


@dataclass(frozen=True)
class HalfAffineSearch:
    """Search one fp16 scale and one fp16 offset of either sign per block (G = 1)."""

    top: int
    shrinks: Shrinks
    weighted_shrinks: Shrinks = ()
    refits: int = 2

    def __call__(self, b: Blocks, *others: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return d, m [1, 1, n] and codes [1, B, n] of x = d * q + m.

        others: (scale, offset) to try as well.
        """
        low, high = b.x.amin(1, keepdim=True), b.x.amax(1, keepdim=True)
        span = high - low
        # Sums of squares about a large mean would lose the rest.
        centred = Blocks(b.x - low, b.w)
        scale, offset = nonzero(half(span / self.top)), half(-low)
        best = [error_of(b, scale, offset, self.top), scale, offset]
        for other_scale, other_offset in others:
            scale, offset = nonzero(half(other_scale)), half(other_offset)
            keep(best, [error_of(b, scale, offset, self.top), scale, offset])
        shrinks = (*self.shrinks, *(self.weighted_shrinks if b.w is not None else ()))
        for trial in range(len(shrinks) + self.refits):
            if trial < len(shrinks):
                bottom, up = shrinks[trial]
                first = codes(centred.x, span * ((1 - bottom - up) / self.top), -bottom * span, self.top)
            else:
                first = codes(b.x, best[1], best[2], self.top)
            scale, offset = solve(centred, *centred.products(first), bounded=False)
            scale, offset = nonzero(half(scale)), half(offset - low)
            keep(best, [error_of(b, scale, offset, self.top), scale, offset])
        if b.w is not None:
            for scale, offset in self._counting_grids(b.x, b.w):
                self._improve(b, best, scale, offset)
        self._thorough(b, best)
        _, d, offset = best
        q = codes(b.x, d, offset, self.top)
        worth = b.worth(q * d - offset)
        d, m = d * worth, -offset * worth
        # Blocks of equal weights become m, and with q = 1 what its rounding lost.
        constant, rounded = b.constant(), half(low)
        return d.lerp_(half(low - rounded), constant), m.lerp_(rounded, constant), q.lerp_(torch.ones_like(d), constant)

    def _improve(self, b: Blocks, best: list[Tensor], scale: Tensor, offset: Tensor) -> None:
        """Fit d to this grid's codes, the offset to d as stored; replace `best` where that is better."""
        low = b.x.amin(1, keepdim=True)
        q = codes(b.x - low, scale, offset + low, self.top)
        centred = Blocks(b.x - low, b.w)
        wq, wxq, wqq = centred.products(q)
        d, _ = solve(centred, wq, wxq, wqq, bounded=False)
        d = nonzero(half(d))
        offset = half(ratio(d * wq - centred.sum_x, b.sum_w) - low)
        keep(best, [error_of(b, d, offset, self.top), d, offset])

    def _counting_grids(self, x: Tensor, w: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (scale, offset) of grids over the weights that count, not over all."""
        for least in _COUNTING:
            outside = (w < least) * (4 * LARGEST)
            low, high = (x + outside).amin(1, keepdim=True), (x - outside).amax(1, keepdim=True)
            span = (high - low).clamp_(min=0)
            for bottom, up in _COUNTING_SHRINKS:
                yield span * ((1 - bottom - up) / self.top), -low - bottom * span

    def _thorough(self, b: Blocks, best: list[Tensor]) -> None:
        """Map the range to every pair of codes where rounding d and m is much of the error: few values, say."""
        _, d, offset = best
        low = b.x.amin(1, keepdim=True)
        centred, q = Blocks(b.x - low, b.w), codes(b.x, d, offset, self.top)
        scale, shift = solve(centred, *centred.products(q), bounded=False)
        rounded = centred.error(q * half(scale) - (half(shift - low) + low))
        hard = chosen(improvement(centred.error(q * scale - shift) * _HARD, rounded))
        for columns in portions(hard, b):
            part = b.take(columns)
            part_best = [t[..., columns] for t in best]
            low = part.x.amin(1, keepdim=True)
            span = part.x.amax(1, keepdim=True) - low
            for steps in range(self.top, self.top // 2, -1):
                for first in range(self.top - steps + 1):
                    scale = span / steps
                    self._improve(part, part_best, scale, first * scale - low)
            put_better(best, part_best, columns)


@dataclass(frozen=True)
class SuperAffineSearch:
    """Search d * sc * q - dmin * m: fp16 d and dmin per block, sc and m from 0 to `levels` per sub-block.

    Attributes:
        top: largest code.
        levels: largest sc and m.
        shrinks: the grids of the first search.
        weighted_shrinks: more of them for where there is importance and other weights may count more than the outermost.
        other: finds another (d, dmin, sc, m) to try, `exact` where asked to be.
        other_always: whether it is asked without importance too, or only about hard blocks.
        hard: a block is searched more thoroughly where its error is so many times that before anything was rounded.
        supers: (stretch, reach) by which d is tried: scales times stretch, the widest as reach * d.
        phase: least dmin, as a fraction of the widest scale: offsets also shift a grid against its weights.
        turns: neighbourhood searches, each followed by a fit of d and dmin.
    """

    top: int
    levels: int
    shrinks: Shrinks
    other: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    other_always: bool = True
    weighted_shrinks: Shrinks = ()
    turns: int = 1
    phase: float = 0.0
    supers: Sequence[tuple[float, int]] = ()
    hard: float = 1.2

    def __call__(self, b: Blocks) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return d, dmin [1, 1, n], sc, m [G, 1, n] and codes [G, B, n]."""
        fits = self._fits(b)
        _, scale, offset = self._best_fit(b, fits)
        d, dmin = self._first_super_scales(b, scale, offset)
        sc, m = self._best_start(b, fits, d, dmin)
        best = self._moved(b, d, dmin, sc, m)
        if b.w is not None or self.other_always:
            keep(best, self._other(b, exact=False))
        ideal = total(error_of(b, nonzero(scale), offset, self.top), 0)
        hard = chosen(improvement(ideal * self.hard, best[0]))
        for columns in portions(hard, b):
            part = b.take(columns)
            put_better(best, keep(self._thorough(part, bounded=True), self._other(part, exact=True)), columns)
            positive = columns[(part.x.amin((0, 1)) > 0)]
            if positive.numel():
                put_better(best, self._thorough(b.take(positive), bounded=False), positive)
        _, d, dmin, sc, m = best
        q = codes(b.x, d * sc, dmin * m, self.top)
        worth = b.worth(q * (d * sc) - dmin * m)
        d, dmin = d * worth, dmin * worth
        self._put_constants(b, d, dmin, sc, m, q)
        return d, dmin, sc, m, q

    def _moved(self, b: Blocks, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor) -> list[Tensor]:
        """Improve (sc, m) by neighbours, (d, dmin) by a fit, in turns; return (error, d, dmin, sc, m)."""
        for _ in range(self.turns):
            error, sc, m = self._best_neighbours(b, d, dmin, sc, m)
            new_d, new_dmin = self._refit(b, d, dmin, sc, m)
            new_error = error_of(b, new_d * sc, new_dmin * m, self.top)
            block_error, d, dmin = keep([total(error, 0), d, dmin], [total(new_error, 0), new_d, new_dmin])
        return [block_error, d, dmin, sc, m]

    def _put_constants(self, b: Blocks, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor, q: Tensor) -> None:
        """Express blocks of equal weights, in place, as d times the largest product less dmin.

        dmin, of either sign, is what rounding d lost.
        """
        constant, c = b.constant(), b.x[:1, :1]
        product = self.top * self.levels
        d.lerp_(half(c / product), constant)
        dmin.lerp_(half(d * product - c), constant)
        for t, value in ((sc, self.levels), (m, 1), (q, self.top)):
            t.lerp_(torch.full_like(c, value), constant)

    def _other(self, b: Blocks, exact: bool) -> list[Tensor]:
        """Judge what `other` finds: the error of each block, d, dmin, sc and m."""
        d, dmin, sc, m = self.other(b, exact=exact)
        d, sc = d.clamp(min=HALF_STEP), sc.clamp(min=1)
        return [total(error_of(b, d * sc, dmin * m, self.top), 0), d, dmin, sc, m]

    def _thorough(self, b: Blocks, bounded: bool) -> list[Tensor]:
        """Try many pairs of d and dmin, with every fit in every sub-block, and improve the best.

        For blocks where rounding d, dmin, sc and m is much of the error: few weights other than 0, few values, or nearly
        equal weights. Where all weights are positive, offsets need not be `bounded` and dmin is negative.
        """
        fits = self._fits(b, bounded)
        _, scale, offset = self._best_fit(b, fits)
        widest, farthest = scale.amax(0, keepdim=True), outermost(offset, 0)
        dmins = [half(farthest / (self.levels - step)) for step in range(_THOROUGH_SUPERS - 1)]
        pairs = []
        for step in range(_THOROUGH_SUPERS):
            d = half_above(widest / (self.levels - step)).clamp_(min=HALF_STEP)
            short = self._short(d)
            pairs += [(short, half(short * self.top)), *((d, dmin) for dmin in dmins)]
        d, dmin = (torch.cat(ts, -1) for ts in zip(*pairs, strict=True))
        wide = b.repeated(len(pairs))
        fits = [[t.repeat(1, 1, len(pairs)) for t in fit] for fit in fits]
        return best_of(self._moved(wide, d, dmin, *self._best_start(wide, fits, d, dmin)), len(pairs))

    def _short(self, d: Tensor) -> Tensor:
        """Round d so that fp16 holds its product with `top`.

        Zeros are met exactly where dmin * m is d * sc * top.
        """
        # What is subtracted again takes the low bits of d along.
        spread = d * (2.0 ** (13 + self.top.bit_length()) + 1)
        return half(spread - (spread - d)).clamp_(min=HALF_STEP)

    def _fits(self, b: Blocks, bounded: bool = True) -> list[list[Tensor]]:
        """Fit each sub-block from every grid: (loss, scale, offset >= 0 where `bounded`), [G, 1, n]."""
        low = b.x.amin(1, keepdim=True)
        low = low.clamp_(max=0) if bounded else low
        span = b.x.amax(1, keepdim=True) - low
        fits = []
        for bottom, up in (*self.shrinks, *(self.weighted_shrinks if b.w is not None else ())):
            q = codes(b.x, span * ((1 - bottom - up) / self.top), -low - bottom * span, self.top)
            wq, wxq, wqq = b.products(q)
            scale, offset = solve(b, wq, wxq, wqq, bounded)
            # The squared error less sum(w * x^2), at a least squares solution.
            loss = offset * b.sum_x - scale * wxq
            fits.append([loss, scale, offset])
        return fits

    def _first_super_scales(self, b: Blocks, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Choose d and dmin, [1, 1, n], by the error of the best fits rounded to multiples of them."""
        widest = scale.amax(0, keepdim=True)
        dmin = half_above(torch.maximum(offset.amax(0, keepdim=True) / self.levels, widest * self.phase))
        trials: list[Tensor] = []
        for stretch, reach in self.supers:
            d = half_above(widest * (stretch / reach)).clamp_(min=HALF_STEP)
            sc, m = self._rounded(scale * stretch, offset, d, dmin)
            candidate = [total(error_of(b, d * sc, dmin * m, self.top), 0), d]
            trials = keep(trials, candidate) if trials else candidate
        return trials[1], dmin

    def _best_fit(self, b: Blocks, fits: list[list[Tensor]]) -> list[Tensor]:
        """Return the best of the fits; of equals (few weights not 0, say) the first has the simplest ratios."""
        noise = _DEGENERATE * total(b.weighted(b.x * b.x))
        best = [t.clone() for t in fits[0]]
        for loss, *fit in fits[1:]:
            keep(best, [loss + noise, *fit])
        return best

    def _best_start(self, b: Blocks, fits: list[list[Tensor]], d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (sc, m), each [G, 1, n], of the fit that stands rounding best."""
        best: list[Tensor] = []
        for _, scale, offset in fits:
            sc, m = self._rounded(scale, offset, d, dmin)
            candidate = [error_of(b, d * sc, dmin * m, self.top), sc, m]
            best = keep(best, candidate) if best else candidate
        return best[1], best[2]

    def _rounded(self, scale: Tensor, offset: Tensor, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
        """Round to (sc, m); with sc = 0 the codes could say nothing."""
        return round_to(scale / d, 1, self.levels), round_to(signed_ratio(offset, dmin), 0, self.levels)

    def _best_neighbours(self, b: Blocks, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor) -> list[Tensor]:
        """Return the best (sc, m) of 3 x 3 with its error, as (error, sc, m).

        m moves along with sc, so that the middle of the grid stays.
        """
        best = [error_of(b, d * sc, dmin * m, self.top), sc.clone(), m.clone()]
        slope = signed_ratio(d * total(b.weighted(codes(b.x, d * sc, dmin * m, self.top))), dmin * b.sum_w)
        for step in (0, -1, 1):
            new_sc = (sc + step).clamp_(1, self.levels)
            centre = ((new_sc - sc) * slope + m).round_()
            for shift in (-1, 1) if step == 0 else (0, -1, 1):
                new_m = (centre + shift).clamp_(0, self.levels)
                keep(best, [error_of(b, d * new_sc, dmin * new_m, self.top), new_sc, new_m])
        return best

    def _refit(self, b: Blocks, d: Tensor, dmin: Tensor, sc: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Fit d and dmin by least squares, all else fixed; d alone where they cannot be separated."""
        wq, wxq, wqq = b.products(codes(b.x, d * sc, dmin * m, self.top))
        dd, dm, mm = total(sc * sc * wqq, 0), total(sc * m * wq, 0), total(m * m * b.sum_w, 0)
        xd, xm = total(sc * wxq, 0), -total(m * b.sum_x, 0)
        determinant = dd * mm - dm * dm
        determinant = determinant * improvement(dd * mm * _DEGENERATE, determinant)
        both = torch.sign(determinant)
        new_d = torch.lerp(ratio(xd + dm * dmin, dd), ratio(mm * xd + dm * xm, determinant), both)
        new_dmin = torch.lerp(dmin, ratio(dd * xm + dm * xd, determinant), both)
        return refitted(d, new_d), refitted(dmin, new_dmin)
