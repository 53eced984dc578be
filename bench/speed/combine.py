"""Combining adapters of 7B shape, beside PEFT's ``add_weighted_adapter`` in the same run.

    python -m bench speed combine [--whole] [--peft svd ties_svd] [--adapters 2 4 8]

PEFT forms every dense delta and takes its SVD, which for all 224 layers of a 7B model is hours; so it gets one layer
(``q_proj``, 4096 x 4096), and so do we for the comparison. ``--whole`` combines four adapters on all linear layers of the
whole model, which only we do. Adapters have rank 16 and so has the result. Every run is a process of its own
(ours on one layer: its second call, files read and written; PEFT's: the call alone, on adapters that are loaded). Errors are
||result - sum|| / ||sum|| in float64 (for ties: against TIES of the true deltas).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.common import results
from bench.common.shapes import HIGH_WATER, SHAPES, linears

RANK = 16
LAYER = "model.layers.0.self_attn.q_proj"

OURS = (
    HIGH_WATER
    + """
import json, sys, time, torch
from adapterkit import combine
how = {"svd": {"method": "svd"}, "ties_svd": {"method": "ties", "density": 0.2}}[sys.argv[1]]
def once():
    began = time.monotonic()
    combine(sys.argv[3:], sys.argv[2], rank=16, weights=[0.5] * len(sys.argv[3:]), force=True, **how)
    return time.monotonic() - began
if "one" in sys.argv[3]:  # of milliseconds, the imports that PEFT has behind it too would be most
    once()
print(json.dumps({"seconds": once(), "memory": high_water()}))
"""
)

PEFT = (
    HIGH_WATER
    + """
import json, sys, time, torch
from peft import PeftModel
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(4096, 4096, bias=False)
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([torch.nn.Module()])
        self.model.layers[0].self_attn = Block()
kind, out, *folders = sys.argv[1:]
peft = PeftModel.from_pretrained(Model(), folders[0], adapter_name="a0")
names = ["a0"]
for index, folder in enumerate(folders[1:], 1):
    peft.load_adapter(folder, adapter_name=f"a{index}")
    names.append(f"a{index}")
how = {"density": 0.2} if kind == "ties_svd" else {}
began = time.monotonic()
with torch.no_grad():
    peft.base_model.add_weighted_adapter(names, [0.5] * len(names), "all", combination_type=kind, svd_rank=16, **how)
seconds = time.monotonic() - began
peft.save_pretrained(out, selected_adapters=["all"])
print(json.dumps({"seconds": seconds, "memory": high_water()}))
"""
)


def write(folder: Path, layers: dict[str, tuple[int, int]], seed: int) -> Path:
    """An adapter of the scale that training leaves."""
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in layers.items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none"}
    said["target_modules"] = sorted({name.rpartition(".")[2] for name in layers})
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def run(script: str, *arguments: object) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def delta(folder: Path, scale: float) -> torch.Tensor:
    key = f"base_model.model.{LAYER}"
    factors = load_file(folder / "adapter_model.safetensors")
    return scale * factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()


def ties(deltas: list[torch.Tensor], density: float = 0.2) -> torch.Tensor:
    """TIES (arXiv:2306.01708, algorithm 1) of weighted deltas, in float64."""
    kept = []
    for one in deltas:
        cut = one.abs().flatten().kthvalue(one.numel() - round(density * one.numel()) + 1).values
        kept.append(torch.where(one.abs() >= cut, one, 0.0))
    sign = torch.stack(kept).sum(0).sign()
    agree = [(one.sign() == sign) & (one != 0) for one in kept]
    total = torch.stack([one * mask for one, mask in zip(kept, agree, strict=True)]).sum(0)
    return total / torch.stack(agree).sum(0).clamp(min=1)


def one_layer(root: Path, counts: list[int], kinds: list[str]) -> None:
    print(f"one layer, {LAYER} 4096 x 4096, rank {RANK} to rank {RANK}")
    peft = f"PEFT {version('peft')}"
    results.head("one layer, 4096 x 4096", "adapters", "seconds", peft, "ratio", "error", "PEFT's error", "peak memory")
    folders = [write(root / f"one{i}", {LAYER: (4096, 4096)}, i) for i in range(max(counts))]
    for kind in kinds:
        for count in counts:
            ours = run(OURS, kind, root / "ours", *folders[:count])
            theirs = run(PEFT, kind, root / "theirs", *folders[:count])
            parts = [delta(folder, 0.5 * 2) for folder in folders[:count]]
            exact = ties(parts) if kind == "ties_svd" else torch.stack(parts).sum(0)
            del parts
            errors = [
                float((delta(folder, 1.0) - exact).norm() / exact.norm())
                for folder in (root / "ours", root / "theirs" / "all")
            ]
            ratio = theirs["seconds"] / ours["seconds"]
            cells = (
                f"{ours['seconds']:.3f}",
                f"{theirs['seconds']:.0f}",
                f"{ratio:.0f}",
                *(f"{one:.6f}" for one in errors),
            )
            shown = "`svd`" if kind == "svd" else "`ties`, cut by SVD"
            results.row(shown, str(count), *cells, f"{ours['memory'] / 1e6:.0f} MB")


def whole(root: Path) -> None:
    shape = SHAPES["7b"]
    layers = {f"model.layers.{i}.{name}": size for i in range(shape.layers) for name, size in linears(shape).items()}
    folders = [write(root / f"whole{i}", layers, i) for i in range(4)]
    found = run(OURS, "svd", root / "ours", *folders)
    results.note(whole_s=round(found["seconds"], 1), whole_mb=round(found["memory"] / 1e6))
    print(
        f"whole 7B shape, {len(layers)} layers, 4 adapters by svd: {found['seconds']:.1f} s, "
        f"{found['memory'] / 1e6:.0f} MB at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/adapterkit-combine"))
    parser.add_argument("--adapters", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--peft", nargs="*", default=["svd", "ties_svd"], choices=["svd", "ties_svd"])
    parser.add_argument("--whole", action="store_true", help="also all layers of the whole model, ours alone")
    parser.add_argument("--keep", action="store_true", help="leave the adapters where they are")
    options = parser.parse_args()
    if options.whole:
        whole(options.dir)
    if options.peft:
        one_layer(options.dir, options.adapters, options.peft)
    if not options.keep:
        shutil.rmtree(options.dir)


if __name__ == "__main__":
    main()
