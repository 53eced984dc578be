"""How fast a merge is, beside `cp -r`, PEFT and mergekit in the same run.

    python -m bench speed merge --shape 1b --runs 5 --peft --mergekit PATH/TO/mergekit-yaml

Everything lies in one folder (by default in /dev/shm, so that the disk's mood stays out). The commands alternate, every
run in a process of its own; what is printed are medians over the runs, the ratio to `cp -r` and the peak memory. Start-up
is shown apart: adapterkit and PEFT first merge a tiny model in the same process, so that whatever they import or set
up late counts as that. A machine that others use too is best measured with priority (``chrt -f 10 python bench/...``).
With ``--sync``, for a real disk, the copy ends when its bytes are on it, as a merge does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.common import results
from bench.common.shapes import HIGH_WATER, SHAPES, write_adapter, write_base

OURS = (
    HIGH_WATER
    + """
import json, sys, time
start = time.monotonic()
from adapterkit import merge
merge(sys.argv[4], [sys.argv[5]], sys.argv[6], jobs=int(sys.argv[7]) or None)
imported = time.monotonic()
merge(sys.argv[1], [sys.argv[2]], sys.argv[3], jobs=int(sys.argv[7]) or None)
print(json.dumps({"imports": imported - start, "work": time.monotonic() - imported, "memory": high_water()}))
"""
)

PEFT = (
    HIGH_WATER
    + """
import json, sys, time
start = time.monotonic()
import torch, peft, transformers
def merge(base, adapter, out):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(out)
merge(sys.argv[4], sys.argv[5], sys.argv[6])
imported = time.monotonic()
merge(sys.argv[1], sys.argv[2], sys.argv[3])
print(json.dumps({"imports": imported - start, "work": time.monotonic() - imported, "memory": high_water()}))
"""
)


def run(script: str, *arguments: str) -> dict[str, float]:
    """One process; what it measured of itself."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def copy(base: Path, out: Path, *, sync: bool = False) -> dict[str, float]:
    start = time.monotonic()
    subprocess.run(["cp", "-r", base, out], check=True)
    if sync:
        subprocess.run(["sync", *out.iterdir()], check=True)
    return {"imports": 0.0, "work": time.monotonic() - start, "memory": 0.0}


def mergekit(program: str, base: Path, adapter: Path, out: Path) -> dict[str, float]:
    """One run of mergekit, start-up and all."""
    recipe, cache = out.parent / "mergekit.yml", out.parent / "mergekit-cache"
    recipe.write_text(f"models:\n  - model: {base}+{adapter}\nmerge_method: passthrough\ndtype: bfloat16\n")
    start = time.monotonic()
    command = [program, str(recipe), str(out), "--lora-merge-cache", str(cache)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        said = process.stderr.read() if process.stderr else b""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    seconds = time.monotonic() - start
    shutil.rmtree(cache, ignore_errors=True)
    if status:
        sys.exit(f"mergekit failed: {said.decode().splitlines()[-1:]}")
    return {"imports": 0.0, "work": seconds, "memory": 1024.0 * usage.ru_maxrss}


def digest(folder: Path) -> str:
    """One hash over all weight files of a folder."""
    total = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


_START = {"adapterkit": "", "PEFT": "peft_", "mergekit": "mergekit_"}


def _shown(name: str) -> str:
    from importlib.metadata import version

    return {"cp -r": "`cp -r` of the base", "PEFT": f"PEFT {version('peft')}, merge and save"}.get(name, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/adapterkit-bench"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer-runs", type=int, default=1, help="rounds in which PEFT and mergekit run too")
    parser.add_argument("--jobs", type=int, default=0, help="0: as many as adapterkit chooses")
    parser.add_argument("--peft", action="store_true", help="also PEFT")
    parser.add_argument("--mergekit", metavar="PROGRAM", help="also mergekit-yaml, the program given")
    parser.add_argument("--threads", action="store_true", help="also compare the bytes of 1, 2 and 8 threads")
    parser.add_argument("--sync", action="store_true", help="a copy ends when its bytes are on the disk")
    parser.add_argument(
        "--cold", action="store_true", help="no first round that warms the caches: for shapes that outgrow them"
    )
    parser.add_argument("--keep", action="store_true", help="leave the base and the adapter for another run")
    options = parser.parse_args()
    root = options.dir / options.shape
    base, adapter, out = root / "base", root / "adapter", root / "out"
    small = (options.dir / "first" / "base", options.dir / "first" / "adapter", options.dir / "first" / "out")
    for folder, shape in ((root, options.shape), (options.dir / "first", "tiny")):
        if not folder.exists():
            write_base(folder / "base", SHAPES[shape])
            write_adapter(folder / "adapter", SHAPES[shape])
    weights = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    print(f"{options.shape}: {weights / 1e9:.2f} GB of bf16, LoRA r=16 on all linear layers, in {root}")

    def clean() -> None:
        for folder in (out, small[2]):
            shutil.rmtree(folder, ignore_errors=True)

    def ours(jobs: int) -> dict[str, float]:
        clean()
        return run(OURS, *map(str, (base, adapter, out, *small, jobs)))

    def theirs(program: str) -> dict[str, float]:
        clean()
        start_up = mergekit(program, *small)["work"]
        whole = mergekit(program, base, adapter, out)
        return {**whole, "imports": start_up, "work": whole["work"] - start_up}

    commands: dict[str, Callable[[], dict[str, float]]] = {
        "cp -r": lambda: copy(base, out, sync=options.sync),
        "adapterkit": lambda: ours(options.jobs),
    }
    if options.peft:
        commands["PEFT"] = lambda: run(PEFT, *map(str, (base, adapter, out, *small)))
    if options.mergekit:
        commands["mergekit"] = lambda: theirs(options.mergekit)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for index in range(options.cold, options.runs + 1):
        for name, command in commands.items():
            if name in ("PEFT", "mergekit") and not 1 <= index <= options.peer_runs:
                continue
            clean()
            one = command()
            if index:  # the first round warms the caches
                found[name].append(one)
    whole = statistics.median(one["work"] for one in found["cp -r"])
    results.head("", "seconds", "over `cp -r`", "peak memory")
    for name, runs in found.items():
        work, imports, memory = (statistics.median(one[key] for one in runs) for key in ("work", "imports", "memory"))
        peak = f"{memory / 1e6:.0f} MB" if memory else ""
        results.row(_shown(name), f"{work:.2f}", f"{work / whole:.1f}", peak)
        if name != "cp -r":
            results.note(**{f"{_START[name]}start_s": round(imports, 1)})
    pairs = [ours["work"] / theirs["work"] for ours, theirs in zip(found["adapterkit"], found["cp -r"], strict=True)]
    results.note(ratio=round(statistics.median(pairs), 2), least=round(min(pairs), 2), most=round(max(pairs), 2))
    print(
        f"adapterkit over cp -r, pair by pair: median {statistics.median(pairs):.2f}, {min(pairs):.2f} to {max(pairs):.2f}"
    )
    if options.threads:
        digests = {}
        for jobs in (1, 2, 8):
            ours(jobs)
            digests[jobs] = digest(out)
        same = len(set(digests.values())) == 1
        print(f"1, 2 and 8 threads: {'the same bytes' if same else 'DIFFERENT BYTES'} ({digests[1][:16]})")
    clean()
    if not options.keep:
        shutil.rmtree(options.dir)


if __name__ == "__main__":
    main()
