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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="all by default")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=0.15, help="seconds of C per repeat")
    parser.add_argument("--backends", nargs="+", default=["numba", "torch"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'type':8} {'importance':10} {'threads':>7} {'backend':8} {'ours':>8} {'C':>8} {'ratio':>6} {'cpu':>6}")
    lowest: dict[tuple[str, int, str], tuple[float, str]] = {}
    for name in options.types or LAYOUTS:
        for weighted in [False, True] if LAYOUTS[name].given else [False]:
            for backend in options.backends:
                for threads in options.threads:
                    found = measure(name, weighted, backend, threads, options.repeats, options.budget)
                    ours, theirs, ratio, used = found
                    label = f"{name:8} {'yes' if weighted else 'no':10} {threads:7} {backend:8}"
                    print(f"{label} {ours:8.1f} {theirs:8.1f} {ratio:6.2f} {used:6.2f}", flush=True)
                    for kind, one in (("clock", ratio), ("processor time", used)):
                        key = (backend, threads, kind)
                        lowest[key] = min(lowest.get(key, (one, name)), (one, name))
    for (backend, threads, kind), (ratio, name) in lowest.items():
        print(f"lowest ratio by {kind}, {backend}, {threads} thread(s): {ratio:.2f} ({name})")


if __name__ == "__main__":
    main()
