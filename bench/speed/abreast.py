"""What several outputs of one base cost: one after another, abreast in one pass, and as a build with hashes and lock.

    python -m bench speed abreast --folder DISK --runs 3

The base lies on a disk (not in /dev/shm), and its pages are dropped from memory before every run, as they are when a model is
larger than the memory. Each run is a process of its own. Printed are medians: seconds, bytes that came from the disk, and the
peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from bench.common import results
from bench.common.shapes import SHAPES, write_adapter, write_base

CHILD = """
import json, os, sys, time
from pathlib import Path
import torch  # imports do not count
from adapterkit.verbs.job import run
from adapterkit.verbs.merge import merge
from adapterkit.verbs.plan_merge import plan_merge
def io():
    lines = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
    return int(lines["read_bytes"])
def cold():
    for path in Path("base").glob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
outputs = {"bf16": {}, "f16": {"dtype": "f16"}, "nf4": {"quant": "nf4"}}
how, before, seconds = sys.argv[1], io(), 0.0
if how == "one after another":
    for name, options in outputs.items():
        cold()
        start = time.monotonic()
        merge("base", ["adapter"], f"out/{name}", **options)
        seconds += time.monotonic() - start
elif how == "abreast":
    cold()
    start = time.monotonic()
    jobs = []
    for name, options in outputs.items():
        out = Path(f"out/{name}")
        planned = plan_merge("base", ["adapter"], out=out, headers_only=False, **options)
        jobs.append(planned.job())
    run(jobs)
    seconds = time.monotonic() - start
else:
    from adapterkit import build
    cold()
    start = time.monotonic()
    build("adapterkit.toml")
    seconds = time.monotonic() - start
memory = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM:")).split()[1]) * 1024
print(json.dumps({"seconds": seconds, "read": io() - before, "memory": memory}))
"""
RECIPE = """
base = "base"
adapters.one = "adapter"
outputs.bf16 = "out/bf16"
outputs.f16 = {path = "out/f16", dtype = "f16"}
outputs.nf4 = {path = "out/nf4", quant = "nf4"}
"""
WAYS = ("one after another", "abreast", "build")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="on a disk, with room for six times the base")
    parser.add_argument("--shape", default="1b", choices=SHAPES)
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    work = asked.folder / "abreast"
    work.mkdir(parents=True)
    try:
        write_base(work / "base", SHAPES[asked.shape])
        write_adapter(work / "adapter", SHAPES[asked.shape])
        (work / "adapterkit.toml").write_text(RECIPE)
        os.sync()
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(asked.runs):
            for way in WAYS:
                for left in ("out", ".adapterkit"):
                    shutil.rmtree(work / left, ignore_errors=True)
                done = subprocess.run(
                    [sys.executable, "-c", CHILD, way], cwd=work, capture_output=True, text=True, check=True
                )
                found[way].append(json.loads(done.stdout))
        size = sum(path.stat().st_size for path in (work / "base").glob("*.safetensors"))
        print(f"base of {size / 1e9:.2f} GB, outputs bf16, f16 and nf4, {asked.runs} runs, medians")
        results.note(base_gb=round(size / 1e9, 2))
        results.head(
            "three outputs (bf16, f16, nf4)", "seconds", "read from the disk, in sizes of the base", "peak memory"
        )
        for way, rows in found.items():
            seconds, read, memory = (
                statistics.median(row[name] for row in rows) for name in ("seconds", "read", "memory")
            )
            results.row(way, f"{seconds:.1f}", f"{read / size:.2f}", f"{memory / 1e6:.0f} MB")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
