"""Models of 405B and 671B parameters: what a plan takes, and what a worker pays for one part of it.

    python -m bench speed huge --dir /var/tmp/adapterkit-huge

Base and adapter are sparse files: real headers, no data on the disk (`bench.common.giants`). Seconds are of the processor,
not of the clock, and memory is the high-water mark of each process. A part is about a tenth of a gigabyte of work here,
so that its own bytes do not hide what opening the plan costs; beside it stands a merge of a few kilobytes: the
start of the process and of torch.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from bench.common.giants import make
from bench.common.results import note
from bench.common.shapes import HIGH_WATER, Shape, write_adapter, write_base

PART = "100MB"
RUNS = (("llama-405b", ()), ("deepseek-v3", ("--quant", "keep")), ("deepseek-v3", ()))
SCRIPT = f"""
import sys, atexit
{HIGH_WATER}
atexit.register(lambda: print("PEAK", high_water(), file=sys.stderr))
from adapterkit.cli import main
main()
"""


def measured(*arguments: str) -> tuple[float, int]:
    """Seconds of the processor and peak memory in bytes of one command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(done.stderr)
    peak = next(line for line in done.stderr.splitlines() if line.startswith("PEAK"))
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, int(peak.split()[1])


def parts_of(plan: Path, out: Path) -> tuple[int, int]:
    """A part that copies and one that computes, the smallest of each."""
    from adapterkit.checkpoint.plan import Plan, parse_size
    from adapterkit.verbs.execute import OpenPlan

    found = OpenPlan(Plan.from_json(plan.read_bytes()), out, parse_size(PART)).parts
    computed = [part for part in found if any(step.source is None for step in part.steps)]
    copied = [part for part in found if part not in computed]
    # Where everything is computed (a quantized base that is decoded) there is none of the other kind.
    return tuple(min(some or found, key=lambda part: part.nbytes).index for some in (copied, computed))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description="Checkpoints of 0.7 and 0.8 TB, planned and executed in part")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp/adapterkit-huge"))
    options = parser.parse_args()
    root: Path = options.dir
    shutil.rmtree(root, ignore_errors=True)
    tiny = Shape(64, 128, 1, 2, 2, 64)
    write_base(root / "tiny" / "base", tiny)
    write_adapter(root / "tiny" / "adapter", tiny)
    seconds, memory = measured(
        "merge", str(root / "tiny" / "base"), str(root / "tiny" / "adapter"), "-o", str(root / "tiny" / "out")
    )
    note(tiny_seconds=round(seconds, 2), tiny_mb=round(memory / 1e6))
    print("CPU seconds, and peak memory in MB\n")
    print(
        "| model | written as | files | tensors | --dry-run | --save-plan | plan file, MB | copied part | computed part |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    print(f"| (a merge of 100 kB) | | | | | | | | {seconds:.1f} s, {memory / 1e6:.0f} MB |")
    for giant, how in RUNS:
        place = root / giant
        if not place.is_dir():
            make(place, giant)
        base, adapter, plan = str(place / "base"), str(place / "adapter"), place / "plan.json"
        shown = measured("merge", base, adapter, "--dry-run", *how)
        saved = measured("merge", base, adapter, "--save-plan", str(plan), *how)
        found = json.loads(plan.read_bytes())
        cells = [shown, saved]
        for index, part in enumerate(parts_of(plan, place / "out")):
            out = str(place / f"out{index}")
            cells.append(
                measured("execute", str(plan), "-o", out, "--part", str(part), "--part-size", PART, "--jobs", "1")
            )
        if giant == "llama-405b":
            note(plan_s=round(shown[0], 1), memory_mb=round(cells[-1][1] / 1e6))
        elif how:
            note(large_plan_s=round(saved[0], 1), large_plan_mb=round(saved[1] / 1e6))
            note(large_copied_s=round(cells[-2][0], 1), large_computed_s=round(cells[-1][0], 1))
            note(large_copied_mb=round(cells[-2][1] / 1e6), large_computed_mb=round(cells[-1][1] / 1e6))
        told = [f"{seconds:.1f} s, {memory / 1e6:.0f} MB" for seconds, memory in cells]
        told.insert(2, f"{plan.stat().st_size / 1e6:.1f}")
        tensors = sum(len(file["tensors"]) for file in found["files"])
        words = " ".join(how) or "bf16"
        print(f"| {giant} | {words} | {len(found['files'])} | {tensors:,} | {' | '.join(told)} |")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
