"""Types whose levels come from a table: IQ4_NL, IQ4_XS, TQ1_0, TQ2_0 and MXFP4.

Source: ``quantize_row_iq4_nl_impl``, ``quantize_row_tq1_0_ref``, ``quantize_row_tq2_0_ref`` and
``quantize_row_mxfp4_ref`` of ggml-quants.c. Arguments as in :mod:`adapterkit.gguf.kernels.superblocks`.
"""

from __future__ import annotations

from typing import Any

from adapterkit.gguf.kernels import wide
from adapterkit.gguf.kernels.lanes import (
    as_block,
    at,
    bits,
    by_torch,
    div,
    every,
    fabs,
    from_bits,
    put,
    put_byte,
    select,
    shared,
    splat,
    to_float,
    to_int,
)
from adapterkit.gguf.kernels.legacy import inverse_or_zero, put_four
from adapterkit.gguf.kernels.rounding import clamp, nearest, to_half
from adapterkit.gguf.kernels.search import TINY, largest
from adapterkit.gguf.kernels.superblocks import given_weights, put_half, sum_squares


@by_torch(wide.nonlinear_index)
def _nonlinear_index(value: Any) -> Any:
    """Which of IQ4's sixteen levels is nearest to ``value``; the upper one on a tie."""
    index = select(value >= -115.5, 1, splat_int(value))
    index = select(value >= -93.5, 2, index)
    index = select(value >= -74.0, 3, index)
    index = select(value >= -57.0, 4, index)
    index = select(value >= -42.0, 5, index)
    index = select(value >= -28.5, 6, index)
    index = select(value >= -16.0, 7, index)
    index = select(value >= -4.5, 8, index)
    index = select(value >= 7.0, 9, index)
    index = select(value >= 19.0, 10, index)
    index = select(value >= 31.5, 11, index)
    index = select(value >= 45.5, 12, index)
    index = select(value >= 61.0, 13, index)
    index = select(value >= 79.0, 14, index)
    return select(value >= 101.0, 15, index)


@shared
def splat_int(like: Any) -> Any:
    """Integer zeros shaped like ``like``."""
    return to_int(splat(like, 0.0))


@shared
def _nonlinear_value(value: Any) -> Any:
    """The nearest of IQ4's levels -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113."""
    level = select(value >= -115.5, -104.0, splat(value, -127.0))
    level = select(value >= -93.5, -83.0, level)
    level = select(value >= -74.0, -65.0, level)
    level = select(value >= -57.0, -49.0, level)
    level = select(value >= -42.0, -35.0, level)
    level = select(value >= -28.5, -22.0, level)
    level = select(value >= -16.0, -10.0, level)
    level = select(value >= -4.5, 1.0, level)
    level = select(value >= 7.0, 13.0, level)
    level = select(value >= 19.0, 25.0, level)
    level = select(value >= 31.5, 38.0, level)
    level = select(value >= 45.5, 53.0, level)
    level = select(value >= 61.0, 69.0, level)
    level = select(value >= 79.0, 89.0, level)
    return select(value >= 101.0, 113.0, level)


@by_torch(wide.nonlinear_sums)
def _nonlinear_sums(x: Any, w: Any, sub: Any, inverse: Any) -> Any:
    sum_qx = splat(inverse, 0.0)
    sum_qq = splat(inverse, 0.0)
    for i in range(32):
        v = at(x, sub, 32, i)
        level = _nonlinear_value(inverse * v)
        wq = at(w, sub, 32, i) * level
        sum_qx += wq * v
        sum_qq += wq * level
    return sum_qx, sum_qq


