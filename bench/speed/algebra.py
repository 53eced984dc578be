"""`extract` and `resize` of one layer of a 7B and of a 70B model's shape, beside torch's own decompositions in the same run.

    python -m bench speed algebra [--shapes 7b 70b] [--runs 3]

The tuned layer is the base plus a change whose singular values fall as 1/k, in bf16. `extract` takes rank 32 of it from two
checkpoints on the disk. Its peer loads both, subtracts them and calls ``torch.svd_lowrank`` (Halko's randomized SVD with two
power iterations, the default) for each matrix in float32. `resize` brings an adapter of rank 64 to rank 16; its peer
multiplies the factors out and takes the dense SVD of each matrix in float32, which only the 7B shape gets (``--dense``: all).
Every run is a process of its own, and its second call counts: files read and, of ours, written. Errors are ||what was cut|| /
||the change||, of the whole layer; for each of the two the least possible one is not known at these sizes, so they are
compared with each other.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from bench.common import results
from bench.common.shapes import HIGH_WATER, SHAPES, Shape, write_adapter, write_base
from bench.speed.merge import run

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYERS = {
    "7b": replace(SHAPES["7b"], layers=1, vocab=256),
    "70b": Shape(8192, 28672, 1, 64, 8, 256),
    "tiny": replace(SHAPES["tiny"], layers=1),
}
COUNT = {"7b": 32, "70b": 80, "tiny": 1}
RANK, WIDE, NARROW = 32, 64, 16

EXTRACT = (
    HIGH_WATER
    + """
import json, sys, time
from adapterkit import extract
def once():
    began = time.monotonic()
    report = extract(sys.argv[1], sys.argv[2], sys.argv[3], rank=int(sys.argv[4]), force=True)
    return time.monotonic() - began, report
once()
seconds, report = once()
print(json.dumps({"seconds": seconds, "memory": high_water()}))
"""
)

LOWRANK = (
    HIGH_WATER
    + """
import json, sys, time, torch
from pathlib import Path
from safetensors import safe_open
def once():
    began = time.monotonic()
    cut = whole = 0.0
    files = [sorted(Path(folder).glob("*.safetensors")) for folder in sys.argv[1:3]]
    for one, other in zip(*files):
        with safe_open(one, "pt") as base, safe_open(other, "pt") as tuned:
            for name in base.keys():
                if "_proj" not in name:
                    continue
                change = tuned.get_tensor(name).float() - base.get_tensor(name).float()
                u, s, v = torch.svd_lowrank(change, q=int(sys.argv[4]), niter=2)
                whole += float(change.square().sum(dtype=torch.float64))
                cut += float((change - (u * s) @ v.T).square().sum(dtype=torch.float64))
    return time.monotonic() - began, (cut / whole) ** 0.5
seconds, error = once()
print(json.dumps({"seconds": seconds, "memory": high_water(), "error": error}))
"""
)

RESIZE = (
    HIGH_WATER
    + """
import json, sys, time
from adapterkit import resize
def once():
    began = time.monotonic()
    resize(sys.argv[1], sys.argv[2], rank=int(sys.argv[3]), force=True)
    return time.monotonic() - began
once()
print(json.dumps({"seconds": once(), "memory": high_water()}))
"""
)

DENSE = (
    HIGH_WATER
    + """
