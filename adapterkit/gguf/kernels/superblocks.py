"""Q2_K to Q6_K: 256 weights with a float16 scale (and minimum) and small integer scales per sub-block.

Source: ``quantize_row_q*_K_ref`` (no importance) and ``quantize_row_q*_K_impl`` (with importance) of ggml-quants.c.
Every function takes ``x`` and ``importance`` (rows of lanes, ``importance`` None when there is none), a scratch tuple,
the byte rows to fill, and ``subs``, the sub-blocks to loop over.

Scratch is ``(w, codes, q, found)``: weights, candidate levels, final levels, and per sub-block (scale, minimum, inverse
scale of the winner, low of the winner, sum of weights, two integer levels kept as floats).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from adapterkit.gguf.kernels.lanes import (
    all_lanes,
    as_block,
    at,
    div,
    every,
    fabs,
    put,
    put_byte,
    select,
    shared,
    splat,
    sqrt,
    to_float,
    to_int,
)
from adapterkit.gguf.kernels.rounding import clamp, from_half, nearest, to_half
from adapterkit.gguf.kernels.search import (
    TINY,
    descent,
    grid,
    grid_level,
    positive,
    symmetric,
    symmetric_level,
)


def grid_steps(start: float, delta: float, count: int, top: int) -> Any:
    """Numerators ``start + delta * k + top`` for k = 0..count, every operation rounded to float32."""
    k = np.arange(count + 1, dtype=np.float32)
    return (np.float32(start) + np.float32(delta) * k) + np.float32(top)


def symmetric_steps(top: int) -> Any:
    """Numerators ``-top``, then ``-(top + 0.1 k)`` for k = -9..9 without 0."""
    k = np.array([k for k in range(-9, 10) if k], dtype=np.float32)
    return np.concatenate([[np.float32(-top)], -(np.float32(top) + np.float32(0.1) * k)]).astype(np.float32)


def positive_steps(top: int) -> Any:
    """Numerators ``0.1 k + top`` for k = -4..4 without 0."""
    k = np.array([k for k in range(-4, 5) if k], dtype=np.float32)
    return np.float32(0.1) * k + np.float32(top)


Q2_STEPS = grid_steps(-0.5, 0.1, 15, 3)
Q4_STEPS = grid_steps(-1.0, 0.1, 20, 15)
Q5_STEPS = grid_steps(-0.5, 0.1, 15, 31)
GIVEN_3 = grid_steps(-0.9, 0.05, 36, 3)
GIVEN_15 = grid_steps(-0.9, 0.05, 36, 15)
GIVEN_31 = grid_steps(-0.9, 0.05, 36, 31)
SYMMETRIC_4 = symmetric_steps(4)
SYMMETRIC_32 = symmetric_steps(32)
POSITIVE_15 = positive_steps(15)
POSITIVE_63 = positive_steps(63)


@shared
def put_half(out: Any, i: int, half: Any) -> None:
    """Two bytes, little-endian."""
    put_byte(out, i, half)
    put_byte(out, i + 1, half >> 8)


@shared
def given_weights(x: Any, importance: Any, w: Any, sub: Any, n: int, sigma: Any) -> None:
    """``importance * sqrt(sigma + x*x)``."""
    for i in every(n):
        v = at(x, sub, n, i)
        put(w, sub, n, i, at(importance, sub, n, i) * sqrt(sigma + v * v))


@shared
def sum_squares(x: Any, n: int) -> Any:
    """Of all ``n`` weights of a block, in order."""
    flat = as_block(x)
    total = splat(at(flat, 0, n, 0), 0.0)
    for i in range(n):
        v = at(flat, 0, n, i)
        total += v * v
    return total


@shared
def _rms_weights(x: Any, w: Any, sub: Any, n: int) -> None:
    total = splat(at(x, sub, n, 0), 0.0)
    for i in range(n):
        v = at(x, sub, n, i)
        total += v * v
    rms = sqrt(total * 0.03125)
    for i in every(n):
        put(w, sub, n, i, rms + fabs(at(x, sub, n, i)))


@shared
def _top_of(values: Any, count: int) -> Any:
    """The largest of the sub-blocks' values, at least 0."""
    top = splat(at(values, 0, 1, 0), 0.0)
    for s in range(count):
        v = at(values, s, 1, 0)
        top = select(v > top, v, top)
    return top


