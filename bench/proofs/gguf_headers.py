"""Damaged GGUF headers: how many are refused, how many read as gguf reads them, the slowest (in time of the processor,
which other work on the machine does not add to), the peak memory.

python -m bench proofs gguf_headers [COUNT] [SEED]
"""

from __future__ import annotations

import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

from gguf_files import sample
from gguf_mutants import as_gguf_reads, as_we_read, mutants

from adapterkit.errors import AdapterkitError
from adapterkit.gguf.reader import parse_gguf
from bench.common import results


def main(count: int = 10_000, seed: int = 1) -> int:
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        file = sample(Path(folder) / "sample.gguf")
        data = file.read_bytes()
        header = parse_gguf(lambda at, n: data[at : at + n], len(data), "sample").data_start
        tracemalloc.start()
        for mutant in mutants(data, header, count, seed):
            started = time.thread_time()
            try:
                found = parse_gguf(lambda at, n, m=mutant: m[at : at + n], len(mutant), "mutant")
            except AdapterkitError:
                found = None
            slowest = max(slowest, time.thread_time() - started)
            if found is None:
                outcomes["refused"] += 1
                continue
            path = Path(folder) / "mutant.gguf"
            path.write_bytes(mutant)
            outcomes["as gguf" if as_gguf_reads(path) == as_we_read(found) else "DIFFERENT"] += 1
        peak = tracemalloc.get_traced_memory()[1]
    print(
        f"{count} headers: {dict(outcomes)}, slowest {slowest * 1000:.1f} ms of the processor, peak {peak / 1e6:.1f} MB"
    )
    refused, same, different = (outcomes[word] for word in ("refused", "as gguf", "DIFFERENT"))
    results.note(headers=count, refused=refused, same=same, different=different)
    return int("DIFFERENT" in outcomes or slowest > 1 or peak > 200e6)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
