"""An NF4 base and an adapter to a bf16 folder: adapterkit, bitsandbytes' decoding alone, and the usual way.

    python -m bench speed nf4 --shape 1b --runs 5 --usual

The base is quantized once by adapterkit (the bytes are bitsandbytes'; see tests/codecs). "bitsandbytes" decodes every
weight of it from memory with its CPU kernel, with as many threads as adapterkit has, and writes nothing; "and written"
also puts what it decoded into a file, which nothing that makes a folder can do without. "usual" is transformers + PEFT:
load, dequantize, merge, save. Runs alternate, each in a process of its own; medians are printed. Start-up is shown apart:
all but "usual" first do a tiny model, so that what they import or set up late counts as that.

In /dev/shm a virtual machine may have to ask its host for every page that was not used for some seconds, which takes ten
times as long as writing it. So each run first fills as much memory as it will write, and frees it again.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path

import adapterkit
from adapterkit.adapters.quantized import quantized
from bench.common import results
from bench.common.shapes import SHAPES, write_adapter, write_base
from bench.speed.merge import HIGH_WATER, run

PAGES = """
import os
def touch(folder, count):
    path = os.path.join(folder, "pages")
    with open(path, "wb", buffering=0) as file:
        for _ in range(count >> 20):
            file.write(bytes(1 << 20))
    os.unlink(path)
"""

OURS = (
    HIGH_WATER
    + PAGES
    + """
import json, sys, time
start = time.monotonic()
from adapterkit import merge
base, adapter, out, tiny_base, tiny_adapter, tiny_out, jobs, count, *told = sys.argv[1:]
fidelity = told == ["fidelity"]
merge(tiny_base, [tiny_adapter], tiny_out, jobs=int(jobs), fidelity=fidelity)
touch(os.path.dirname(out), int(count))
imported = time.monotonic()
merge(base, [adapter], out, jobs=int(jobs), fidelity=fidelity)
print(json.dumps({"imports": imported - start, "work": time.monotonic() - imported, "memory": high_water()}))
"""
)

KERNEL = (
    HIGH_WATER
    + PAGES
    + """
import json, logging, sys, time
from pathlib import Path
start = time.monotonic()
logging.disable(logging.WARNING)
import torch
import bitsandbytes.functional as F
from safetensors import safe_open
base, tiny_base, jobs, count, out = sys.argv[1:]
torch.set_num_threads(int(jobs))
fd = os.open(out, os.O_WRONLY | os.O_CREAT) if out else None
def decode(base):
    work = weights = 0
    for path in sorted(Path(base).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            for name in sorted(n for n in names if n + ".absmax" in names):
                packed = file.get_tensor(name).clone()
                parts = {n.removeprefix(name + "."): file.get_tensor(n) for n in names if n.startswith(name + ".")}
                state = F.QuantState.from_dict(parts, torch.device("cpu"))
                begin = time.monotonic()
                found = F.dequantize_4bit(packed, state)
                if fd is not None:
                    os.write(fd, memoryview(found.view(torch.uint8).numpy()).cast("B"))
                work += time.monotonic() - begin
                weights += packed.numel() * 2
    return work, weights
decode(tiny_base)
touch(os.path.dirname(base), int(count))
imported = time.monotonic()
work, weights = decode(base)
print(json.dumps({"imports": imported - start, "work": work, "memory": high_water(), "weights": weights}))
"""
)

USUAL = (
    HIGH_WATER
    + """
import json, logging, sys, time
start = time.monotonic()
logging.disable(logging.WARNING)
import torch, peft, transformers
imported = time.monotonic()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model = model.dequantize(torch.bfloat16)
model = peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3], save_original_format=False)
print(json.dumps({"imports": imported - start, "work": time.monotonic() - imported, "memory": high_water()}))
"""
)


def prepare(root: Path, shape: str) -> None:
    """The base and the adapter of a shape, NF4 of the base, and the same of a tiny one in ``tiny``."""
    for folder, name in ((root, shape), (root / "tiny", "tiny")):
        if not (folder / "base").exists():
            write_base(folder / "base", SHAPES[name])
            write_adapter(folder / "adapter", SHAPES[name])
        if not (folder / "nf4").exists():
            adapterkit.save(quantized(adapterkit.open(folder / "base"), "nf4", double_quant=True), folder / "nf4")


def ours(root: Path, base: str, jobs: int, *told: str) -> dict[str, float]:
    """One merge of ``base`` (or ``nf4``) by adapterkit in a process of its own."""
    for folder in (root / "out", root / "tiny" / "out"):
        shutil.rmtree(folder, ignore_errors=True)
    folders = [str(folder / name) for folder in (root, root / "tiny") for name in (base, "adapter", "out")]
    return run(OURS, *folders, str(jobs), written_bytes(root), *told)


def written_bytes(root: Path) -> str:
    return str(sum(path.stat().st_size for path in (root / "base").glob("*.safetensors")))


_SHOWN = {
    "bitsandbytes": "bitsandbytes' decoding alone, writing nothing",
    "and written": "bitsandbytes' decoding, and what it decoded written to a file",
    "adapterkit": "adapterkit, the whole merge",
    "usual": "transformers + PEFT: load, dequantize, merge, save",
}
_NOTED = {"adapterkit": "", "usual": "peer_"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/adapterkit-bench"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--usual", action="store_true", help="also transformers + PEFT, once")
    options = parser.parse_args()
    root = options.dir / options.shape
    adapter, out, nf4, written = root / "adapter", root / "out", root / "nf4", root / "decoded"
    prepare(root, options.shape)
    jobs = str(options.jobs)
    kernel = (str(nf4), str(root / "tiny" / "nf4"), jobs, written_bytes(root))
    found: dict[str, list[dict[str, float]]] = {"bitsandbytes": [], "and written": [], "adapterkit": []}
    for index in range(options.runs + 1):
        done = {"bitsandbytes": run(KERNEL, *kernel, ""), "and written": run(KERNEL, *kernel, str(written))}
        written.unlink()
        done["adapterkit"] = ours(root, "nf4", options.jobs)
        for name, one in done.items():
            if index:  # the first round warms the caches
                found[name].append(one)
    if options.usual:
        shutil.rmtree(out, ignore_errors=True)
        found["usual"] = [run(USUAL, str(nf4), str(adapter), str(out))]
    weights = found["bitsandbytes"][0]["weights"]
    print(f"{options.shape}: {weights / 1e9:.2f}e9 NF4 weights, LoRA r=16 on all of them, {jobs} threads, in {root}")
    results.head("", "seconds", "Mweights/s", "peak memory")
    for name, runs in found.items():
        work, memory = (statistics.median(one[key] for one in runs) for key in ("work", "memory"))
        results.row(_SHOWN[name], f"{work:.2f}", f"{weights / work / 1e6:.0f}", f"{memory / 1e6:.0f} MB")
        if name in _NOTED:
            results.note(**{f"{_NOTED[name]}seconds": round(work, 2), f"{_NOTED[name]}memory_mb": round(memory / 1e6)})
    print()
    results.head("adapterkit's throughput over", "median", "least", "most")
    for name, what in (
        ("bitsandbytes", "bitsandbytes' decoding alone"),
        ("and written", "its decoding, and what it decoded written"),
    ):
        pairs = [theirs["work"] / ours["work"] for ours, theirs in zip(found["adapterkit"], found[name], strict=True)]
        results.row(what, f"{statistics.median(pairs):.2f}", f"{min(pairs):.2f}", f"{max(pairs):.2f}")
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
