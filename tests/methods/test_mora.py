"""MoRA against its forward pass, written out for one input vector at a time (arXiv:2405.12130, its fork of PEFT)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from method_cases import make_net, merged_tensors, save_base
from safetensors.torch import save_file

from adapterkit.errors import AdapterError, TargetError, UsageError
from adapterkit.verbs.convert import convert


def runs(x: list[float], count: int) -> list[list[float]]:
    """``x`` cut into ``count`` runs, the first ones one longer."""
    short, longer = divmod(len(x), count)
    found, start = [], 0
    for index in range(count):
        stop = start + short + (index < longer)
        found.append(x[start:stop])
        start = stop
    return found


def forward(x: list[float], square: list[list[float]], out: int, kind: int) -> list[float]:
    rank = len(square)

    def through(inner: list[float]) -> list[float]:
        return [sum(a * b for a, b in zip(row, inner, strict=True)) for row in square]

    filled = x + x[: -len(x) % rank]
    if kind == 6:
        made: list[float] = []
        for block in range(len(filled) // rank):
            part = filled[block * rank : (block + 1) * rank]
            half = rank // 2
            angles = [block / 10000 ** (2 * (k % half) / rank) for k in range(rank)]
            other = [-part[k + half] if k < half else part[k - half] for k in range(rank)]
            made += through([p * math.cos(t) + o * math.sin(t) for p, o, t in zip(part, other, angles, strict=True)])
        made = made[:out]
        return [made[place % len(made)] for place in range(out)]
    if kind in (1, 4):
        inner = [sum(filled[place::rank]) for place in range(rank)]
    else:
        inner = [sum(run) for run in runs(x, rank)]
    y = through(inner)
    if kind in (1, 3):
        return [y[place % rank] for place in range(out)]
    lengths = [len(run) for run in runs([0.0] * out, rank)]
    return [value for value, length in zip(y, lengths, strict=True) for _ in range(length)]


def write(folder: Path, kind: int, sizes: dict[str, int], **fields: object) -> dict[str, torch.Tensor]:
    save_base(make_net(), folder / "base")
    (folder / "adapter").mkdir()
    generator = torch.Generator().manual_seed(kind)
    squares = {name: torch.randn(size, size, generator=generator) for name, size in sizes.items()}
    tensors = {}
    for name, square in squares.items():
        for side in "AB":
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = square.clone()
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "use_mora": True, "mora_type": kind, **fields}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return squares


# r = 2: round(sqrt((in + out) * 2)) for 64x32, 32x64 and 32x32 layers; type 6 wants it even.
SIZES = {"layers.0.wide": 14, "layers.0.narrow": 14, "layers.0.square": 11}


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 6])
def test_every_type_merges_what_it_computes(kind: int, tmp_path: Path) -> None:
    sizes = {name: size // 2 * 2 if kind == 6 else size for name, size in SIZES.items()}
    squares = write(tmp_path, kind, sizes)
    before = make_net().state_dict()
    ours = merged_tensors(tmp_path / "base", tmp_path / "adapter")
    for name, square in squares.items():
        w = before[f"{name}.weight"].double()
        delta = torch.zeros_like(w)
        for column in range(w.shape[1]):
            unit = [float(place == column) for place in range(w.shape[1])]
            delta[:, column] = torch.tensor(forward(unit, square.double().tolist(), w.shape[0], kind))
        assert (ours[f"{name}.weight"] - w - delta).abs().max() <= 2e-6 * delta.abs().max()


def test_it_is_no_plain_lora(tmp_path: Path) -> None:
    write(tmp_path, 1, SIZES)
    with pytest.raises(UsageError, match="computed against its base"):
        convert(tmp_path / "adapter", tmp_path / "plain", to="peft", plain=True)


def test_other_types_and_sizes(tmp_path: Path) -> None:
    write(tmp_path, 5, SIZES)
    with pytest.raises(AdapterError, match="'mora_type' is 5"):
        merged_tensors(tmp_path / "base", tmp_path / "adapter")
    (tmp_path / "more").mkdir()
    write(tmp_path / "more", 1, {"layers.0.wide": 13})
    with pytest.raises(TargetError, match=r"layers\.0\.wide\.lora_A\.weight' is \[13, 13\], not \[14, 14\]"):
        merged_tensors(tmp_path / "more" / "base", tmp_path / "more" / "adapter")