import json, sys, time, torch
from safetensors.torch import load_file
def once():
    began = time.monotonic()
    tensors = load_file(sys.argv[1] + "/adapter_model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." in name:
            u, s, v = torch.linalg.svd(tensors[name.replace("lora_A", "lora_B")] @ a, full_matrices=False)
    return time.monotonic() - began
print(json.dumps({"seconds": once(), "memory": high_water()}))
"""
)


def write_tuned(base: Path, out: Path) -> None:
    """The base plus, in every linear layer, a change whose singular values fall as 1/k."""
    shutil.copytree(base, out)
    generator = torch.Generator().manual_seed(5)
    for path in sorted(out.glob("*.safetensors")):
        tensors = load_file(path)
        for name, stored in tensors.items():
            if "_proj" not in name:
                continue
            rows, columns = stored.shape
            left = torch.randn(rows, 128, generator=generator) / torch.arange(1, 129)
            right = torch.randn(128, columns, generator=generator)
            tensors[name] = torch.addmm(stored.float(), left, right, alpha=1e-3).to(stored.dtype)
        save_file(tensors, path, metadata={"format": "pt"})


def changes(base: Path, tuned: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """TUNED - BASE of each linear layer, in float32."""
    for path in sorted(base.glob("*.safetensors")):
        one, other = load_file(path), load_file(tuned / path.name)
        for name, stored in one.items():
            if "_proj" in name:
                yield name.removesuffix(".weight"), other[name].float() - stored.float()


def error_of(adapter: Path, base: Path, tuned: Path) -> float:
    """||TUNED - BASE - B A|| / ||TUNED - BASE|| of the layer."""
    factors = load_file(adapter / "adapter_model.safetensors")
    fields = json.loads((adapter / "adapter_config.json").read_text())
    scale = fields["lora_alpha"] / fields["r"]
    cut = whole = 0.0
    for name, change in changes(base, tuned):
        key = f"base_model.model.{name}"
        made = (factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]) * scale
        whole += float(change.square().sum(dtype=torch.float64))
        cut += float((change - made).square().sum(dtype=torch.float64))
    return (cut / whole) ** 0.5


def median(found: list[dict[str, float]], key: str) -> float:
    return statistics.median(one[key] for one in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=sorted(LAYERS), default=["7b", "70b"])
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/adapterkit-algebra"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dense", action="store_true", help="the dense SVD for every shape")
    options = parser.parse_args()
    results.head(
        "one layer",
        "seconds",
        "torch",
        "ratio",
        "error",
        "torch's error",
        "peak MB",
        "torch's",
        "layers of such a model",
    )
    for kind in options.shapes:
        root = options.dir / kind
        shutil.rmtree(options.dir, ignore_errors=True)
        base, tuned, wide, out = root / "base", root / "tuned", root / "wide", root / "out"
        try:
            write_base(base, LAYERS[kind])
            write_tuned(base, tuned)
            write_adapter(wide, LAYERS[kind], rank=WIDE)
            ours, theirs = [], []
            for _ in range(options.runs):
                ours.append(run(EXTRACT, str(base), str(tuned), str(out), str(RANK)))
                theirs.append(run(LOWRANK, str(base), str(tuned), "", str(RANK)))
            error = error_of(out, base, tuned)
            show(f"`extract` at rank {RANK}, {kind.upper()}", kind, ours, theirs, error, median(theirs, "error"))
            shutil.rmtree(tuned)
            ours = [run(RESIZE, str(wide), str(out), str(NARROW)) for _ in range(options.runs)]
            theirs = [run(DENSE, str(wide))] if options.dense or kind != "70b" else []
            show(f"`resize` from rank {WIDE} to {NARROW}, {kind.upper()}", kind, ours, theirs, None, None)
        finally:
            shutil.rmtree(options.dir, ignore_errors=True)


def show(
    name: str,
    kind: str,
    ours: list[dict[str, float]],
    theirs: list[dict[str, float]],
    error: float | None,
    other: float | None,
) -> None:
    """A row of the table."""
    seconds, memory = median(ours, "seconds"), median(ours, "memory") / 1e6
    peer = median(theirs, "seconds") if theirs else None
    results.row(
        name,
        f"{seconds:.2f}",
        "" if peer is None else f"{peer:.2f}",
        "" if peer is None else f"{peer / seconds:.1f}",
        "" if error is None else f"{error:.5f}",
        "" if other is None else f"{other:.5f}",
        f"{memory:.0f}",
        f"{median(theirs, 'memory') / 1e6:.0f}" if theirs else "",
        str(COUNT[kind]),
    )


if __name__ == "__main__":
    main()
