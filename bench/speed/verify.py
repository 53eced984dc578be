"""How long `verify` takes at the level of tensors, beside the merge that it proves, in the same run.

    python -m bench speed verify --shape 1b --runs 3

The two alternate, every run in a process of its own, all files in one folder (by default in /dev/shm). What is printed are
medians over the runs, the ratio pair by pair, and the peak memory of both. ``--broken`` also verifies the base in the place
of the merge, so that every tensor has to be diagnosed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path

from bench.common import results
from bench.common.shapes import SHAPES, write_adapter, write_base
from bench.speed.merge import HIGH_WATER, OURS, run

VERIFY = (
    HIGH_WATER
    + """
import json, sys, time
start = time.monotonic()
from adapterkit.verbs.verify import verify
verify(sys.argv[6], base=sys.argv[4], adapters=[sys.argv[5]], jobs=int(sys.argv[7]) or None)
imported = time.monotonic()
report = verify(sys.argv[3], base=sys.argv[1], adapters=[sys.argv[2]], jobs=int(sys.argv[7]) or None)
work = time.monotonic() - imported
told = {"imports": imported - start, "work": work, "memory": high_water(), "ok": float(report.ok)}
print(json.dumps(told))
"""
)


_SHOWN = {"merge": "merge", "verify": "verify, all tensors right", "verify of the base": "verify, nothing merged"}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/adapterkit-bench"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=0, help="0: as many as adapterkit chooses")
    parser.add_argument("--broken", action="store_true", help="also a merge in which nothing was merged")
    options = parser.parse_args()
    root = options.dir / options.shape
    base, adapter, out = root / "base", root / "adapter", root / "out"
    # A small model first, as in bench/speed/merge.py: imports are paid before the clock starts.
    small = [options.dir / "first" / name for name in ("base", "adapter", "out")]
    for folder, shape in ((root, options.shape), (options.dir / "first", "tiny")):
        if not folder.exists():
            write_base(folder / "base", SHAPES[shape])
            write_adapter(folder / "adapter", SHAPES[shape])
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    print(f"{options.shape}: {weights / 1e9:.2f} GB of bf16, LoRA r=16 on all linear layers")
    found: dict[str, list[dict[str, float]]] = {"merge": [], "verify": []}
    jobs = str(options.jobs)
    for index in range(options.runs + 1):
        for folder in (out, small[2]):
            shutil.rmtree(folder, ignore_errors=True)
        merged, verified = (run(one, *map(str, (base, adapter, out, *small, jobs))) for one in (OURS, VERIFY))
        assert verified["ok"] == 1.0
        if index:  # the first round warms the caches
            found["merge"].append(merged)
            found["verify"].append(verified)
    if options.broken:
        found["verify of the base"] = [run(VERIFY, *map(str, (base, adapter, base, *small, jobs)))]
    results.head("", "seconds", "peak memory")
    for name, runs in found.items():
        work, memory = (statistics.median(one[key] for one in runs) for key in ("work", "memory"))
        results.row(_SHOWN[name], f"{work:.2f}", f"{memory / 1e6:.0f} MB")
        if name == "verify":
            results.note(seconds=round(work, 2), memory_mb=round(memory / 1e6))
        elif name != "merge":
            results.note(broken_times=round(work / statistics.median(one["work"] for one in found["verify"])))
            results.note(broken_mb=round(memory / 1e6))
    pairs = [theirs["work"] / ours["work"] for ours, theirs in zip(found["merge"], found["verify"], strict=True)]
    results.note(ratio=round(statistics.median(pairs), 2), least=round(min(pairs), 2), most=round(max(pairs), 2))
    print(
        f"verify over merge, pair by pair: median {statistics.median(pairs):.2f}, {min(pairs):.2f} to {max(pairs):.2f}"
    )
    shutil.rmtree(options.dir, ignore_errors=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
