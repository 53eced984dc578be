"""How fast a merge is, beside `cp -r`, PEFT and mergekit in the same run.

    python bench/merge.py --shape 1b --runs 5 --peft --mergekit PATH/TO/mergekit-yaml

Everything lies in one folder (by default in /dev/shm, so that the disk's mood stays out). The commands alternate, every
run in a process of its own; what is printed are medians over the runs, the ratio to `cp -r` and the peak memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from shapes import SHAPES, write_adapter, write_base

HIGH_WATER = """
def high_water():
    line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
"""

OURS = (
    HIGH_WATER
    + """
import json, sys, time
start = time.monotonic()
import torch, xxhash
import adapterkit
from adapterkit import merge
import adapterkit.checkpoint.write
imported = time.monotonic()
report = merge(sys.argv[1], [sys.argv[2]], sys.argv[3], jobs=int(sys.argv[4]) or None)
print(json.dumps({"imports": imported - start, "work": time.monotonic() - imported, "memory": high_water()}))
"""
)

PEFT = (
    HIGH_WATER
    + """
import json, sys, time
start = time.monotonic()
import torch, peft, transformers
imported = time.monotonic()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
model = peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3])
print(json.dumps({"imports": imported - start, "work": time.monotonic() - imported, "memory": high_water()}))
"""
)


def run(script: str, *arguments: str) -> dict[str, float]:
    """One process; what it measured of itself."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def copy(base: Path, out: Path) -> dict[str, float]:
    start = time.monotonic()
    subprocess.run(["cp", "-r", base, out], check=True)
    return {"imports": 0.0, "work": time.monotonic() - start, "memory": 0.0}


def mergekit(program: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    recipe = out.parent / "mergekit.yml"
    recipe.write_text(f"models:\n  - model: {base}+{adapter}\nmerge_method: passthrough\ndtype: bfloat16\n")
    cache = out.parent / "mergekit-cache"
    start = time.monotonic()
    command = [program, str(recipe), str(out), "--lora-merge-cache", str(cache)]
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.monotonic() - start
    shutil.rmtree(cache, ignore_errors=True)
    if done.returncode:
        print(f"mergekit failed: {done.stderr.splitlines()[-1:]}", file=sys.stderr)
    return {"imports": 0.0, "work": seconds, "memory": 0.0}


def digest(folder: Path) -> str:
    """One hash over all weight files of a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/adapterkit-bench"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=0, help="0: as many as adapterkit chooses")
    parser.add_argument("--peft", action="store_true", help="also PEFT, once")
    parser.add_argument("--mergekit", metavar="PROGRAM", help="also mergekit-yaml, once")
    parser.add_argument("--threads", action="store_true", help="also compare the bytes of 1, 2 and 8 threads")
    options = parser.parse_args()
    root = options.dir / options.shape
    base, adapter, out = root / "base", root / "adapter", root / "out"
    if not base.exists():
        write_base(base, SHAPES[options.shape])
        write_adapter(adapter, SHAPES[options.shape])
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    print(f"{options.shape}: {weights / 1e9:.2f} GB of bf16, LoRA r=16 on all linear layers, in {root}")
    found: dict[str, list[dict[str, float]]] = {"cp -r": [], "adapterkit": []}
    for index in range(options.runs + 1):
        for name in ("cp -r", "adapterkit"):
            shutil.rmtree(out, ignore_errors=True)
            one = (
                copy(base, out) if name == "cp -r" else run(OURS, str(base), str(adapter), str(out), str(options.jobs))
            )
            if index:  # the first round warms the caches
                found[name].append(one)
    if options.peft:
        shutil.rmtree(out, ignore_errors=True)
        found["PEFT"] = [run(PEFT, str(base), str(adapter), str(out))]
    if options.mergekit:
        shutil.rmtree(out, ignore_errors=True)
        found["mergekit"] = [mergekit(options.mergekit, base, adapter, out)]
    whole = statistics.median(one["work"] for one in found["cp -r"])
    print(f"{'':<11} {'seconds':>8} {'over cp':>8} {'imports':>8} {'peak memory':>12}")
    for name, runs in found.items():
        work, imports, memory = (statistics.median(one[key] for one in runs) for key in ("work", "imports", "memory"))
        peak = f"{memory / 1e6:.0f} MB" if memory else ""
        print(f"{name:<11} {work:>8.2f} {work / whole:>8.2f} {imports:>8.2f} {peak:>12}")
    pairs = [ours["work"] / theirs["work"] for ours, theirs in zip(found["adapterkit"], found["cp -r"], strict=True)]
    print(
        f"adapterkit over cp -r, pair by pair: median {statistics.median(pairs):.2f}, {min(pairs):.2f} to {max(pairs):.2f}"
    )
    if options.threads:
        digests = {}
        for jobs in (1, 2, 8):
            shutil.rmtree(out, ignore_errors=True)
            run(OURS, str(base), str(adapter), str(out), str(jobs))
            digests[jobs] = digest(out)
        same = len(set(digests.values())) == 1
        print(f"1, 2 and 8 threads: {'the same bytes' if same else 'DIFFERENT BYTES'} ({digests[1][:16]})")
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
