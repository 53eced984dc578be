"""The searches of ggml-quants.c for a block's scale (and minimum), on lanes.

Formulas: ``make_qkx2_quants``, ``make_qkx3_quants``, ``make_qx_quants``, ``make_q3_quants``, ``make_qp_quants`` and
``quantize_row_iq4_nl_impl`` of llama.cpp. The sums keep C's order, left to right over a block's elements. Levels are
kept as floats, which hold them exactly. A candidate's levels are not stored when it wins: its inverse scale and its
minimum are, and :func:`grid_levels` and :func:`symmetric_levels` make the levels from them for whoever needs them.
"""

from __future__ import annotations

from typing import Any

from adapterkit.gguf.kernels import wide
from adapterkit.gguf.kernels.lanes import (
    all_lanes,
    at,
    by_torch,
    div,
    every,
    fabs,
    put,
    select,
    shared,
    splat,
    to_float,
)
from adapterkit.gguf.kernels.rounding import IN_RANGE, clamp, level, nearest

TINY = 1e-15  # GROUP_MAX_EPS


@by_torch(wide.grid_sums)
def _grid_sums(x: Any, w: Any, codes: Any, sub: Any, n: int, inverse: Any, low: Any, top: Any, exact: Any) -> Any:
    """Levels of one candidate into ``codes``; the weighted sums of level, level squared and level times x."""
    sum_l = splat(inverse, 0.0)
    sum_ll = splat(inverse, 0.0)
    sum_xl = splat(inverse, 0.0)
    for i in range(n):
        v = at(x, sub, n, i)
        if exact:
            q = clamp(to_float(nearest(inverse * (v - low))), 0.0, top)
        else:
            q = level(inverse * (v - low), 0.0, top)
        put(codes, sub, n, i, q)
        wq = at(w, sub, n, i) * q
        sum_l += wq
        sum_ll += wq * q
        sum_xl += wq * v
    return sum_l, sum_ll, sum_xl


@by_torch(wide.grid_error)
def _grid_error(x: Any, w: Any, codes: Any, sub: Any, n: int, scale: Any, low: Any, absolute: Any) -> Any:
    """Weighted error of ``scale * level + low``."""
    error = splat(scale, 0.0)
    if absolute:
        for i in range(n):
            error += at(w, sub, n, i) * fabs((scale * at(codes, sub, n, i) + low) - at(x, sub, n, i))
    else:
        for i in range(n):
            d = (scale * at(codes, sub, n, i) + low) - at(x, sub, n, i)
            error += at(w, sub, n, i) * (d * d)
    return error


@shared
def grid(
    x: Any, w: Any, codes: Any, found: Any, sub: Any, n: int, top: Any, steps: Any, absolute: Any, guarded: Any
) -> None:
    """Scale and minimum of ``scale * level - minimum``, levels 0..top: ``found`` gets both, and inverse, low, sum of w.

    ``steps`` are the candidates' numerators. ``guarded`` is make_qkx3's clamp before rounding; without it values out of
    the rounding trick's range give the bits that make_qkx2 gets.
    """
    v = at(x, sub, n, 0)
    least = v
    most = v
    sum_w = at(w, sub, n, 0)
    sum_x = sum_w * v
    for i in range(1, n):
        v = at(x, sub, n, i)
        wi = at(w, sub, n, i)
        least = select(v < least, v, least)
        most = select(v > most, v, most)
        sum_w = sum_w + wi
        sum_x = sum_x + wi * v
    low = select(least > 0.0, 0.0, least)
    flat = most == low
    inverse = div(top, most - low)
    scale = div(1.0, inverse)
    regular = (fabs(inverse * (most - low)) < IN_RANGE) | flat
    _grid_sums(x, w, codes, sub, n, inverse, low, top, not all_lanes(regular))
    best = _grid_error(x, w, codes, sub, n, scale, low, absolute)
    scale = select(flat, 0.0, scale)
    best_inverse = inverse
    best_low = low
    for k in range(len(steps)):
        inverse = div(steps[k], most - low)
        if guarded:
            exact = False
        else:
            regular = (fabs(inverse * (most - low)) < IN_RANGE) & (fabs(inverse * (least - low)) < IN_RANGE)
            exact = not all_lanes(regular | flat)
        sum_l, sum_ll, sum_xl = _grid_sums(x, w, codes, sub, n, inverse, low, top, exact)
        det = sum_w * sum_ll - sum_l * sum_l
        new_scale = (sum_w * sum_xl - sum_x * sum_l) / det
        new_low = (sum_ll * sum_x - sum_l * sum_xl) / det
        above = new_low > 0.0
        new_scale = select(above, sum_xl / sum_ll, new_scale)
        new_low = select(above, 0.0, new_low)
        error = _grid_error(x, w, codes, sub, n, new_scale, new_low, absolute)
        better = (det > 0.0) & (error < best) & ~flat
        best = select(better, error, best)
        scale = select(better, new_scale, scale)
        best_inverse = select(better, inverse, best_inverse)
        best_low = select(better, low, best_low)
        low = select(better, new_low, low)
    put(found[0], sub, 1, 0, scale)
    put(found[1], sub, 1, 0, -low)
    put(found[2], sub, 1, 0, select(flat, 0.0, best_inverse))
    put(found[3], sub, 1, 0, best_low)
    put(found[4], sub, 1, 0, sum_w)


