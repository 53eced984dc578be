"""A merge as a user starts it: the whole command from start to end, beside `cp -r` of the base in the same run.

    python -m bench speed process --shapes 135m 1b moe --runs 7 --peft

`bench/speed/merge.py` measures the work alone; this is with Python, imports, checks, the record and the report, and it ends
when the process has ended. Commands alternate; what is printed are medians, the ratio to `cp -r`, CPU seconds (of the
process and the kernel for it), and the seconds beyond 1.5 times the copy. Everything lies in one folder, by default in memory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench.common import results
from bench.common.shapes import SHAPES, write_adapter, write_base

PEFT = """
import sys, peft, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def whole(command: list[str]) -> tuple[float, float]:
    """Seconds and CPU seconds of a command."""
    before, start = os.times(), time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds, after = time.monotonic() - start, os.times()
    if done.returncode:
        sys.exit(f"{command[:3]} failed: {done.stderr[-400:]}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["1b"])
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/adapterkit-process"))
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--peft", action="store_true", help="also PEFT, in every second round")
    options = parser.parse_args()
    results.head("whole process, LoRA on all linear layers unless said", "seconds", "over `cp -r`", "CPU seconds")
    said = [one_shape(kind, options.dir, options.runs, options.peft) for kind in options.shapes]
    print(*filter(None, said), sep="\n")  # after the table: a line in it would end it


NAMED = {"135m": "135M", "1b": "1B", "3b": "3B", "7b": "7B", "moe": "18,771 tensors", "tiny": "tiny"}


def one_shape(kind: str, root: Path, rounds: int, peft: bool) -> str:
    """Time the commands on a base of one shape; a sentence about the whole of it, or none."""
    base, every, some, out = root / "base", root / "every", root / "attention", root / "out"
    shutil.rmtree(root, ignore_errors=True)
    write_base(base, SHAPES[kind])
    write_adapter(every, SHAPES[kind])
    write_adapter(some, SHAPES[kind], modules=("q_proj", "k_proj", "v_proj", "o_proj"))
    ours = [sys.executable, "-m", "adapterkit", "merge", str(base)]
    commands = {
        "`cp -r` of the base": ["cp", "-r", str(base), str(out)],
        "`adapterkit merge`": [*ours, str(every), "-o", str(out)],
        "`adapterkit merge`, LoRA on attention": [*ours, str(some), "-o", str(out)],
    }
    if peft:
        script = [sys.executable, "-W", "ignore", "-c", PEFT]
        commands["PEFT, merge and save"] = [*script, str(base), str(every), str(out)]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    try:
        for index in range(rounds + 1):
            for name, command in commands.items():
                if name.startswith("PEFT") and index % 2 == 0:
                    continue
                shutil.rmtree(out, ignore_errors=True)
                one = whole(command)
                if index:  # the first round warms the caches
                    found[name].append(one)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    medians = {name: [statistics.median(values) for values in zip(*runs, strict=True)] for name, runs in found.items()}
    copy = medians["`cp -r` of the base"][0]
    for name, (seconds, used) in medians.items():
        results.row(f"{NAMED[kind]}: {name}", f"{seconds:.2f}", f"{seconds / copy:.1f}", f"{used:.1f}")
    if kind == "1b":
        seconds = medians["`adapterkit merge`"][0]
        beyond = round(seconds - 1.5 * copy, 2)
        results.note(cp_s=round(copy, 2), seconds=round(seconds, 2), ratio=round(seconds / copy, 1), beyond_s=beyond)
        return f"all linear layers: {beyond:+.2f} s beyond 1.5 times the copy"
    if kind == "moe":
        seconds = medians["`adapterkit merge`"][0]
        results.note(small_s=round(seconds, 1), small_ratio=round(seconds / copy))
    return ""


if __name__ == "__main__":
    main()
