"""A merge with its arithmetic on a GPU, beside the same on the CPU in one run: seconds, memory, and how far the bytes agree.

    python -m bench speed gpu --shape 1b --runs 3 --most 420

Each case runs in a process of its own, the devices in turn; start-up is left out by a merge of a tiny model first. Seconds are
medians. "equal" is the share of the outputs' tensors that have the same bytes on both devices, "apart" the largest distance
of two values in steps of bfloat16 (a GPU sums in another order, so a last bit may differ). When ``--most`` seconds have gone,
no further case is begun. Without a GPU it says so and ends with 2; ``--device cpu`` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import adapterkit
from adapterkit.adapters.quantized import quantized
from adapterkit.errors import AdapterkitError
from adapterkit.ops.device import check_there
from bench.common import results
from bench.common.shapes import HIGH_WATER, SHAPES, write_adapter, write_base
from bench.speed.one_pass import tokenizer

RUN = (
    HIGH_WATER
    + """
import json, sys, time
import torch
from adapterkit import merge
tiny, base, adapter, out, given = sys.argv[1:]
given = json.loads(given)
merge(f"{tiny}/base", [f"{tiny}/lora"], f"{tiny}/out", force=True, device=given["device"])
start = time.monotonic()
merge(base, [adapter], out, **given)
seconds = time.monotonic() - start
card = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
print(json.dumps({"seconds": seconds, "memory": high_water(), "card": card}))
"""
)
# What is measured: the base, the adapter, options of `merge`, and the output's suffix.
CASES = {
    "LoRA, bf16": ("base", "lora", {}, ""),
    "DoRA, bf16": ("base", "dora", {}, ""),
    "LoRA on an NF4 base, to bf16": ("nf4", "lora", {}, ""),
    "LoRA, to NF4": ("base", "lora", {"quant": "nf4", "yes_lossy": True}, ""),
    "LoRA, to Q8_0": ("base", "lora", {"quant": "Q8_0"}, ".gguf"),
    "LoRA, to Q4_K_M": ("base", "lora", {"quant": "Q4_K_M", "yes_lossy": True}, ".gguf"),
}


def prepare(root: Path, shape: str) -> None:
    """A base, the same in NF4, a LoRA and a DoRA of a shape, and a base and a LoRA of a tiny one."""
    shutil.rmtree(root, ignore_errors=True)
    for folder, name in ((root, shape), (root / "tiny", "tiny")):
        write_base(folder / "base", SHAPES[name])
        write_adapter(folder / "lora", SHAPES[name])
    tokenizer(root / "base")
    adapterkit.save(quantized(adapterkit.open(root / "base"), "nf4"), root / "nf4")
    write_adapter(root / "dora", SHAPES[shape], use_dora=True)
    path = root / "dora/adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        rows = tensors[name].shape[0]
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(rows)
    save_file(tensors, path, metadata={"format": "pt"})


def measured(root: Path, case: str, device: str, out: Path) -> dict[str, float]:
    """One merge in a process of its own."""
    base, adapter, given, _ = CASES[case]
    words = [
        str(root / "tiny"),
        str(root / base),
        str(root / adapter),
        str(out),
        json.dumps({**given, "device": device}),
    ]
    done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{case} on {device} failed: {done.stderr[-600:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def agreement(first: Path, second: Path) -> tuple[float, int]:
    """The share of tensors (of a file: 1 or 0) with the same bytes, and the largest distance in steps of bfloat16."""
    if first.is_file():
        same = first.read_bytes() == second.read_bytes()
        return float(same), 0
    equal = count = apart = 0
    for path in sorted(first.glob("*.safetensors")):
        with safe_open(path, "pt") as one, safe_open(second / path.name, "pt") as other:
            for name in one.keys():  # noqa: SIM118
                a, b = one.get_tensor(name), other.get_tensor(name)
                count += 1
                if torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                    equal += 1
                elif a.dtype == torch.bfloat16:
                    steps = (_ordered(a) - _ordered(b)).abs().max()
                    apart = max(apart, int(steps))
    return equal / count, apart


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 values as whole numbers in the same order, neighbours one apart."""
    bits = values.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/adapterkit-gpu"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--most", type=float, default=420.0, help="seconds after which no further case is begun")
    options = parser.parse_args()
    try:
        check_there(options.device)
    except AdapterkitError as error:
        print(error.message, file=sys.stderr)
        raise SystemExit(2) from None
    start = time.monotonic()
    if options.device != "cpu":
        index = torch.device(options.device).index or 0
        results.note(card=torch.cuda.get_device_properties(index).name)
    prepare(options.dir, options.shape)
    results.head("Merge", "CPU, s", f"{options.device}, s", "times", "memory", "on the card", "equal", "apart")
    for case, (_, _, _, suffix) in CASES.items():
        if time.monotonic() - start > options.most:
            print(f"{case}: not run, {options.most:g} s are over", file=sys.stderr)
            continue
        outs = {device: options.dir / f"out-{place}{suffix}" for place, device in enumerate(("cpu", options.device))}
        outs = outs if len(outs) == 2 else {**outs, "cpu ": options.dir / f"again{suffix}"}
        found: dict[str, list[dict[str, float]]] = {device: [] for device in outs}
        for _ in range(options.runs):
            for device, out in outs.items():
                shutil.rmtree(out, ignore_errors=True) if out.is_dir() else out.unlink(missing_ok=True)
                found[device].append(measured(options.dir, case, device.strip(), out))
        cpu, other = (statistics.median(run["seconds"] for run in runs) for runs in found.values())
        last = list(found.values())[-1]
        memory, card = (max(run[key] for run in last) / 1e6 for key in ("memory", "card"))
        equal, apart = agreement(*outs.values())
        results.row(
            case,
            f"{cpu:.2f}",
            f"{other:.2f}",
            f"{cpu / other:.1f}",
            f"{memory:.0f} MB",
            f"{card:.0f} MB",
            f"{equal:.3f}",
            f"{apart}",
        )
    shutil.rmtree(options.dir)


if __name__ == "__main__":
    main()