@shared
def _requantize(x: Any, q: Any, found: Any, subs: Any, n: int, top: int) -> None:
    """Levels for the scales as stored, ``found[5]`` and ``found[6]``; a scale of 0 keeps the search's levels."""
    for sub in subs:
        scale = at(found[5], sub, 1, 0)
        low = at(found[6], sub, 1, 0)
        for i in every(n):
            r = nearest(div(at(x, sub, n, i) + low, scale))
            put(q, sub, n, i, clamp(r, 0, top))
        if not all_lanes(scale != 0.0):
            inverse = at(found[2], sub, 1, 0)
            least = at(found[3], sub, 1, 0)
            for i in every(n):
                kept = to_int(grid_level(at(x, sub, n, i), inverse, least, top * 1.0))
                put(q, sub, n, i, select(scale == 0.0, kept, at(q, sub, n, i)))


@shared
def _pack_six(found: Any, out: Any, d: Any, dmin: Any) -> None:
    """d, dmin, and eight 6-bit scales and minimums (``found[5]``, ``found[6]``), which become what a decoder reads."""
    put_half(out, 0, d)
    put_half(out, 2, dmin)
    scale = from_half(d)
    low = from_half(dmin)
    for j in range(4):
        s = to_int(at(found[5], j, 1, 0))
        m = to_int(at(found[6], j, 1, 0))
        s4 = to_int(at(found[5], j + 4, 1, 0))
        m4 = to_int(at(found[6], j + 4, 1, 0))
        first = (s | ((s4 >> 4) << 6)) & 255
        second = (m | ((m4 >> 4) << 6)) & 255
        third = ((s4 & 15) | ((m4 & 15) << 4)) & 255
        put_byte(out, 4 + j, first)
        put_byte(out, 8 + j, second)
        put_byte(out, 12 + j, third)
        put(found[5], j, 1, 0, scale * to_float(first & 63))
        put(found[6], j, 1, 0, low * to_float(second & 63))
        put(found[5], j + 4, 1, 0, scale * to_float((third & 15) | ((first >> 6) << 4)))
        put(found[6], j + 4, 1, 0, low * to_float((third >> 4) | ((second >> 6) << 4)))


@shared
def _six_bit_plain(x: Any, scratch: Any, out: Any, subs: Any, top: int, steps: Any) -> None:
    """Scales, minimums and levels of Q4_K and Q5_K: bytes 0..15 and ``q``."""
    w, codes, q, found = scratch
    for sub in subs:
        _rms_weights(x, w, sub, 32)
        grid(x, w, codes, found, sub, 32, top * 1.0, steps, False, False)
    scale = _top_of(found[0], 8)
    low = _top_of(found[1], 8)
    scale_inverse = select(scale > 0.0, div(63.0, scale), 0.0)
    low_inverse = select(low > 0.0, div(63.0, low), 0.0)
    for s in range(8):
        put(found[5], s, 1, 0, to_float(clamp(nearest(scale_inverse * at(found[0], s, 1, 0)) & 255, 0, 63)))
        put(found[6], s, 1, 0, to_float(clamp(nearest(low_inverse * at(found[1], s, 1, 0)) & 255, 0, 63)))
    _pack_six(found, out, to_half(div(scale, 63.0)), to_half(div(low, 63.0)))
    _requantize(x, q, found, subs, 32, top)


