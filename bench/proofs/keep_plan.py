"""DeepSeek-V3 (671B parameters, FP8 blocks) merged in its own format: what the plan takes, and one file of it, executed.

    python -m bench --save keep_plan proofs keep_plan --dir /var/tmp/adapterkit-huge

Base and adapter are sparse files (`bench.common.giants`) in files of about 0.6 GB, a LoRA of rank 16 on all projections of
attention. One file of the base that holds attention, and its factors, get real numbers; that file of the output is executed as
a part of the saved plan and read: every tensor that the adapter does not touch has the base's bytes, the others those of
transformers' rule (per block of 128 x 128 codes of W * (448 / absmax), scale absmax / 448) for decode(W) + BA in float32. Fails
where the plan is more than 690 GB, takes 12 processor seconds or 1.5 GB of memory, or a tensor of the file is another.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open

from adapterkit.checkpoint.plan import Plan
from adapterkit.verbs.execute import OpenPlan
from bench.common import results
from bench.common.giants import make
from bench.speed.huge import measured

SHARD = 600_000_000
MOST_BYTES, MOST_SECONDS, MOST_MEMORY = 690e9, 12.0, 1.5e9
LAYER = "model.layers.7.self_attn."
F8 = torch.float8_e4m3fn


def header(path: Path) -> tuple[dict[str, dict[str, list[int]]], int]:
    """The entries of a safetensors file, and where its bytes begin."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def fill(path: Path, generator: torch.Generator, only: str = "") -> list[str]:
    """Real numbers in the place of zeros, of tensors whose name has ``only`` in it; their names."""
    entries, begins = header(path)
    entries.pop("__metadata__", None)
    names = [name for name in entries if only in name]
    with open(path, "r+b") as file:
        for name in names:
            entry, shape = entries[name], tuple(entries[name]["shape"])
            if str(entry["dtype"]) == "F8_E4M3":
                made = (torch.randn(shape, generator=generator) * 60).clamp(-440, 440).to(F8)
            elif name.endswith("_scale_inv"):
                made = torch.rand(shape, generator=generator) * 1e-3 + 1e-5
            else:
                made = torch.randn(shape, generator=generator) * 0.02
                made = made if str(entry["dtype"]) == "F32" else made.bfloat16()
            file.seek(begins + entry["data_offsets"][0])
            file.write(made.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return names


def grown(scale: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A scale for each element."""
    return scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]


def encoded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of blocks, the last of which may be short."""
    down, across = (-(-size // 128) for size in weight.shape)
    whole = torch.zeros(down * 128, across * 128)
    whole[: weight.shape[0], : weight.shape[1]] = weight
    times = 448 / whole.view(down, 128, across, 128).abs().amax((1, 3))
    codes = (weight * grown(times, weight.shape)).clamp(-448, 448).to(F8)
    return codes, 1 / times


def wrong(base: Path, out: Path, adapter: Path) -> tuple[int, int, list[str]]:
    """Of one file: tensors that keep their bytes, those that are encoded again, and what is otherwise than it has to be."""
    kept, again, off = 0, 0, []
    with safe_open(base, "pt") as before, safe_open(out, "pt") as after, safe_open(adapter, "pt") as factors:
        keys = set(factors.keys())
        if list(before.keys()) != list(after.keys()):
            return 0, 0, ["other names"]
        for name in before.keys():  # noqa: SIM118
            module = name.removesuffix("_scale_inv").removesuffix(".weight")
            key = f"base_model.model.{module}.lora_"
            was, now = before.get_tensor(name), after.get_tensor(name)
            if f"{key}A.weight" not in keys:
                kept += 1
                wanted = was
            else:
                again += 1
                codes, scale = (before.get_tensor(f"{module}.weight{end}") for end in ("", "_scale_inv"))
                delta = factors.get_tensor(f"{key}B.weight") @ factors.get_tensor(f"{key}A.weight")
                wanted = encoded(codes.float() * grown(scale, codes.shape) + delta)[name.endswith("_scale_inv")]
            if now.dtype is not wanted.dtype or not torch.equal(now.view(torch.uint8), wanted.view(torch.uint8)):
                same = float((now.view(torch.uint8) == wanted.view(torch.uint8)).float().mean())
                off.append(f"{name}: {same:.4%} of its bytes are the same")
    return kept, again, off


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp/adapterkit-huge"))
    root: Path = parser.parse_args().dir / "keep"
    torch.set_num_threads(1)
    shutil.rmtree(root, ignore_errors=True)
    make(root, "deepseek-v3", SHARD)
    base, adapter, plan = root / "base", root / "adapter", root / "plan.json"
    file = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"][f"{LAYER}o_proj.weight"]
    generator = torch.Generator().manual_seed(0)
    fill(base / file, generator)
    fill(adapter / "adapter_model.safetensors", generator, LAYER)
    how = (str(base), str(adapter), "--quant", "keep")
    shown = measured("merge", *how, "--dry-run")
    measured("merge", *how, "--save-plan", str(plan), "--yes-lossy")
    found = Plan.from_json(plan.read_bytes())
    nbytes = sum(one.nbytes for one in found.files)
    tensors = sum(len(one["tensors"]) for one in json.loads(plan.read_bytes())["files"])
    part = next(part.index for part in OpenPlan(found, root / "out").parts if part.file.name == file)
    executed = measured("execute", str(plan), "-o", str(root / "out"), "--part", str(part))
    kept, again, off = wrong(base / file, root / ".out.partial" / file, adapter / "adapter_model.safetensors")
    results.head("", "processor seconds", "memory, MB")
    results.row(f"plan of {nbytes / 1e9:.1f} GB, {tensors:,} tensors", f"{shown[0]:.1f}", f"{shown[1] / 1e6:.0f}")
    results.row(f"one file of {len(found.files)}", f"{executed[0]:.1f}", f"{executed[1] / 1e6:.0f}")
    results.note(
        plan_gb=round(nbytes / 1e9, 1), tensors=tensors, plan_s=round(shown[0], 1), plan_mb=round(shown[1] / 1e6)
    )
    results.note(kept=kept, again=again, wrong=len(off))
    print(f"of the file {kept} tensors keep their bytes, {again} are encoded again, {len(off)} are wrong")
    print(*off, sep="\n")
    shutil.rmtree(root)
    held = nbytes <= MOST_BYTES and shown[0] < MOST_SECONDS and shown[1] < MOST_MEMORY
    return 0 if held and again and not off else 1


if __name__ == "__main__":
    raise SystemExit(main())
