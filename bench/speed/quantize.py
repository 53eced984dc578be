"""Encoding speed beside llama.cpp's C functions, in one run: ``python -m bench speed quantize [--threads 1 2] [TYPE ...]``.

The C functions are those of the library that xllamacpp ships (``pip install xllamacpp``), called through ctypes, which
releases the GIL; both sides get the same rows, in turn, and the median counts. Bytes are compared before anything is
timed. Numbers are million weights per second; ratio is ours over C's, by the clock and by the time that the
processors spent, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from adapterkit.checkpoint.tensor import BLOCK
from adapterkit.gguf.encode import encode_into
from adapterkit.gguf.kernels import native
from adapterkit.gguf.kernels.layouts import LAYOUTS
from adapterkit.gguf.types import TYPES
from bench.common import results

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, COLUMNS = 2048, 4096
BLOCK_ROWS = BLOCK // COLUMNS  # what an output's encoder gets at a time


def timed(pool: ThreadPoolExecutor, work: Callable[[slice], None], parts: list[slice]) -> tuple[float, float]:
    """Seconds by the clock, and of processors."""
    start, used = time.perf_counter(), time.process_time()
    list(pool.map(work, parts))
    return time.perf_counter() - start, time.process_time() - used


def measure(name: str, weighted: bool, backend: Any, threads: int, repeats: int, budget: float) -> tuple[float, ...]:
    """Million weights per second of (ours, C), on as many rows as take C about ``budget`` seconds; both ratios."""
    kind = TYPES[name]
    rng = np.random.default_rng(0)
    importance = (rng.random(COLUMNS) + 0.01).astype(np.float32) if weighted else None
    x = (rng.standard_normal((ROWS, COLUMNS), dtype=np.float32) * np.float32(0.02)).astype(np.float32)
    quantize = native.library().ggml_quantize_chunk
    pointer = None if importance is None else importance.ctypes.data_as(ctypes.c_void_p)

    def c_encode(rows: np.ndarray, out: np.ndarray) -> None:
        quantize(kind.id, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, pointer)

    out = np.empty((ROWS, kind.row_bytes(COLUMNS)), dtype=np.uint8)
    probe = np.empty_like(out[:16])
    c_encode(x[:16], probe)
    encode_into(name, x[:16], out[:16], importance, backend)
    if not np.array_equal(probe, out[:16]):
        raise SystemExit(f"{name}: the bytes differ from llama.cpp's, nothing to compare")
    start = time.perf_counter()
    c_encode(x[:16], probe)
    rows = int(min(ROWS, 16 * budget * threads / (time.perf_counter() - start)))
    rows = max(1, round(rows / BLOCK_ROWS / threads)) * threads * BLOCK_ROWS
    parts = [slice(at, at + BLOCK_ROWS) for at in range(0, rows, BLOCK_ROWS)]
    ours, theirs = [], []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            ours.append(timed(pool, lambda p: encode_into(name, x[p], out[p], importance, backend), parts))
            theirs.append(timed(pool, lambda p: c_encode(x[p], out[p]), parts))
    weights = rows * COLUMNS / 1e6
    (clock, used), (c_clock, c_used) = (
        [statistics.median(t) for t in zip(*side, strict=True)] for side in (ours, theirs)
    )
    return weights / clock, weights / c_clock, c_clock / clock, c_used / used


def ways(options: argparse.Namespace) -> list[tuple[str, int]]:
    """numba with each number of threads, and torch, which is no way to be fast, with one."""
    found = [("numba", threads) for threads in options.threads] if "numba" in options.backends else []
    return found + ([("torch", options.threads[0])] if "torch" in options.backends else [])


def _heading(weighted: bool, backend: str, threads: int, *, several: bool) -> str:
    text = backend if backend == "torch" else f"{threads} thread{'s' if threads > 1 else ''}"
    return f"with importance: {text}" if weighted and threads == 1 and backend != "torch" else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="all by default")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.15, help="seconds of C per repeat")
    parser.add_argument("--backends", nargs="+", default=["numba", "torch"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = [(weighted, backend, threads) for weighted in (False, True) for backend, threads in ways(options)]
    results.head("type", *(_heading(*one, several=len(options.threads) > 1) for one in columns))
    speeds: list[float] = []
    lowest: dict[tuple[str, int, str], tuple[float, str]] = {}
    for name in options.types or LAYOUTS:
        cells = []
        for weighted, backend, threads in columns:
            if weighted and not LAYOUTS[name].given:
                cells.append("")
                continue
            *_, ratio, used = measure(name, weighted, backend, threads, options.repeats, options.budget)
            cells.append(f"{used:.2f}")
            if backend == "numba":
                speeds.append(used)
            for kind, one in (("clock", ratio), ("processor time", used)):
                key = (backend, threads, kind)
                lowest[key] = min(lowest.get(key, (one, name)), (one, name))
        results.row(name, *cells)
    if speeds:
        results.note(least=round(min(speeds), 1), most=round(max(speeds), 1))
    for (backend, threads, kind), (ratio, name) in lowest.items():
        print(f"lowest ratio by {kind}, {backend}, {threads} thread(s): {ratio:.2f} ({name})")


if __name__ == "__main__":
    main()
