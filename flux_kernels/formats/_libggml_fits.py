"""Find the scales that libggml's searches would choose.

As further candidates they make a search here never worse than libggml's. They minimise a weighted error too, but weigh by |x|
or by importance * sqrt(mean(x^2) + x^2), and fix scales before they are rounded: on average worse, in single blocks better.
Only the scales are searched, since the codes that go with given scales are best rounded to anew. Float32 without fused
arithmetic, so that a tie may fall otherwise than in libggml's own build.

Source: ggml-quants.c make_qx_quants, make_q3_quants, make_qkx2_quants, make_qkx3_quants, make_qp_quants and
quantize_row_iq4_nl_impl.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._search import LARGEST, Blocks, half, keep, outermost, ratio, round_to, total, total_
from ._search_scale import Snap, integers

# Rounds of moving single sub-block scales.
_ROUNDS = 5


# Those of make_qkx3_quants, in all its uses.
WEIGHTED_GRIDS = tuple(-0.9 + 0.05 * i for i in range(37))


def damped(x: Tensor, w: Tensor, spread: Tensor) -> Tensor:
    """Weigh importance w by sqrt(spread + x^2), relative to its largest value in the block."""
    peak = x.abs().amax((0, 1), keepdim=True)
    return w * (spread + x * x).sqrt() * ratio(torch.ones_like(peak), (spread + peak * peak).sqrt())


def mean_square(x: Tensor) -> Tensor:
    """Return the mean of x^2 over each block: [1, 1, n]."""
    return total(total(x * x), 0) / (x.shape[0] * x.shape[1])


def row_mean_square(rows: Tensor, size: int) -> Tensor:
    """Return the mean of x^2 over each row of [rows, K], for every block of `size` weights: [1, 1, n]."""
    k = rows.shape[1]
    padded = torch.nn.functional.pad(rows, (0, (1 << (k - 1).bit_length()) - k)).clamp_(-LARGEST, LARGEST)
    mean = total((padded * padded).t()[None])[0, 0] / k
    return mean.repeat_interleave(k // size)[None, None]


def peaks(top: int) -> list[float]:
    """List the levels that make_qx_quants maps the largest weight to: -top first, then -top - 0.1 * i."""
    return [-top, *(-top - 0.1 * i for i in range(-9, 10) if i)]


# Those of quantize_row_iq4_nl_impl.
IQ4_PEAKS = (127, *range(-134, -119))


def scale_fit(x: Tensor, w: Tensor | None, snap: Snap, peak_levels: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Fit a scale to each sub-block from grids that map its largest weight to one of these levels.

    The grid of the largest explained square wins, sum(w*x*q)^2 / sum(w*q*q); the scale is its least squares fit.

    Args:
        w: weights at most 1, or None for x^2.

    Returns:
        the scale, [G, 1, n], and the levels q, [G, B, n].
    """
    peak = outermost(x, 1)
    u = x * _reciprocal(peak)
    w = u * u if w is None else w
    wu = w * u
    best: list[Tensor] = []
    for level in peak_levels:
        q = snap(u * level, torch.empty_like(u))
        uq, qq = total(wu * q), total(w * q * q)
        candidate = [-ratio(uq * uq, qq), ratio(uq, qq), torch.full_like(uq, level)]
        best = keep(best, candidate) if best else candidate
    return best[1] * peak, snap(u * best[2], torch.empty_like(u))


def _reciprocal(t: Tensor) -> Tensor:
    """Return 1 / t; 0 where t is 0."""
    return torch.sign(t) / t.abs().clamp(min=1e-37)


