"""An NF4 base and an adapter to a bf16 folder: adapterkit, bitsandbytes' decoding alone, and the usual way.

    python bench/nf4.py --shape 1b --runs 5 --usual

The base is quantized once by adapterkit (the bytes are bitsandbytes'; see tests/codecs). "bitsandbytes" decodes every
weight of it from memory with its CPU kernel, with as many threads as adapterkit has, and writes nothing. "usual" is
transformers + PEFT: load, dequantize, merge, save. Runs alternate, each in a process of its own; medians are printed.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path

from merge import HIGH_WATER, run
from shapes import SHAPES, write_adapter, write_base

import adapterkit
from adapterkit.adapters.quantized import quantized

OURS = (
    HIGH_WATER
    + """
import json, sys, time
start = time.monotonic()
import torch, xxhash
import adapterkit.checkpoint.write
from adapterkit import merge
imported = time.monotonic()
merge(sys.argv[1], [sys.argv[2]], sys.argv[3], jobs=int(sys.argv[4]) or None, fidelity=sys.argv[5:] == ["fidelity"])
print(json.dumps({"imports": imported - start, "work": time.monotonic() - imported, "memory": high_water()}))
"""
)

KERNEL = (
    HIGH_WATER
    + """
import json, logging, sys, time
from pathlib import Path
start = time.monotonic()
logging.disable(logging.WARNING)
import torch
import bitsandbytes.functional as F
from safetensors import safe_open
torch.set_num_threads(int(sys.argv[2]))
imported = time.monotonic()
work = weights = 0
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        for name in sorted(n for n in names if n + ".absmax" in names):
            packed = file.get_tensor(name).clone()
            parts = {n.removeprefix(name + "."): file.get_tensor(n) for n in names if n.startswith(name + ".")}
            state = F.QuantState.from_dict(parts, torch.device("cpu"))
            begin = time.monotonic()
            F.dequantize_4bit(packed, state)
            work += time.monotonic() - begin
            weights += packed.numel() * 2
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/adapterkit-bench"))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--usual", action="store_true", help="also transformers + PEFT, once")
    options = parser.parse_args()
    root = options.dir / options.shape
    base, adapter, out = root / "base", root / "adapter", root / "out"
    if not base.exists():
        write_base(base, SHAPES[options.shape])
        write_adapter(adapter, SHAPES[options.shape])
    nf4 = root / "nf4"
    if not nf4.exists():
        adapterkit.save(quantized(adapterkit.open(base), "nf4", double_quant=True), nf4)
    jobs = str(options.jobs)
    found: dict[str, list[dict[str, float]]] = {"bitsandbytes": [], "adapterkit": []}
    for index in range(options.runs + 1):
        shutil.rmtree(out, ignore_errors=True)
        pair = {
            "bitsandbytes": run(KERNEL, str(nf4), jobs),
            "adapterkit": run(OURS, str(nf4), str(adapter), str(out), jobs),
        }
        for name, one in pair.items():
            if index:  # the first round warms the caches
                found[name].append(one)
    if options.usual:
        shutil.rmtree(out, ignore_errors=True)
        found["usual"] = [run(USUAL, str(nf4), str(adapter), str(out))]
    weights = found["bitsandbytes"][0]["weights"]
    print(f"{options.shape}: {weights / 1e9:.2f}e9 NF4 weights, LoRA r=16 on all of them, {jobs} threads, in {root}")
    print(f"{'':<13} {'seconds':>8} {'Mweights/s':>11} {'imports':>8} {'peak memory':>12}")
    for name, runs in found.items():
        work, imports, memory = (statistics.median(one[key] for one in runs) for key in ("work", "imports", "memory"))
        print(f"{name:<13} {work:>8.2f} {weights / work / 1e6:>11.0f} {imports:>8.2f} {memory / 1e6:>9.0f} MB")
    pairs = [
        theirs["work"] / ours["work"] for ours, theirs in zip(found["adapterkit"], found["bitsandbytes"], strict=True)
    ]
    print(
        f"adapterkit's throughput over bitsandbytes' decoding alone: median {statistics.median(pairs):.2f}, "
        f"{min(pairs):.2f} to {max(pairs):.2f}"
    )
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
