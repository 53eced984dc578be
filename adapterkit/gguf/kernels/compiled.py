"""The encoders compiled by numba: sixteen blocks per step, no GIL, machine code cached on disk."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar
from zlib import crc32

import numpy as np
from numba import njit
from numba.core import event

from adapterkit.errors import tell
from adapterkit.gguf.kernels import simd
from adapterkit.gguf.kernels.lanes import at, bits, largest_lane, select, shared
from adapterkit.gguf.kernels.layouts import LAYOUTS

LANES = simd.LANES
_SOURCES = crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
"""Numba's cache looks at this file only; the kernels are inlined from the others."""


@shared
def _row_means(x: Any, columns: int, means: Any) -> None:
    """Mean square of each row, summed left to right in float32."""
    for row in range(means.size):
        total = np.float32(0.0)
        for i in range(row * columns, (row + 1) * columns):
            total += x[i] * x[i]
        means[row] = total / np.float32(columns)


@shared
def _gather(x: Any, first: int, live: int, n: int, rows: Any) -> None:
    """Blocks ``first`` .. ``first + live`` of ``n`` weights as rows of lanes; missing lanes repeat the last block."""
    if live == LANES:
        for i in range(0, n, LANES):
            simd.transpose(x, first * n + i, n, rows, i * LANES, LANES)
    else:
        for lane in range(LANES):
            start = (first + min(lane, live - 1)) * n
            for i in range(n):
                rows[i * LANES + lane] = x[start + i]


@shared
def _peak_bits(rows: Any, n: int, peak: Any) -> Any:
    """The largest magnitude's bits, lane by lane: their order is that of the magnitudes, with NaN above infinity."""
    for i in range(n):
        size = bits(at(rows, 0, n, i)) & 0x7FFFFFFF
        peak = select(size > peak, size, peak)
    return peak


@shared
def _scatter(packed: Any, first: int, live: int, size: int, out: Any) -> None:
    """Byte rows of lanes as blocks of ``size`` bytes."""
    if live == LANES:
        for i in range(0, size - LANES + 1, LANES):
            simd.transpose(packed, i * LANES, LANES, out, first * size + i, size)
        i = size - LANES  # the last sixteen bytes, some of them a second time
        simd.transpose(packed, i * LANES, LANES, out, first * size + i, size)
    else:
        for lane in range(live):
            for i in range(size):
                out[(first + lane) * size + i] = packed[i * LANES + lane]


@shared
def _gather_importance(importance: Any, first: int, live: int, n: int, rows: Any) -> None:
    """The importance of each block's columns, when there is any."""
    if importance.size:
        per_row = importance.size // n
        for lane in range(LANES):
            start = ((first + min(lane, live - 1)) % per_row) * n
            for i in range(n):
                rows[i * LANES + lane] = importance[start + i]


@shared
def _encode(
    block: Any, n: int, size: int, subs: Any, row_mean: Any, x: Any, importance: Any, columns: int, out: Any
) -> Any:
    count = x.size // n
    rows = np.empty(n * LANES, np.float32)
    w = np.empty(n * LANES, np.float32)
    codes = np.empty(n * LANES, np.float32)
    q = np.empty(n * LANES, np.int32)
    f = np.empty((7, len(subs) * LANES), np.float32)
    found = (f[0], f[1], f[2], f[3], f[4], f[5], f[6])
    packed = np.empty(size * LANES, np.uint8)
    given = np.empty(n * LANES, np.float32)
    sigma = np.zeros(LANES, np.float32)
    means = np.empty(x.size // columns if row_mean else 0, np.float32)
    _row_means(x, columns, means)
    peak = bits(at(sigma, 0, 1, 0))
    for first in range(0, count, LANES):
        live = min(LANES, count - first)
        _gather(x, first, live, n, rows)
        peak = _peak_bits(rows, n, peak)
        _gather_importance(importance, first, live, n, given)
        if row_mean:
            for lane in range(LANES):
                sigma[lane] = means[(first + min(lane, live - 1)) * n // columns]
        block(rows, given, at(sigma, 0, 1, 0), (w, codes, q, found), packed, subs)
        _scatter(packed, first, live, size, out)
    return largest_lane(peak)


def _kernel(name: str, weighted: bool) -> Any:
    layout = LAYOUTS[name]
    block, n, size, subs = layout.given if weighted else layout.plain, layout.n, layout.size, layout.subs
    row_mean = layout.row_mean and weighted
    version = _SOURCES  # a part of the closure, so a part of the key of numba's cache

    def kernel(x: Any, importance: Any, columns: int, out: Any) -> Any:
        _version = version
        return _encode(block, n, size, range(subs), row_mean, x, importance, columns, out)

    return _compiled(kernel)


def _compiled(function: Any) -> Any:
    how = {"nogil": True, "error_model": "numpy", "fastmath": False}
    try:
        made, kept = njit(cache=True, **how)(function), True
    except RuntimeError:  # no folder that numba may write to, as in a read-only container
        made, kept = njit(cache=False, **how)(function), False
    _Compiling.watched[id(made)] = kept
    return made


class _Compiling(event.Listener):  # type: ignore[misc]
    """Says, once in a process, why nothing seems to happen: numba makes machine code, of what its cache does not hold."""

    watched: ClassVar[dict[int, bool]] = {}
    """Our kernels, and whether their machine code is kept. What they call is compiled within them."""
    said = False

    def on_start(self, found: event.Event) -> None:
        kept = self.watched.get(id(found.data.get("dispatcher")))
        if kept is None or self.said:
            return
        self.said = True
        if kept:
            tell("Compiling the functions for GGUF types, once for this environment: some seconds for each type")
        else:
            tell(
                "Compiling the functions for GGUF types, some seconds for each: there is no folder to keep them in, so every "
                "process does it (NUMBA_CACHE_DIR names one)"
            )

    def on_end(self, found: event.Event) -> None:
        pass


COMPILING = _Compiling()
event.register("numba:compile", COMPILING)


@cache
def kernel(name: str, weighted: bool) -> Any:
    """``kernel(x float32 flat, importance float32 [columns] or [0], columns, out uint8 flat)`` for a type.

    It returns the bits of the largest magnitude in ``x``, which cost nothing there and tell whether all is finite.
    """
    return _kernel(name, weighted)


@cache
def halves() -> Any:
    """``halves(bits uint16 [n], out float32 [n])``: float16 values as float32, all of them where ``LANES`` divides n."""
    version = _SOURCES

    def widen(read: Any, out: Any) -> None:
        _version = version
        for start in range(0, read.size - LANES + 1, LANES):
            simd.from_halves(read, start, out)

    return _compiled(widen)