def refined(x: Tensor, w: Tensor, code: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Fit scale * code to x by moving codes in turn, each to its best against the rest.

    x is not negative, or of either sign.

    Args:
        x, w, code: [G, B, n]; the codes of each sub-block are moved together.
        low, high: limits of the codes.

    Returns:
        the scale, [G, 1, n], and the codes.
    """
    code = code.clone()
    wx = w * x
    xq, qq = total(wx * code), total(w * code * code)
    for _ in range(_ROUNDS):
        before = code.clone()
        for i in range(x.shape[1]):
            current, s, ws, v = (t.narrow(1, i, 1) for t in (code, x, wx, w))
            rest_xq, rest_qq = xq - ws * current, qq - v * current * current
            moved = torch.round(s * ratio(rest_qq, rest_xq).clamp_(-LARGEST, LARGEST)).clamp_(low, high)
            new_xq, new_qq = rest_xq + ws * moved, rest_qq + v * moved * moved
            better = ((rest_xq > 0) & (new_qq > 0) & (new_xq * new_xq * qq > xq * xq * new_qq)).float()
            current.lerp_(moved, better)
            xq, qq = torch.lerp(xq, new_xq, better), torch.lerp(qq, new_qq, better)
        # Further rounds would change nothing.
        if torch.equal(code, before):
            break
    return ratio(xq, qq), code


def super_scale(b: Blocks, snap: Snap, peak_levels: Sequence[float], reach: int, spread: float | None) -> tuple[Tensor, Tensor]:
    """Choose d [1, 1, n] and sc [G, 1, n] as Q6_K and IQ4_XS do in libggml.

    The widest scale is -reach * d.

    Args:
        spread: times mean(x^2), under the root of the weights; None where the importance counts as it is.
    """
    w = b.w if b.w is None or spread is None else damped(b.x, b.w, spread * mean_square(b.x))
    return _multiples(scale_fit(b.x, w, snap, peak_levels)[0], reach)


def super_scale_q3(b: Blocks) -> tuple[Tensor, Tensor]:
    """Choose d [1, 1, n] and sc [G, 1, n] as Q3_K does in libggml."""
    if b.w is None:
        peak = outermost(b.x, 1)
        u = b.x * _reciprocal(peak.abs())
        scale, _ = refined(u, u * u, round_to(-4 * peak.sign() * u, -4, 3), -4, 3)
        return _multiples(scale * peak.abs(), 32)
    w = damped(b.x, b.w, 2 * mean_square(b.x))
    scale, _ = scale_fit(b.x, w, integers(-4, 3), peaks(4))
    of_widest = total(w).transpose(0, 1)
    d, sc = scale_fit(scale.transpose(0, 1), of_widest, integers(-32, 31), peaks(32))
    return half(d), sc.transpose(0, 1)


def _multiples(scale: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    widest = outermost(scale, 0)
    return half(widest / -reach), round_to(scale * _reciprocal(widest) * -reach, -reach, reach - 1)


def affine_fit(
    x: Tensor, w: Tensor, top: int, grids: Sequence[float], absolute: bool = False, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """Fit scale * q - offset, offset >= 0, to each sub-block.

    Grids are of (top + grid) steps from the best offset so far.

    Args:
        absolute: whether fits are judged by the absolute error instead of its square.
        exact: whether errors much smaller than x are distinguished, at half the speed.

    Returns:
        scale and offset, [G, 1, n] each.
    """
    offset, high = -x.amin(1, keepdim=True).clamp_(max=0), x.amax(1, keepdim=True)
    sum_w, sum_x = total(w), total(w * x)
    buffer, products = torch.empty_like(x), x.new_empty(3, *x.shape)

    def rounded(steps: float, offset: Tensor) -> Tensor:
        span = (high + offset).clamp_(min=1e-37)
        q = torch.add(x, offset, out=buffer).mul_(steps / span)
        return q.round_().clamp_(0, top)

    def error(q: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        miss = torch.mul(q, scale, out=products[0]).sub_(offset).sub_(x)
        return total_((miss.abs_() if absolute else miss.square_()).mul_(w)).clone()

    exact = exact or absolute
    scale = (high + offset) / top
    loss = error(rounded(top, offset), scale, offset)
    best = [loss if exact else loss - total((x * x).mul_(w)), scale, offset]
    for grid in grids:
        q = rounded(top + grid, best[2])
        wq = torch.mul(w, q, out=products[0])
        torch.mul(wq, x, out=products[1])
        torch.mul(wq, q, out=products[2])
        sum_q, sum_xq, sum_qq = total_(products, 2).unbind(0)
        scale, offset = _least_squares(sum_w, sum_x, sum_q, sum_qq, sum_xq)
        # at a solution the squared error is what follows, and sum(w * x^2)
        loss = error(q, scale, offset) if exact else offset * sum_x - scale * sum_xq
        keep(best, [loss, scale, offset])
    return best[1], best[2]


def _least_squares(sum_w: Tensor, sum_x: Tensor, sum_q: Tensor, sum_qq: Tensor, sum_xq: Tensor) -> tuple[Tensor, Tensor]:
    """Solve for scale and offset >= 0; both 0 where there is no solution."""
    determinant = sum_w * sum_qq - sum_q * sum_q
    inverse = torch.sign(determinant).clamp_(min=0).div_(determinant.clamp(min=1e-37))
    low = (sum_qq * sum_x - sum_q * sum_xq).mul_(inverse)
    scale = (sum_w * sum_xq - sum_x * sum_q).mul_(inverse)
    scale.lerp_(sum_xq / sum_qq.clamp(min=1e-37), torch.sign(low).clamp_(min=0))
    return scale, low.neg_().clamp_(min=0)


def scale_levels(scale: Tensor, w: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Express scales >= 0, [J, G, n], as d * code by weighted least squares: d [J, 1, n] and codes.

    Codes go from 0 to `levels`. The best of nine grids is refined.
    """
    widest = scale.amax(1, keepdim=True)
    u = scale * _reciprocal(widest)
    best: list[Tensor] = []
    for step in (0, -4, -3, -2, -1, 1, 2, 3, 4):
        steps = levels + 0.1 * step
        code = torch.round(u * steps).clamp_(max=levels)
        candidate = [total((u - code / steps).square_().mul_(w)), code]
        best = keep(best, candidate) if best else candidate
    d, code = refined(u, w, best[1], 0, levels)
    return d * widest, code


def super_affine(
    b: Blocks, top: int, levels: int, plain: Sequence[float], weighted: Sequence[float], exact: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose d, dmin [1, 1, n], sc and m [G, 1, n] as Q2_K, Q4_K and Q5_K do in libggml.

    Args:
        plain, weighted: grids of `affine_fit`, without and with importance.
        exact: for `affine_fit`.
    """
    # Q2_K has weights and a measure of its own.
    x, coarse = b.x, top == 3
    if b.w is None:
        w = x.abs() if coarse else x.abs() + (total(x * x) / x.shape[1]).sqrt()
        scale, offset = affine_fit(x, w, top, plain, coarse, exact)
        both = torch.stack([scale, offset]).squeeze(2)
        widest = both.amax(1, keepdim=True)
        d, code = widest / levels, torch.round(both * _reciprocal(widest) * levels).clamp_(max=levels)
    else:
        w = damped(x, b.w, mean_square(x) * (1 if coarse else 2))
        scale, offset = affine_fit(x, w, top, weighted, exact=exact)
        d, code = scale_levels(torch.stack([scale, offset]).squeeze(2), total(w).squeeze(1).expand(2, -1, -1), levels)
    d, dmin = half(d).unbind(0)
    sc, m = code.unsqueeze(2).unbind(0)
    return d[None], dmin[None], sc, m
