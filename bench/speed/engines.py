"""Workers beside one worker: speed-up of a merge that computes, and what an engine costs for each part.

    python -m bench speed engines --dir /dev/shm/adapterkit-engines
    python -m bench speed engines --shape tiny --runs 1        # small

The merge is compute-bound: adapters into a bf16 base, written as NF4 (or with ``--quant Q4_K_M`` as K-quants). One worker
with one thread stands beside two workers with one thread each, in turns. Times are from the first part that begins to the last
that ends, as the events say; starting workers (torch, and Ray itself) stands apart. What an engine costs is measured with many
small parts: the time between the end of a part and the beginning of the next of the same worker.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.common.results import note
from bench.common.shapes import SHAPES, write_adapter, write_base


def events(path: Path) -> list[dict[str, Any]]:
    """With seconds in the place of times."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    for one in found:
        one["at"] = datetime.fromisoformat(one["time"]).timestamp()
    return found


def run(plan: Path, out: Path, engine: str, workers: int, part_size: str) -> list[dict[str, Any]]:
    """The events of a run with one thread a worker."""
    log = out.with_suffix(".events")
    log.unlink(missing_ok=True)
    command = [sys.executable, "-m", "adapterkit", "run", str(plan), "-o", str(out), "--on", engine, "--jobs", "1"]
    command += ["--workers", str(workers), "--part-size", part_size, "--events", str(log), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return events(log)


def working(found: list[dict[str, Any]]) -> float:
    """Seconds from the first part to the last."""
    begun = min(one["at"] for one in found if one["event"] == "part-started")
    return float(max(one["at"] for one in found if one["event"] == "part-ended") - begun)


def starting(found: list[dict[str, Any]]) -> float:
    """Seconds until the first worker was ready."""
    return float(min(one["at"] for one in found if one["event"] == "worker-ready") - found[0]["at"])


def overhead(found: list[dict[str, Any]]) -> float:
    """Median milliseconds of a part that are not spent in it: from its beginning to its end for the driver, less what the
    worker says it took."""
    begun = {one["part"]: one["at"] for one in found if one["event"] == "part-started"}
    spent = [one["at"] - begun[one["part"]] - one["seconds"] for one in found if one["event"] == "part-ended"]
    return 1000 * statistics.median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description="Workers beside one worker")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/adapterkit-engines"))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--quant", default="nf4")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--engines", nargs="*", default=["local", "ray"])
    options = parser.parse_args()
    root: Path = options.dir
    shutil.rmtree(root, ignore_errors=True)
    shape = SHAPES[options.shape]
    write_base(root / "base", shape, shard_layers=2)
    write_adapter(root / "adapter", shape)
    plan = root / "plan.json"
    given = [str(root / "base"), str(root / "adapter"), "--quant", options.quant, "--save-plan", str(plan)]
    gguf = options.quant.upper().startswith("Q")
    # The form of the output is what its name says: a plan has none.
    given += ["-o", str(root / "out.gguf")] if gguf else []
    subprocess.run([sys.executable, "-m", "adapterkit", "merge", *given], check=True, stdout=subprocess.DEVNULL)
    nbytes = json.loads(plan.read_text())["files"]
    total = sum(file["nbytes"] for file in nbytes)
    size, small = str(max(1_000_000, total // 2)), "1MB"
    print(f"{options.shape}, {options.quant}, {total / 1e6:.0f} MB; one thread a worker\n")
    print("| engine | 1 worker, s | 2 workers, s | speed-up | start, s | a part, ms |")
    print("|---|---|---|---|---|---|")
    for engine in options.engines:
        one, two, start, apart = [], [], [], []
        for index in range(options.runs):
            out = root / f"out{index}{'.gguf' if gguf else ''}"
            one.append(working(run(plan, out, engine, 1, size)))
            found = run(plan, out, engine, 2, size)
            two.append(working(found))
            start.append(starting(found))
            apart.append(overhead(run(plan, out, engine, 2, small)))
        pair = [statistics.median(some) for some in (one, two)]
        speedup = statistics.median(a / b for a, b in zip(one, two, strict=True))
        cells = (f"{pair[0]:.1f}", f"{pair[1]:.1f}", f"{speedup:.2f}", f"{statistics.median(start):.1f}")
        print(f"| {engine} | {' | '.join(cells)} | {statistics.median(apart):.0f} |")
        note(**{f"{engine}_speedup": round(speedup, 2), f"{engine}_part_ms": round(statistics.median(apart))})
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
