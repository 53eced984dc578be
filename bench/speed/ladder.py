"""Three GGUF types of one merge in one pass (`--quant Q8_0,Q5_K_M,Q4_K_M`), beside three runs of their own.

    python -m bench speed ladder --dir DISK [--shape 1b] [--runs 3]

The base lies on a disk (not in /dev/shm), and its pages are dropped from memory before every merge, as they are when a model is
larger than the memory. Each run is a process of its own, after the same on a tiny model; both ways alternate. Printed are
medians of seconds, CPU seconds, bytes that came from the disk and memory, and whether both ways wrote the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path

from bench.common import results
from bench.common.shapes import HIGH_WATER, SHAPES, write_adapter, write_base
from bench.speed.one_pass import run, tokenizer

QUANTS = "Q8_0,Q5_K_M,Q4_K_M"
WORK = (
    HIGH_WATER
    + """
import json, os, sys, time
from pathlib import Path
jobs = int(sys.argv[1])
start = time.monotonic()
from adapterkit import merge

def read():
    return int(next(line for line in open("/proc/self/io") if line.startswith("read_bytes")).split()[1])

def cold(base):
    for path in Path(base).glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)

def work(base, adapter, out, quants):
    for quant in quants.split("+"):
        cold(base)
        own = out if "," in quant else out.replace(".gguf", f"-{quant}.gguf")
        merge(base, [adapter], own, quant=quant, jobs=jobs, force=True)

work(*sys.argv[2].split("|"))
ready, used, before = time.monotonic(), time.process_time(), read()
work(*sys.argv[3].split("|"))
spent = {"work": time.monotonic() - ready, "cpu": time.process_time() - used, "read": read() - before}
print(json.dumps({"imports": ready - start, "memory": high_water(), **spent}))
"""
)


def digests(folder: Path) -> dict[str, str]:
    """Of every GGUF file, which is then removed."""
    found = {}
    for path in sorted(folder.glob("*.gguf")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        path.unlink()
    return found


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--dir", type=Path, required=True, help="on a disk, with room for twice the base")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--layers", type=int, default=0, help="fewer than the shape has, for a quick look")
    options = parser.parse_args()
    shutil.rmtree(options.dir, ignore_errors=True)
    first, then = options.dir / "first", options.dir / "then"
    for root, shape in ((first, SHAPES["tiny"]), (then, SHAPES[options.shape])):
        built = replace(shape, layers=options.layers) if options.layers and root == then else shape
        write_base(root / "base", built)
        write_adapter(root / "adapter", built)
        tokenizer(root / "base")
    os.sync()  # pages that are not on the disk yet cannot be dropped
    ways = {"one pass": QUANTS, "three runs": QUANTS.replace(",", "+")}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    made: dict[str, dict[str, str]] = {}
    try:
        for _ in range(options.runs):
            for name, quants in ways.items():
                places = [(root / "base", root / "adapter", root / "out.gguf", Path(quants)) for root in (first, then)]
                found[name].append(run(WORK, options.jobs, *places))
                digests(first)
                made[name] = digests(then)
    finally:
        shutil.rmtree(options.dir, ignore_errors=True)
    middles = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()
    }
    one, three = middles["one pass"], middles["three runs"]
    results.note(
        read_ratio=round(one["read"] / three["read"], 2),
        ratio=round(one["work"] / three["work"], 2),
        cpu_ratio=round(one["cpu"] / three["cpu"], 2),
    )
    results.head("three types of one merge", "seconds", "CPU seconds", "GB from the disk", "MB of memory")
    for name, middle in middles.items():
        numbers = (middle["work"], middle["cpu"], middle["read"] / 1e9, middle["memory"] / 1e6)
        results.row(name, *(f"{number:.{digits}f}" for number, digits in zip(numbers, (1, 1, 2, 0), strict=True)))
    same = made["one pass"] == made["three runs"]
    print(f"\nThe {len(made['one pass'])} files are {'the same bytes' if same else 'NOT the same'} either way.")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
