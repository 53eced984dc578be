"""Base and adapter to a Q4_K_M file, beside the usual road, in the same run.

    python -m bench speed one_pass [--shape 1b] [--runs 3]

The usual road is PEFT's merge into a 16-bit folder, a 16-bit GGUF of it, and llama.cpp's own C quantizer on that file
(``ggml_quantize_chunk`` of the library in xllamacpp, as many threads as ours, the same types). The 16-bit GGUF is written by
adapterkit's faster writer, in one streaming pass, which favours that road.

Both alternate, every step in a process of its own; printed are medians, their ratio, the peak memory, and the bytes that
lay on the disk at the worst moment. Start-up is shown apart: each process does the same on a tiny model first. A machine
that others use too is best measured with priority (``nice -n -15 python -m bench speed one_pass``).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from bench.common import results
from bench.common.shapes import HIGH_WATER, SHAPES, write_adapter, write_base

COMMON = (
    HIGH_WATER
    + """
import json, sys, time
jobs = int(sys.argv[1])
start = time.monotonic()
"""
)

FINISH = """
work(*sys.argv[2].split("|"))
ready, used = time.monotonic(), time.process_time()
work(*sys.argv[3].split("|"))
spent = {"work": time.monotonic() - ready, "cpu": time.process_time() - used}
print(json.dumps({"imports": ready - start, "memory": high_water(), **spent}))
"""

OURS = (
    COMMON
    + """
from adapterkit import merge
from adapterkit.gguf.quantize import Quantization
def work(base, adapter, out):
    merge(base, [adapter], out, quantization=Quantization("Q4_K_M"), jobs=jobs, force=True)
"""
    + FINISH
)

PEFT = (
    COMMON
    + """
import torch, peft, transformers
torch.set_num_threads(jobs)
def work(base, adapter, out):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    import shutil
    shutil.copy(base + "/tokenizer.json", out)
"""
    + FINISH
)

CONVERT = (
    COMMON
    + """
from adapterkit.verbs.convert import convert
def work(folder, out):
    convert(folder, out, jobs=jobs, force=True)
"""
    + FINISH
)

QUANTIZE = (
    COMMON
    + """
import ctypes
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from adapterkit.verbs.convert import plan_convert
from adapterkit.gguf.checkpoint import open_gguf
from adapterkit.gguf.kernels import native
from adapterkit.gguf.quantize import Quantization
from adapterkit.gguf.types import TYPES
quantize = native.library().ggml_quantize_chunk
SLAB = 1 << 22  # weights at a time