@shared
def _six_bit_given(
    x: Any, importance: Any, scratch: Any, out: Any, subs: Any, top: int, steps: Any, cap: float
) -> None:
    """The same with importance; ``cap`` bounds the scales, as C does for Q5_K only."""
    w, codes, q, found = scratch
    spread = sum_squares(x, 256) * 0.0078125
    for sub in subs:
        given_weights(x, importance, w, sub, 32, spread)
        grid(x, w, codes, found, sub, 32, top * 1.0, steps, False, True)
    sums = as_block(found[4])
    d = to_half(positive(as_block(found[0]), sums, as_block(found[5]), 8, 63.0, POSITIVE_63))
    dmin = to_half(positive(as_block(found[1]), sums, as_block(found[6]), 8, 63.0, POSITIVE_63))
    for s in range(8):
        put(found[5], s, 1, 0, clamp(at(found[5], s, 1, 0), 0.0, cap))
        put(found[6], s, 1, 0, clamp(at(found[6], s, 1, 0), 0.0, cap))
    _pack_six(found, out, d, dmin)
    _requantize(x, q, found, subs, 32, top)


@shared
def _pack_q4(q: Any, out: Any) -> None:
    for pair in range(4):
        for i in every(32):
            put_byte(out, 16 + 32 * pair + i, at(q, 2 * pair, 32, i) | (at(q, 2 * pair + 1, 32, i) << 4))