@shared
def _nonlinear(x: Any, w: Any, found: Any, sub: Any) -> None:
    """Scale for IQ4's levels into ``found[0]``: one guess and 15 candidates."""
    size, value = largest(x, sub, 32)
    sum_qx, sum_qq = _nonlinear_sums(x, w, sub, div(1.0, div(-value, -127.0)))
    scale = select(sum_qq > 0.0, sum_qx / sum_qq, 0.0)
    best = scale * sum_qx
    for k in range(-7, 8):
        sum_qx, sum_qq = _nonlinear_sums(x, w, sub, div((k - 127) * 1.0, value))
        better = (sum_qq > 0.0) & (sum_qx * sum_qx > best * sum_qq)
        scale = select(better, sum_qx / sum_qq, scale)
        best = select(better, scale * sum_qx, best)
    put(found[0], sub, 1, 0, select(size < TINY, 0.0, scale))


@shared
def _square_weights(x: Any, w: Any, sub: Any) -> None:
    for i in every(32):
        v = at(x, sub, 32, i)
        put(w, sub, 32, i, v * v)


@shared
def _finish_nl(x: Any, scratch: Any, out: Any) -> None:
    w, _codes, q, found = scratch
    _nonlinear(x, w, found, 0)
    scale = at(found[0], 0, 1, 0)
    inverse = inverse_or_zero(scale)
    for i in every(32):
        put(q, 0, 32, i, _nonlinear_index(inverse * at(x, 0, 32, i)))
    put_half(out, 0, to_half(scale))
    put_four(q, out, 2)


