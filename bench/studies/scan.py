"""What a scan of the change finds: spikes planted into adapters that were trained here, and how often it cries for nothing.

    python -m bench --save scan studies scan              # 120 adapters: minutes
    python -m bench studies scan --adapters 20 --planted 10

Each adapter is trained by Adam on tasks of its own: in every module, X W^T + X D^T is to be answered, with D of low rank and
noise in the answers. Then a part of them gets a change in one module: a rank-1 spike of a random direction, one input row
or column, the whole module scaled, or a spike spread over all modules alike, each of a size stated beside the module's own
change. Figures: area under the ROC curve of the scan's largest deviation, and the rate that is found at its own limit;
alone, and beside 24 other adapters.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from adapterkit.adapters.load import load_adapter
from adapterkit.adapters.scan import LIMIT, ModuleFigures, module_figures, scan_adapter

LAYERS, SIDE, RANK, STEPS = 8, 48, 8, 60
KINDS = ("q_proj", "v_proj", "up_proj", "down_proj")
PEERS = 24
SIZES = (0.25, 0.5, 1.0, 2.0, 4.0)

Tensors = dict[str, torch.Tensor]


def trained(seed: int) -> Tensors:
    """One adapter: its factors by PEFT's keys."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    size = float(torch.empty(1).uniform_(0.5, 2, generator=generator))
    for layer in range(LAYERS):
        for kind in KINDS:
            scale = size * (1 + 0.05 * layer) * {"q_proj": 0.7, "v_proj": 1.0, "up_proj": 1.2, "down_proj": 0.9}[kind]
            decay = torch.exp(-torch.arange(12) / 4.0)
            u = torch.linalg.qr(torch.randn(SIDE, 12, generator=generator))[0]
            v = torch.linalg.qr(torch.randn(SIDE, 12, generator=generator))[0]
            wanted = scale * (u * decay) @ v.T
            a = (torch.rand(RANK, SIDE, generator=generator) * 2 - 1) / SIDE**0.5
            b = torch.zeros(SIDE, RANK)
            a.requires_grad_(True)
            b.requires_grad_(True)
            optimizer = torch.optim.Adam([a, b], lr=0.02)
            for _ in range(STEPS):
                x = torch.randn(32, SIDE, generator=generator)
                noise = 0.2 * torch.randn(32, SIDE, generator=generator)
                loss = (x @ a.T @ b.T - (x @ wanted.T + noise)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            block = "mlp" if "up" in kind or "down" in kind else "self_attn"
            path = f"base_model.model.model.layers.{layer}.{block}.{kind}"
            tensors[f"{path}.lora_A.weight"] = a.detach()
            tensors[f"{path}.lora_B.weight"] = b.detach()
    return tensors


def modules(tensors: Tensors) -> list[str]:
    return sorted({key.rpartition(".lora_")[0] for key in tensors})


def put(tensors: Tensors, path: str, extra_b: torch.Tensor, extra_a: torch.Tensor) -> None:
    """Adds ``extra_b extra_a`` to a module by the best factors of the same rank, so that no rank gives it away."""
    a, b = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
    u, s, vh = torch.linalg.svd(b @ a + extra_b @ extra_a, full_matrices=False)
    root = s[:RANK].sqrt()
    tensors[f"{path}.lora_B.weight"] = (u[:, :RANK] * root).contiguous()
    tensors[f"{path}.lora_A.weight"] = (root[:, None] * vh[:RANK]).contiguous()


def spike(tensors: Tensors, size: float, generator: torch.Generator, path: str, kind: str = "spike") -> None:
    a, b = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
    norm = float((b @ a).norm())
    left, right = torch.randn(SIDE, 1, generator=generator), torch.randn(1, SIDE, generator=generator)
    if kind == "row":
        left = torch.zeros(SIDE, 1)
        left[int(torch.randint(SIDE, (1,), generator=generator))] = 1
    if kind == "column":
        right = torch.zeros(1, SIDE)
        right[0, int(torch.randint(SIDE, (1,), generator=generator))] = 1
    put(tensors, path, size * norm * left / left.norm(), right / right.norm())


def planted(kind: str) -> Callable[[Tensors, float, int], None]:
    """A change of one sort: (tensors, size, seed) -> in place."""

    def change(tensors: Tensors, size: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        path = random.Random(seed).choice(modules(tensors))
        if kind == "scaled":
            tensors[f"{path}.lora_B.weight"] = tensors[f"{path}.lora_B.weight"] * (1 + size)
        elif kind == "everywhere":
            for one in modules(tensors):
                spike(tensors, size, generator, one)
        else:
            spike(tensors, size, generator, path, kind)

    return change


@dataclass(frozen=True)
class Rates:
    """Area under the ROC curve, and the share found at the scan's own limit."""

    area: float
    found: float


def figures_of(tensors: Tensors, folder: Path) -> tuple[ModuleFigures, ...]:
    return module_figures(load_adapter(written(tensors, folder)))[0]


def written(tensors: Tensors, folder: Path) -> Path:
    import json

    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(KINDS)}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    return folder


def area(clean: list[float], dirty: list[float]) -> float:
    """The chance that an adapter with a plant has the larger score; ties count half (Mann and Whitney)."""
    wins = sum((d > c) + 0.5 * (d == c) for d in dirty for c in clean)
    return wins / (len(clean) * len(dirty))


def run(adapters: int, plants: int) -> tuple[list[tuple[str, float, Rates, Rates]], tuple[float, float], list[float]]:
    """Rates by kind and size, alone and beside peers; the rates of false alarms; the scores of clean adapters."""
    torch.set_num_threads(1)
    made = [trained(seed) for seed in range(adapters + PEERS)]
    with TemporaryDirectory() as name:
        folder = Path(name) / "adapter"
        peers = [{one.parameter: one for one in figures_of(tensors, folder)} for tensors in made[adapters:]]

        def scores(tensors: Tensors) -> tuple[float, float]:
            adapter = load_adapter(written(tensors, folder))
            return scan_adapter(adapter).score, scan_adapter(adapter, peers=peers).score

        clean = [scores(tensors) for tensors in made[:adapters]]
        rows = []
        for kind in ("spike", "row", "column", "scaled", "everywhere"):
            for size in SIZES:
                dirty = []
                for seed in range(plants):
                    tensors = dict(made[seed % adapters])
                    planted(kind)(tensors, size, 1000 + seed)
                    dirty.append(scores(tensors))
                pair = [
                    Rates(
                        area([one[way] for one in clean], [one[way] for one in dirty]),
                        sum(one[way] > LIMIT for one in dirty) / len(dirty),
                    )
                    for way in (0, 1)
                ]
                rows.append((kind, size, pair[0], pair[1]))
    alarms = tuple(sum(one[way] > LIMIT for one in clean) / len(clean) for way in (0, 1))
    return rows, (alarms[0], alarms[1]), [one[0] for one in clean]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=120)
    parser.add_argument("--planted", type=int, default=60)
    given = parser.parse_args()
    rows, alarms, clean = run(given.adapters, given.planted)
    print(
        f"{given.adapters} clean adapters, {given.planted} plants of each kind and size; the limit is {LIMIT:g} deviations"
    )
    print(
        f"false alarms: alone {alarms[0]:.1%}, beside {PEERS} others {alarms[1]:.1%}; largest clean score {max(clean):.1f}"
    )
    print("\n| planted | size | area alone | found alone | area beside others | found beside others |")
    print("|---|---|---|---|---|---|")
    for kind, size, alone, beside in rows:
        print(f"| {kind} | {size:g} | {alone.area:.2f} | {alone.found:.0%} | {beside.area:.2f} | {beside.found:.0%} |")


if __name__ == "__main__":
    main()