@shared
def q4_k(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """144 bytes: d, dmin, 12 of scales, 128 of 4-bit levels."""
    _six_bit_plain(x, scratch, out, subs, 15, Q4_STEPS)
    _pack_q4(scratch[2], out)


@shared
def q4_k_given(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """Q4_K with importance."""
    _six_bit_given(x, importance, scratch, out, subs, 15, GIVEN_15, 255.0)
    _pack_q4(scratch[2], out)


@shared
def _pack_q5(q: Any, out: Any) -> None:
    for i in every(32):
        high = at(q, 0, 32, i) >> 4
        for s in range(1, 8):
            high = high | ((at(q, s, 32, i) >> 4) << s)
        put_byte(out, 16 + i, high)
        for pair in range(4):
            put_byte(out, 48 + 32 * pair + i, (at(q, 2 * pair, 32, i) & 15) | ((at(q, 2 * pair + 1, 32, i) & 15) << 4))


@shared
def q5_k(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """176 bytes: d, dmin, 12 of scales, 32 of fifth bits, 128 of the other four."""
    _six_bit_plain(x, scratch, out, subs, 31, Q5_STEPS)
    _pack_q5(scratch[2], out)


@shared
def q5_k_given(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """Q5_K with importance."""
    _six_bit_given(x, importance, scratch, out, subs, 31, GIVEN_31, 63.0)
    _pack_q5(scratch[2], out)


@shared
def _pack_two(q: Any, out: Any, at_byte: int) -> None:
    """256 levels, their low two bits, into 64 bytes."""
    flat = as_block(q)
    for half in range(2):
        for i in every(32):
            e = 128 * half + i
            low = (at(flat, 0, 256, e) & 3) | ((at(flat, 0, 256, e + 32) & 3) << 2)
            high = ((at(flat, 0, 256, e + 64) & 3) << 4) | ((at(flat, 0, 256, e + 96) & 3) << 6)
            put_byte(out, at_byte + 32 * half + i, low | high)


@shared
def _finish_q2(x: Any, scratch: Any, out: Any, subs: Any, d: Any, dmin: Any) -> None:
    q, found = scratch[2], scratch[3]
    put_half(out, 80, d)
    put_half(out, 82, dmin)
    for s in range(16):
        both = (to_int(at(found[5], s, 1, 0)) | (to_int(at(found[6], s, 1, 0)) << 4)) & 255
        put_byte(out, s, both)
        put(found[5], s, 1, 0, from_half(d) * to_float(both & 15))
        put(found[6], s, 1, 0, from_half(dmin) * to_float(both >> 4))
    _requantize(x, q, found, subs, 16, 3)
    _pack_two(q, out, 16)


@shared
def q2_k(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """84 bytes: 16 of 4-bit scale and minimum, 64 of 2-bit levels, d, dmin."""
    w, codes, _q, found = scratch
    for sub in subs:
        for i in every(16):
            put(w, sub, 16, i, fabs(at(x, sub, 16, i)))
        grid(x, w, codes, found, sub, 16, 3.0, Q2_STEPS, True, False)
    scale = _top_of(found[0], 16)
    low = _top_of(found[1], 16)
    scale_inverse = select(scale > 0.0, div(15.0, scale), 0.0)
    low_inverse = select(low > 0.0, div(15.0, low), 0.0)
    for s in range(16):
        put(found[5], s, 1, 0, to_float(nearest(scale_inverse * at(found[0], s, 1, 0))))
        put(found[6], s, 1, 0, to_float(nearest(low_inverse * at(found[1], s, 1, 0))))
    _finish_q2(x, scratch, out, subs, to_half(div(scale, 15.0)), to_half(div(low, 15.0)))


@shared
def q2_k_given(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """Q2_K with importance."""
    w, codes, _q, found = scratch
    spread = sum_squares(x, 256) * 0.00390625
    for sub in subs:
        given_weights(x, importance, w, sub, 16, spread)
        grid(x, w, codes, found, sub, 16, 3.0, GIVEN_3, False, True)
    sums = as_block(found[4])
    d = to_half(positive(as_block(found[0]), sums, as_block(found[5]), 16, 15.0, POSITIVE_15))
    dmin = to_half(positive(as_block(found[1]), sums, as_block(found[6]), 16, 15.0, POSITIVE_15))
    _finish_q2(x, scratch, out, subs, d, dmin)


@shared
def _largest_scale(scales: Any) -> Any:
    """Of sixteen scales the first with the largest magnitude."""
    value = splat(at(scales, 0, 1, 0), 0.0)
    for s in range(16):
        v = at(scales, s, 1, 0)
        value = select(fabs(v) > fabs(value), v, value)
    return value


@shared
def _finish_q3(x: Any, scratch: Any, out: Any, subs: Any, d: Any) -> None:
    """``found[5]`` has the scales' levels 0..63, ``codes`` the search's levels."""
    _w, codes, q, found = scratch
    put_half(out, 108, d)
    for j in range(8):
        low = to_int(at(found[5], j, 1, 0)) & 15
        put_byte(out, 96 + j, low | ((to_int(at(found[5], j + 8, 1, 0)) & 15) << 4))
    for j in range(4):
        high = to_int(at(found[5], j, 1, 0)) >> 4
        for part in range(1, 4):
            high = high | ((to_int(at(found[5], j + 4 * part, 1, 0)) >> 4) << (2 * part))
        put_byte(out, 104 + j, high)
    for s in range(16):
        put(found[5], s, 1, 0, from_half(d) * (at(found[5], s, 1, 0) - 32.0))
    for sub in subs:
        scale = at(found[5], sub, 1, 0)
        for i in every(16):
            r = clamp(nearest(div(at(x, sub, 16, i), scale)), -4, 3) + 4
            put(q, sub, 16, i, select(scale == 0.0, to_int(at(codes, sub, 16, i)), r))
    flat = as_block(q)
    for i in every(32):
        high = at(flat, 0, 256, i) >> 2
        for bit in range(1, 8):
            high = high | ((at(flat, 0, 256, 32 * bit + i) >> 2) << bit)
        put_byte(out, i, high)
    _pack_two(q, out, 32)


@shared
def q3_k(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """110 bytes: 32 of third bits, 64 of the other two, 12 of 6-bit scales, d."""
    _w, codes, _q, found = scratch
    for sub in subs:
        descent(x, codes, found, sub, 16, 4.0)
    largest = _largest_scale(found[0])
    some = largest != 0.0
    inverse = div(-32.0, largest)
    for s in range(16):
        level = clamp(nearest(inverse * at(found[0], s, 1, 0)), -32, 31) + 32
        put(found[5], s, 1, 0, to_float(select(some, level, 0)))
    _finish_q3(x, scratch, out, subs, select(some, to_half(div(1.0, inverse)), 0))


@shared
def q3_k_given(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """Q3_K with importance: another search, and one for the scales of the sub-blocks, weighed by their sums."""
    w, codes, _q, found = scratch
    spread = sum_squares(x, 256) * 0.0078125
    for sub in subs:
        given_weights(x, importance, w, sub, 16, spread)
        total = splat(at(w, sub, 16, 0), 0.0)
        for i in range(16):
            wi = at(w, sub, 16, i)
            total = total + wi
            put(codes, sub, 16, i, wi * at(x, sub, 16, i))
        put(found[4], sub, 1, 0, total)
        symmetric(x, w, codes, found[0], found[2], sub, 16, 4.0, SYMMETRIC_4)
        inverse = at(found[2], sub, 1, 0)
        for i in every(16):
            put(codes, sub, 16, i, symmetric_level(at(x, sub, 16, i), inverse, 4.0))
    for s in range(16):
        put(found[1], s, 1, 0, at(found[4], s, 1, 0) * at(found[0], s, 1, 0))
    scales = as_block(found[0])
    symmetric(scales, as_block(found[4]), as_block(found[1]), found[5], found[6], 0, 16, 32.0, SYMMETRIC_32)
    d = to_half(at(found[5], 0, 1, 0))
    inverse = at(found[6], 0, 1, 0)
    for s in range(16):
        put(found[5], s, 1, 0, symmetric_level(at(found[0], s, 1, 0), inverse, 32.0))
    _finish_q3(x, scratch, out, subs, d)


@shared
def _weighted_q6(x: Any, scratch: Any, out: Any, subs: Any) -> None:
    """Q6_K for the weights in ``w``."""
    w, codes, q, found = scratch
    for sub in subs:
        for i in every(16):
            put(codes, sub, 16, i, at(w, sub, 16, i) * at(x, sub, 16, i))
        symmetric(x, w, codes, found[0], found[2], sub, 16, 32.0, SYMMETRIC_32)
    largest = _largest_scale(found[0])
    dead = fabs(largest) < TINY
    inverse = div(-128.0, largest)
    d = select(dead, 0, to_half(div(1.0, inverse)))
    put_half(out, 208, d)
    for s in range(16):
        level = nearest(inverse * at(found[0], s, 1, 0))
        level = select(dead, 0, select(level < 127, level, 127))
        put_byte(out, 192 + s, level)
        put(found[5], s, 1, 0, from_half(d) * to_float(level))
    for sub in subs:
        scale = at(found[5], sub, 1, 0)
        winner = at(found[2], sub, 1, 0)
        for i in every(16):
            v = at(x, sub, 16, i)
            r = clamp(nearest(div(v, scale)), -32, 31) + 32
            r = select(scale == 0.0, to_int(symmetric_level(v, winner, 32.0)), r)
            put(q, sub, 16, i, select(dead, 0, r))
    flat = as_block(q)
    for half in range(2):
        for i in every(32):
            e = 128 * half + i
            q1 = at(flat, 0, 256, e)
            q2 = at(flat, 0, 256, e + 32)
            q3 = at(flat, 0, 256, e + 64)
            q4 = at(flat, 0, 256, e + 96)
            put_byte(out, 64 * half + i, (q1 & 15) | ((q3 & 15) << 4))
            put_byte(out, 64 * half + i + 32, (q2 & 15) | ((q4 & 15) << 4))
            put_byte(out, 128 + 32 * half + i, (q1 >> 4) | ((q2 >> 4) << 2) | ((q3 >> 4) << 4) | ((q4 >> 4) << 6))


@shared
def q6_k(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """210 bytes: 128 of low four bits, 64 of high two, 16 of 8-bit scales, d."""
    for sub in subs:
        for i in every(16):
            v = at(x, sub, 16, i)
            put(scratch[0], sub, 16, i, v * v)
    _weighted_q6(x, scratch, out, subs)


@shared
def q6_k_given(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """Q6_K with importance, which is the weight itself here."""
    for sub in subs:
        for i in every(16):
            put(scratch[0], sub, 16, i, at(importance, sub, 16, i))
    _weighted_q6(x, scratch, out, subs)