@shared
def iq4_nl(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """18 bytes: d, 4-bit indices of levels."""
    _square_weights(x, scratch[0], 0)
    _finish_nl(x, scratch, out)


@shared
def iq4_nl_given(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """IQ4_NL with importance."""
    given_weights(x, importance, scratch[0], 0, 32, sum_squares(x, 32) * 0.0625)
    _finish_nl(x, scratch, out)


@shared
def _finish_xs(x: Any, scratch: Any, out: Any, subs: Any) -> None:
    w, _codes, q, found = scratch
    for sub in subs:
        _nonlinear(x, w, found, sub)
    largest_scale = splat(at(found[0], 0, 1, 0), 0.0)
    for s in range(8):
        v = at(found[0], s, 1, 0)
        largest_scale = select(fabs(v) > fabs(largest_scale), v, largest_scale)
    d = -largest_scale * 0.03125
    inverse = inverse_or_zero(d)
    for s in range(8):
        level = clamp(nearest(inverse * at(found[0], s, 1, 0)), -32, 31)
        put(found[1], s, 1, 0, d * to_float(level))
        put(found[2], s, 1, 0, to_float(level + 32))
    for sub in subs:
        inverse = inverse_or_zero(at(found[1], sub, 1, 0))
        for i in every(32):
            put(q, sub, 32, i, _nonlinear_index(inverse * at(x, sub, 32, i)))
    put_half(out, 0, to_half(d))
    for byte in range(2):
        high = to_int(at(found[2], 4 * byte, 1, 0)) >> 4
        for j in range(1, 4):
            high = high | ((to_int(at(found[2], 4 * byte + j, 1, 0)) >> 4) << (2 * j))
        put_byte(out, 2 + byte, high)
    for j in range(4):
        low = to_int(at(found[2], 2 * j, 1, 0)) & 15
        put_byte(out, 4 + j, low | ((to_int(at(found[2], 2 * j + 1, 1, 0)) & 15) << 4))
    for s in range(8):
        for i in every(16):
            put_byte(out, 8 + 16 * s + i, at(q, s, 32, i) | (at(q, s, 32, i + 16) << 4))


@shared
def iq4_xs(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """136 bytes: d, 2 of high scale bits, 4 of low scale bits, 128 of 4-bit indices."""
    for sub in subs:
        _square_weights(x, scratch[0], sub)
    _finish_xs(x, scratch, out, subs)


@shared
def iq4_xs_given(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """IQ4_XS with importance."""
    spread = sum_squares(x, 256) * 0.0078125
    for sub in subs:
        given_weights(x, importance, scratch[0], sub, 32, spread)
    _finish_xs(x, scratch, out, subs)


@shared
def _trits(x: Any, q: Any) -> Any:
    """Levels 0, 1, 2 for -d, 0, d into ``q``; d, the largest magnitude."""
    flat = as_block(x)
    digits = as_block(q)
    size, _ = largest(flat, 0, 256)
    inverse = inverse_or_zero(size)
    for i in every(256):
        v = at(flat, 0, 256, i) * inverse
        up = (v >= 0.5) & (v < 2.0)  # an infinite product is 0 in C's cast
        down = (v <= -0.5) & (v > -2.0)
        put(digits, 0, 256, i, select(up, 2, select(down, 0, splat_int(v) + 1)))
    return size


@shared
def _five(value: Any) -> Any:
    """A number below 3**5 as the fraction of 256 that TQ1_0 stores: ``ceil(value * 256 / 243)``."""
    return to_int(div(to_float(value * 256 + 242), 243.0))


@shared
def tq1_0(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """54 bytes: 48 of five trits, 4 of four, d."""
    q = as_block(scratch[2])
    put_half(out, 52, to_half(_trits(x, scratch[2])))
    for i in every(32):
        value = at(q, 0, 256, i)
        for digit in range(1, 5):
            value = value * 3 + at(q, 0, 256, i + 32 * digit)
        put_byte(out, i, _five(value))
    for i in every(16):
        value = at(q, 0, 256, i + 160)
        for digit in range(1, 5):
            value = value * 3 + at(q, 0, 256, i + 160 + 16 * digit)
        put_byte(out, i + 32, _five(value))
    for i in every(4):
        value = at(q, 0, 256, 240 + i)
        for digit in range(1, 4):
            value = value * 3 + at(q, 0, 256, 240 + i + 4 * digit)
        put_byte(out, 48 + i, _five(value * 3))


@shared
def tq2_0(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """66 bytes: 64 of four 2-bit trits, d."""
    q = as_block(scratch[2])
    put_half(out, 64, to_half(_trits(x, scratch[2])))
    for half in range(2):
        for i in every(32):
            e = 128 * half + i
            low = at(q, 0, 256, e) | (at(q, 0, 256, e + 32) << 2)
            put_byte(out, 32 * half + i, low | (at(q, 0, 256, e + 64) << 4) | (at(q, 0, 256, e + 96) << 6))


@shared
def _log2_floor(value: Any) -> Any:
    """``floor(log2f(value))`` for positive values: the exponent, one more where log2f rounds up to it."""
    small = value < 1.1754943508222875e-38
    raw = bits(select(small, value * 16777216.0, value))
    exponent = (raw >> 23) - 127 - select(small, 24, splat_int(value))
    above = to_float(exponent + 1)
    missing = to_float(0x800000 - (raw & 0x7FFFFF))  # of the next power of two, in units of 2**-24 of it
    return select(above - missing * 8.599148e-08 == above, exponent + 1, exponent)


@shared
def mxfp4(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """17 bytes: an exponent, 4-bit floats (sign, 0 0.5 1 1.5 2 3 4 6). Ties go to the smaller magnitude."""
    q = scratch[2]
    size, _ = largest(x, 0, 32)
    exponent = select(size > 0.0, (_log2_floor(size) + 125) & 255, 0)
    put_byte(out, 0, exponent)
    half = select(exponent < 2, (exponent + 1) << 21, (exponent - 1) << 23)
    unit = from_bits(half)
    for i in every(32):
        v = at(x, 0, 32, i)
        r = div(fabs(v), unit)
        index = select(r > 0.5, 1, splat_int(v))
        index = select(r > 1.5, 2, index)
        index = select(r > 2.5, 3, index)
        index = select(r > 3.5, 4, index)
        index = select(r > 5.0, 5, index)
        index = select(r > 7.0, 6, index)
        index = select(r > 10.0, 7, index)
        put(q, 0, 32, i, select((v < 0.0) & (r > 0.5), index + 8, index))
    put_four(q, out, 1)