@shared
def grid_level(v: Any, inverse: Any, low: Any, top: Any) -> Any:
    """The level that :func:`grid` gave ``v``, from the candidate that won."""
    return clamp(to_float(nearest(inverse * (v - low))), 0.0, top)


@shared
def largest(x: Any, sub: Any, n: int) -> Any:
    """Largest magnitude of a sub-block, and the first element that has it."""
    size = splat(at(x, sub, n, 0), 0.0)
    value = size
    for i in range(n):
        v = at(x, sub, n, i)
        larger = fabs(v) > size
        size = select(larger, fabs(v), size)
        value = select(larger, v, value)
    return size, value


@by_torch(wide.symmetric_sums)
def _symmetric_sums(x: Any, w: Any, wx: Any, sub: Any, n: int, inverse: Any, low: Any, high: Any) -> Any:
    sum_lx = splat(inverse, 0.0)
    sum_ll = splat(inverse, 0.0)
    for i in range(n):
        q = level(inverse * at(x, sub, n, i), low, high)
        sum_lx += at(wx, sub, n, i) * q
        sum_ll += (at(w, sub, n, i) * q) * q
    return sum_lx, sum_ll


@shared
def symmetric(x: Any, w: Any, wx: Any, scales: Any, inverses: Any, sub: Any, n: int, top: Any, steps: Any) -> None:
    """Scale of ``scale * level``, levels -top..top-1, and the winner's inverse scale. ``wx`` is ``w * x``.

    ``steps`` are the numerators: -top first, then the candidates. ``inverse`` is 0 for a block of zeros.
    """
    size, value = largest(x, sub, n)
    empty = size < TINY
    best_inverse = div(steps[0], value)
    sum_lx, sum_ll = _symmetric_sums(x, w, wx, sub, n, best_inverse, -top, top - 1.0)
    scale = select(sum_ll != 0.0, sum_lx / sum_ll, 0.0)
    best = scale * sum_lx
    for k in range(1, len(steps)):
        inverse = div(steps[k], value)
        sum_lx, sum_ll = _symmetric_sums(x, w, wx, sub, n, inverse, -top, top - 1.0)
        better = (sum_ll > 0.0) & (sum_lx * sum_lx > best * sum_ll)
        scale = select(better, sum_lx / sum_ll, scale)
        best = select(better, scale * sum_lx, best)
        best_inverse = select(better, inverse, best_inverse)
    put(scales, sub, 1, 0, select(empty, 0.0, scale))
    put(inverses, sub, 1, 0, select(empty, 0.0, best_inverse))


@shared
def symmetric_level(v: Any, inverse: Any, top: Any) -> Any:
    """The level 0..2*top-1 that :func:`symmetric` gave ``v``; a block of zeros has 0, not ``top``."""
    return select(inverse == 0.0, 0.0, level(inverse * v, -top, top - 1.0) + top)


