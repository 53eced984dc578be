"""Rounding as llama.cpp's C code does it, on lanes."""

from __future__ import annotations

from typing import Any

from adapterkit.gguf.kernels.lanes import bits, fabs, from_bits, select, shared, to_float, to_int

MAGIC = 12582912.0  # 1.5 * 2**23: adding it leaves the nearest integer, ties to even, in the low mantissa bits
IN_RANGE = 4194303.0  # above it the trick gives other bits, and llama.cpp stores those


@shared
def nearest(value: Any) -> Any:
    """``nearest_int`` of ggml-quants.c as an integer, out-of-range and NaN results included."""
    return (bits(value + MAGIC) & 0x7FFFFF) - 0x400000


@shared
def clamp(value: Any, low: Any, high: Any) -> Any:
    """``MAX(low, MIN(high, value))``."""
    value = select(value < high, value, high)
    return select(value > low, value, low)


@shared
def level(value: Any, low: Any, high: Any) -> Any:
    """``clamp(nearest(value), low, high)`` as float, for in-range values: four instructions instead of six."""
    return (clamp(value, low, high) + MAGIC) - MAGIC


@shared
def away(value: Any) -> Any:
    """``roundf``: half away from zero, as an integer; 0 where C's cast of inf or NaN gives 0."""
    size = fabs(value)
    whole = to_int(select(size < 1048576.0, size + 0.49999997, 0.0))  # 0.5 less one unit: 0.49999997 stays below 1
    return select(value < 0.0, -whole, whole)


@shared
def truncated(value: Any, top: Any) -> Any:
    """``MIN(top, (int8_t) value)`` for values from 0; 0 where the cast of inf or NaN gives 0."""
    value = select(value < 1048576.0, value, 0.0)
    return to_int(clamp(value, 0.0, top))


@shared
def to_half(value: Any) -> Any:
    """The float16 nearest to ``value`` (ties to even) as its sixteen bits in an integer."""
    raw = bits(value)
    size = raw & 0x7FFFFFFF
    normal = ((size + 0xFFF + ((size >> 13) & 1)) >> 13) - (112 << 10)
    small = bits(from_bits(size) + 0.5) - 0x3F000000  # float32 spacing at 0.5 is float16's subnormal spacing, 2**-24
    half = select(size < 0x38800000, small, normal)
    half = select(size > 0x477FEFFF, 0x7C00, half)
    half = select(size > 0x7F800000, 0x7E00, half)
    return half | ((raw >> 16) & 0x8000)


@shared
def from_half(half: Any) -> Any:
    """The float32 with the value of a float16 given as an integer."""
    size = half & 0x7FFF
    normal = from_bits((size << 13) + (112 << 23))
    small = to_float(size) * 5.9604644775390625e-08
    found = select(size < 0x400, small, normal)
    found = select(size > 0x7BFF, from_bits((size << 13) + (224 << 23)), found)
    return from_bits(bits(found) | ((half & 0x8000) << 16))
