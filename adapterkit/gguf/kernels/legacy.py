"""Blocks of 32 weights with one float16 scale: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.

Source: ``quantize_row_q*_ref`` and ``quantize_row_q*_impl`` of ggml-quants.c. Arguments as in
:mod:`adapterkit.gguf.kernels.superblocks`; ``sigma`` is the mean of x*x over the row that a block lies in.
"""

from __future__ import annotations

from typing import Any

from adapterkit.gguf.kernels.lanes import at, div, every, put, put_byte, select, shared, to_int
from adapterkit.gguf.kernels.rounding import away, to_half, truncated
from adapterkit.gguf.kernels.search import grid, grid_level, largest, symmetric, symmetric_level
from adapterkit.gguf.kernels.superblocks import GIVEN_15, GIVEN_31, given_weights, put_half, symmetric_steps

SYMMETRIC_8 = symmetric_steps(8)
SYMMETRIC_16 = symmetric_steps(16)


@shared
def inverse_or_zero(d: Any) -> Any:
    """``d ? 1/d : 0``."""
    return select(d != 0.0, div(1.0, d), 0.0)


@shared
def q8_0(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """34 bytes: d, 32 signed levels."""
    size, _ = largest(x, 0, 32)
    d = div(size, 127.0)
    inverse = inverse_or_zero(d)
    put_half(out, 0, to_half(d))
    for i in every(32):
        put_byte(out, 2 + i, away(at(x, 0, 32, i) * inverse))


@shared
def _symmetric_plain(x: Any, scratch: Any, top: float) -> Any:
    """Levels 0..2*top-1 of Q4_0 and Q5_0 into ``q``; the scale."""
    _, value = largest(x, 0, 32)
    d = div(value, -top)
    inverse = inverse_or_zero(d)
    for i in every(32):
        put(scratch[2], 0, 32, i, truncated(at(x, 0, 32, i) * inverse + (top + 0.5), top * 2.0 - 1.0))
    return d


@shared
def _symmetric_given(x: Any, importance: Any, sigma: Any, scratch: Any, top: float, steps: Any) -> Any:
    w, codes, q, found = scratch
    given_weights(x, importance, w, 0, 32, sigma)
    for i in every(32):
        put(codes, 0, 32, i, at(w, 0, 32, i) * at(x, 0, 32, i))
    symmetric(x, w, codes, found[0], found[2], 0, 32, top, steps)
    winner = at(found[2], 0, 1, 0)
    for i in every(32):
        put(q, 0, 32, i, to_int(symmetric_level(at(x, 0, 32, i), winner, top)))
    return at(found[0], 0, 1, 0)


@shared
def _grid_plain(x: Any, scratch: Any, top: float) -> Any:
    """Levels 0..top of Q4_1 and Q5_1 into ``q``; scale and minimum."""
    low = at(x, 0, 32, 0)
    high = low
    for i in range(1, 32):
        v = at(x, 0, 32, i)
        low = select(v < low, v, low)
        high = select(v > high, v, high)
    d = div(high - low, top)
    inverse = inverse_or_zero(d)
    for i in every(32):
        put(scratch[2], 0, 32, i, truncated((at(x, 0, 32, i) - low) * inverse + 0.5, top))
    return d, low


@shared
def _grid_given(x: Any, importance: Any, sigma: Any, scratch: Any, top: float, steps: Any) -> Any:
    w, codes, q, found = scratch
    given_weights(x, importance, w, 0, 32, sigma)
    grid(x, w, codes, found, 0, 32, top, steps, False, True)
    inverse = at(found[2], 0, 1, 0)
    least = at(found[3], 0, 1, 0)
    for i in every(32):
        put(q, 0, 32, i, to_int(grid_level(at(x, 0, 32, i), inverse, least, top)))
    return at(found[0], 0, 1, 0), -at(found[1], 0, 1, 0)


@shared
def put_four(q: Any, out: Any, at_byte: int) -> None:
    """The low four bits of 32 levels: element i with element i + 16."""
    for i in every(16):
        put_byte(out, at_byte + i, (at(q, 0, 32, i) & 15) | ((at(q, 0, 32, i + 16) & 15) << 4))


@shared
def _put_fifth(q: Any, out: Any, at_byte: int) -> None:
    """The fifth bit of 32 levels as a little-endian 32-bit number."""
    for byte in range(4):
        high = at(q, 0, 32, 8 * byte) >> 4
        for bit in range(1, 8):
            high = high | ((at(q, 0, 32, 8 * byte + bit) >> 4) << bit)
        put_byte(out, at_byte + byte, high)


@shared
def _put_q4_0(d: Any, q: Any, out: Any) -> None:
    put_half(out, 0, to_half(d))
    put_four(q, out, 2)


@shared
def _put_q5_0(d: Any, q: Any, out: Any) -> None:
    put_half(out, 0, to_half(d))
    _put_fifth(q, out, 2)
    put_four(q, out, 6)


@shared
def _put_q4_1(d: Any, low: Any, q: Any, out: Any) -> None:
    put_half(out, 0, to_half(d))
    put_half(out, 2, to_half(low))
    put_four(q, out, 4)


@shared
def _put_q5_1(d: Any, low: Any, q: Any, out: Any) -> None:
    put_half(out, 0, to_half(d))
    put_half(out, 2, to_half(low))
    _put_fifth(q, out, 4)
    put_four(q, out, 8)


@shared
def q4_0(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """18 bytes: d, 4-bit levels."""
    _put_q4_0(_symmetric_plain(x, scratch, 8.0), scratch[2], out)


@shared
def q4_0_given(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """Q4_0 with importance."""
    _put_q4_0(_symmetric_given(x, importance, sigma, scratch, 8.0, SYMMETRIC_8), scratch[2], out)


@shared
def q5_0(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """22 bytes: d, fifth bits, low four bits."""
    _put_q5_0(_symmetric_plain(x, scratch, 16.0), scratch[2], out)


@shared
def q5_0_given(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """Q5_0 with importance."""
    _put_q5_0(_symmetric_given(x, importance, sigma, scratch, 16.0, SYMMETRIC_16), scratch[2], out)


@shared
def q4_1(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """20 bytes: d, minimum, 4-bit levels."""
    d, low = _grid_plain(x, scratch, 15.0)
    _put_q4_1(d, low, scratch[2], out)


@shared
def q4_1_given(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """Q4_1 with importance."""
    d, low = _grid_given(x, importance, sigma, scratch, 15.0, GIVEN_15)
    _put_q4_1(d, low, scratch[2], out)


@shared
def q5_1(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """24 bytes: d, minimum, fifth bits, low four bits."""
    d, low = _grid_plain(x, scratch, 31.0)
    _put_q5_1(d, low, scratch[2], out)


@shared
def q5_1_given(x: Any, importance: Any, sigma: Any, scratch: Any, out: Any, subs: Any) -> None:
    """Q5_1 with importance."""
    d, low = _grid_given(x, importance, sigma, scratch, 31.0, GIVEN_31)
    _put_q5_1(d, low, scratch[2], out)