def work(source, out):
    # Types and places are those of our plan, so that both roads write the same kind of file; the work is C's.
    planned = plan_convert(source, out=out, quantization=Quantization("Q4_K_M"))
    steps = {step.tensor: step for file in planned.plan.files for step in file.steps}
    stored = open_gguf(source)
    with open(out, "wb") as file, ThreadPoolExecutor(jobs) as pool:
        file.truncate(planned.plan.nbytes)
        for name, tensor in stored.items():
            step = steps[name]
            kind = TYPES[planned.tensors[name].dtype.code]
            columns = tensor.shape[-1]
            rows = tensor.numel // columns
            file.seek(step.offset)
            if kind.name in ("F32", "F16", "BF16"):
                file.write(tensor.read(0, tensor.numel).contiguous().view(-1).numpy().tobytes())
                continue
            step_rows = max(1, SLAB // columns)
            for first in range(0, rows, step_rows):
                count = min(step_rows, rows - first)
                values = tensor.read(first * columns, (first + count) * columns).float().numpy()
                made = np.empty((count, kind.row_bytes(columns)), dtype=np.uint8)
                part = -(-count // jobs)
                def encode(at):
                    some = min(part, count - at)
                    quantize(kind.id, values[at * columns:].ctypes.data, made[at:].ctypes.data, 0, some, columns, None)
                list(pool.map(encode, range(0, count, part)))
                file.write(made.tobytes())
        file.flush()
        import os
        os.fsync(file.fileno())
"""
    + FINISH
)


STEPS = ("merge", "convert", "quantize")  # of the usual road


class Room:
    """The most bytes that a folder held while this was entered, beyond what it held before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.most = 0

    def __enter__(self) -> Room:
        self._before, self._done = self._held(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, self._held() - self._before)

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            self.most = max(self.most, self._held() - self._before)

    def _held(self) -> int:
        total = 0
        for path, _, names in os.walk(self._folder):
            for name in names:
                try:
                    total += os.stat(os.path.join(path, name)).st_size
                except FileNotFoundError:
                    continue
        return total


def run(script: str, jobs: int, first: tuple[Path, ...], then: tuple[Path, ...]) -> dict[str, float]:
    """One process: the work on a tiny model, then the one that is measured."""
    arguments = [str(jobs), *("|".join(map(str, paths)) for paths in (first, then))]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def tokenizer(folder: Path) -> None:
    """Of single bytes: the vocabulary's size is the embedding's either way."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {"ab": len(letters)}
    made = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/adapterkit-bench-gguf"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--layers", type=int, default=0, help="fewer than the shape has, for a quick look")
    options = parser.parse_args()
    places = {}
    for name, shape in (("first", "tiny"), ("then", options.shape)):
        root = options.dir / name
        shutil.rmtree(root, ignore_errors=True)
        built = SHAPES[shape]
        if name == "then" and options.layers:
            built = replace(built, layers=options.layers)
        write_base(root / "base", built)
        write_adapter(root / "adapter", built)
        tokenizer(root / "base")
        places[name] = root
    first, then = places["first"], places["then"]
    weights = sum(path.stat().st_size for path in (then / "base").glob("*.safetensors"))
    print(f"{options.shape}: {weights / 1e9:.2f} GB of bf16, LoRA r=16 on all linear layers, {options.jobs} threads")

    def pair(*names: str) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
        return tuple(first / name for name in names), tuple(then / name for name in names)

    def clean() -> None:
        for root in (first, then):
            for path in root.iterdir():
                if path.name not in ("base", "adapter"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def ours() -> list[dict[str, float]]:
        return [run(OURS, options.jobs, *pair("base", "adapter", "ours.gguf"))]

    def usual() -> list[dict[str, float]]:
        steps = [run(PEFT, options.jobs, *pair("base", "adapter", "merged"))]
        steps.append(run(CONVERT, options.jobs, *pair("merged", "merged-16.gguf")))
        steps.append(run(QUANTIZE, options.jobs, *pair("merged-16.gguf", "usual.gguf")))
        return steps

    found: dict[str, list[dict[str, float]]] = {"adapterkit": [], "usual road": []}
    try:
        for number in range(options.runs):
            for name, road in (("adapterkit", ours), ("usual road", usual)):
                clean()
                began = time.monotonic()
                with Room(then) as room:
                    steps = road()
                size = next(then.glob("*.gguf")).stat().st_size if name == "adapterkit" else 0
                row = {
                    "work": sum(step["work"] for step in steps),
                    "cpu": sum(step["cpu"] for step in steps),
                    "imports": sum(step["imports"] for step in steps),
                    "memory": max(step["memory"] for step in steps),
                    "room": float(room.most),
                    "size": float(size),
                }
                found[name].append(row)
                if name == "usual road":
                    results.note(**{f"{what}_s": round(step["work"]) for what, step in zip(STEPS, steps, strict=True)})
                parts = " + ".join(f"{step['work']:.1f}" for step in steps)
                whole = f"{time.monotonic() - began:.1f} s with start-up, {row['cpu']:.1f} s of CPU"
                held = f"{row['memory'] / 1e6:.0f} MB of memory, {row['room'] / 1e6:.1f} MB on the disk"
                print(f"  run {number + 1}, {name}: {parts} s ({whole}, {held})", flush=True)
    finally:
        shutil.rmtree(options.dir, ignore_errors=True)
    results.head("", "wall time", "CPU time", "peak memory", "on the disk, at most")
    for name, rows in found.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        spent, held = (f"{middle[key]:.1f} s" for key in ("work", "cpu")), (middle["memory"], middle["room"])
        results.row(name, *spent, *(f"{size / 1e6:.0f} MB" for size in held))
        peer = "" if name == "adapterkit" else "peer_"
        noted = {"start_s": middle["imports"], "seconds": middle["work"], "disk_gb": middle["room"] / 1e9}
        results.note(**{f"{peer}{key}": round(value, 1) for key, value in noted.items()})
        results.note(**{f"{peer}memory_mb": round(middle["memory"] / 1e6)})
    ratios = [a["work"] / b["work"] for a, b in zip(found["adapterkit"], found["usual road"], strict=True)]
    cpu = [a["cpu"] / b["cpu"] for a, b in zip(found["adapterkit"], found["usual road"], strict=True)]
    own = found["adapterkit"][0]
    results.note(ratio=round(statistics.median(ratios), 2), cpu_ratio=round(statistics.median(cpu), 2))
    print(f"wall time over the usual road's: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"CPU time over the usual road's: {statistics.median(cpu):.2f}")
    print(f"written: {own['room'] / 1e6:.1f} MB, of which the file {own['size'] / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