@shared
def descent(x: Any, codes: Any, found: Any, sub: Any, n: int, top: Any) -> None:
    """``make_q3_quants``: coordinate descent from the plain levels, weights x*x; levels plus ``top`` into ``codes``."""
    size, value = largest(x, sub, n)
    empty = size < TINY
    inverse = div(-top, value)
    sum_lx = splat(size, 0.0)
    sum_ll = splat(size, 0.0)
    for i in range(n):
        v = at(x, sub, n, i)
        q = level(inverse * v, -top, top - 1.0)
        put(codes, sub, n, i, q)
        w = v * v
        sum_lx += (w * v) * q
        sum_ll += (w * q) * q
    for _sweep in range(5):
        settled = size >= 0.0
        for i in range(n):
            v = at(x, sub, n, i)
            q = at(codes, sub, n, i)
            w = v * v
            wx = w * v
            lx = sum_lx - wx * q
            ll = sum_ll - (w * q) * q
            new = clamp(to_float(nearest((v * ll) / lx)), -top, top - 1.0)
            new_lx = lx + wx * new
            new_ll = ll + (w * new) * new
            moved = (lx > 0.0) & (new != q) & (new_ll > 0.0)
            moved = moved & ((new_lx * new_lx) * sum_ll > (sum_lx * sum_lx) * new_ll)
            put(codes, sub, n, i, select(moved, new, q))
            sum_lx = select(moved, new_lx, sum_lx)
            sum_ll = select(moved, new_ll, sum_ll)
            settled = settled & ~moved
        if all_lanes(settled):
            break
    for i in every(n):
        put(codes, sub, n, i, select(empty, 0.0, at(codes, sub, n, i) + top))
    put(found[0], sub, 1, 0, select(empty | ~(sum_ll > 0.0), 0.0, sum_lx / sum_ll))


@shared
def positive(x: Any, w: Any, codes: Any, n: int, top: Any, steps: Any) -> Any:
    """``make_qp_quants``: scale for values >= 0, levels 0..top into ``codes``: a search, then descent.

    ``x``, ``w``, ``codes`` are one sub-block of ``n`` elements. C keeps levels in eight bits, so negative ones wrap.
    """
    most = splat(at(x, 0, n, 0), 0.0)
    for i in range(n):
        v = at(x, 0, n, i)
        most = select(most > v, most, v)
    empty = most < TINY
    best_inverse = div(top, most)
    scale = div(1.0, best_inverse)
    best = splat(most, 0.0)
    for i in range(n):
        v = at(x, 0, n, i)
        d = v - scale * to_float(nearest(best_inverse * v) & 255)
        best += (at(w, 0, n, i) * d) * d
    for k in range(len(steps)):
        inverse = div(steps[k], most)
        scale = div(1.0, inverse)
        error = splat(most, 0.0)
        for i in range(n):
            v = at(x, 0, n, i)
            q = to_float(nearest(inverse * v))
            d = v - scale * select(q < top, q, top)
            error += (at(w, 0, n, i) * d) * d
        better = error < best
        best = select(better, error, best)
        best_inverse = select(better, inverse, best_inverse)
    sum_lx = splat(most, 0.0)
    sum_ll = splat(most, 0.0)
    for i in range(n):
        v = at(x, 0, n, i)
        w_i = at(w, 0, n, i)
        q = to_float(nearest(best_inverse * v))
        q = select(q < top, q, top)
        put(codes, 0, n, i, q)
        sum_lx += (w_i * v) * q
        sum_ll += (w_i * q) * q
    for i in every(n):
        q = at(codes, 0, n, i)
        put(codes, 0, n, i, select(q < 0.0, to_float(nearest(q) & 255), q))
    for _sweep in range(5):
        settled = empty | ~empty
        for i in range(n):
            v = at(x, 0, n, i)
            q = at(codes, 0, n, i)
            w_i = at(w, 0, n, i)
            lx = sum_lx - (w_i * v) * q
            ll = sum_ll - (w_i * q) * q
            new = to_float(nearest((v * ll) / lx))
            new = select(new < top, new, top)
            new_lx = lx + (w_i * v) * new
            new_ll = ll + (w_i * new) * new
            moved = (lx > 0.0) & (ll > 0.0) & (new != q)
            moved = moved & ((new_lx * new_lx) * sum_ll > (sum_lx * sum_lx) * new_ll)
            wrapped = select(new < 0.0, to_float(nearest(new) & 255), new)
            put(codes, 0, n, i, select(moved, wrapped, q))
            sum_lx = select(moved, new_lx, sum_lx)
            sum_ll = select(moved, new_ll, sum_ll)
            settled = settled & ~moved
        if all_lanes(settled):
            break
    for i in every(n):
        put(codes, 0, n, i, select(empty, 0.0, at(codes, 0, n, i)))
    return select(empty | ~(sum_ll > 0.0), 0.0, sum_lx / sum_ll)
