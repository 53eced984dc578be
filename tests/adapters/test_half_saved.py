"""Adapters of which sharded training saved one process's part are called so; others are not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from models import plain_adapter, plain_base, read_tensors, write_adapter

import adapterkit
from adapterkit.adapters.half_saved import half_saved
from adapterkit.adapters.load import load_adapter

if TYPE_CHECKING:
    from pathlib import Path

    import torch


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "base", layers=1, dtype="float32")


def rewritten(base: Path, folder: Path, side: str, keep: slice | list[int]) -> Path:
    """An adapter in whose factors of one side only some rows are not zero."""
    tensors: dict[str, torch.Tensor] = read_tensors(plain_adapter(folder, base))
    for name, tensor in tensors.items():
        if f"lora_{side}" in name:
            kept = tensor[keep].clone()
            tensor.zero_()
            tensor[keep] = kept
    return write_adapter(folder, tensors)


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("keep", [slice(0, 2), slice(2, 4), slice(1, 2)], ids=["first", "another", "the middle"])
def test_one_processs_share_is_said_wherever_it_lies(base: Path, tmp_path: Path, side: str, keep: slice) -> None:
    adapter = rewritten(base, tmp_path / "a", side, keep)
    assert {one.key.rpartition("lora_")[2] for one in half_saved(load_adapter(adapter))} == {f"{side}.weight"}
    report = adapterkit.check(base, [adapter])
    assert any(one.code == "half-saved" and one.level == "warning" for one in report.findings)
    problems = [row.problem for row in adapterkit.inspect(adapter, health=True).health]
    assert all(problem.startswith("half saved") and "exactly zero" in problem for problem in problems)
    merged = adapterkit.merge(base, [adapter], tmp_path / "out")
    assert any("looks saved in part" in note for note in merged.notes)


@pytest.mark.parametrize(
    ("side", "keep"),
    [("B", slice(None)), ("B", [0, 3, 5, 8]), ("B", slice(0, 14)), ("B", slice(0, 0))],
    ids=["whole", "scattered", "few zeros", "untrained"],
)
def test_what_training_itself_leaves_is_not(base: Path, tmp_path: Path, side: str, keep: slice | list[int]) -> None:
    adapter = rewritten(base, tmp_path / "a", side, keep)
    tensors = {name: tensor for name, tensor in read_tensors(adapter).items() if "q_proj" in name}  # 16 rows
    adapter = write_adapter(tmp_path / "b", tensors)
    assert half_saved(load_adapter(adapter)) == []
    assert not any(one.code == "half-saved" for one in adapterkit.check(base, [adapter]).findings)


def test_ranks_that_are_padded_lose_nothing(base: Path, tmp_path: Path) -> None:
    """Adapters of unequal ranks side by side: zero rows of A whose columns of B are zero too."""
    tensors = read_tensors(plain_adapter(tmp_path / "a", base))
    for name, tensor in tensors.items():
        if "lora_A" in name:
            tensor[1:] = 0
        else:
            tensor[:, 1:] = 0
    adapter = write_adapter(tmp_path / "b", tensors)
    assert half_saved(load_adapter(adapter)) == []
    assert not any("half saved" in row.problem for row in adapterkit.inspect(adapter, health=True).health)


def test_a_module_that_was_trained_whole_is_looked_at_too(base: Path, tmp_path: Path) -> None:
    tensors = read_tensors(plain_adapter(tmp_path / "a", base))
    head = read_tensors(base)["lm_head.weight"]
    head[5:] = 0
    tensors["base_model.model.lm_head.weight"] = head
    adapter = write_adapter(tmp_path / "b", tensors, modules_to_save=["lm_head"])
    assert [one.key for one in half_saved(load_adapter(adapter))] == ["lm_head.weight"]


def test_a_few_rows_are_enough_to_know_a_whole_factor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large factor a few rows are looked at; half of it is found wherever it lies."""
    import torch

    from adapterkit.checkpoint.files import LocalFile

    rows, key = 67, "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{key}.lora_A.weight": torch.ones(4, 8), f"{key}.lora_B.weight": torch.ones(rows, 4)}
    whole = load_adapter(write_adapter(tmp_path / "whole", tensors))
    read, seen = LocalFile.read, list[int]()
    monkeypatch.setattr(LocalFile, "read", lambda self, at, n: seen.append(n) or read(self, at, n))
    assert half_saved(whole) == []
    assert sum(seen) < rows * 4 * 4 // 2
    for start in range(0, rows - rows // 2 + 1, 3):
        tensors[f"{key}.lora_B.weight"] = torch.zeros(rows, 4)
        tensors[f"{key}.lora_B.weight"][start : start + rows // 2] = 1
        found = half_saved(load_adapter(write_adapter(tmp_path / f"a{start}", tensors)))
        assert [one.zeros for one in found] == [rows - rows // 2], start
