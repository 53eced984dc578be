"""Weights that fit only the other way round, square ones, and why a change does not fit: against PEFT's own merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from models import make_adapter, peft_merged, plain_adapter, plain_base, read_tensors, save_module, write_adapter
from torch import nn
from transformers.pytorch_utils import Conv1D

import adapterkit
from adapterkit.adapters.load import load_adapter
from adapterkit.adapters.orientation import with_conv1d
from adapterkit.errors import TargetError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


MINE = {"model_type": "mine"}  # no class of transformers


class Net(nn.Module):
    """A Conv1D ``[8, out]`` under some name and a linear layer behind it, of no known class."""

    def __init__(self, out: int, name: str = "inner") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        self.add_module(name, Conv1D(out, 8))
        self.last = nn.Linear(out, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(getattr(self, self.name)(x))


def net(out: int, name: str = "inner") -> Callable[[], nn.Module]:
    return lambda: Net(out, name)


def check(tmp_path: Path, make: Callable[[], nn.Module], config: Any, conv1d: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Merge as PEFT does; gives the notes."""
    base = save_module(tmp_path / "base", make(), MINE)
    folder = make_adapter(tmp_path / "adapter", make, config)
    adapter = with_conv1d(load_adapter(folder), conv1d)
    report = adapterkit.merge(base, [adapter], tmp_path / "out")
    found, want = read_tensors(tmp_path / "out"), peft_merged(make, folder, tmp_path).exact
    for name, value in want.items():
        assert (found[name].double() - value.double()).abs().max() < 2e-6, name
    return report.notes


BOTH = ["inner", "last"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=2, target_modules=BOTH),
    "lora alone": lambda: peft.LoraConfig(r=2, target_modules=["inner"]),
    "dora": lambda: peft.LoraConfig(r=2, target_modules=BOTH, use_dora=True),
    "rslora": lambda: peft.LoraConfig(r=2, target_modules=BOTH, use_rslora=True),
    "hira": lambda: peft.HiraConfig(r=2, target_modules=["inner"]),
    "ia3": lambda: peft.IA3Config(target_modules=BOTH, feedforward_modules=[]),
    "ia3 inputs": lambda: peft.IA3Config(target_modules=BOTH, feedforward_modules=BOTH),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_fits_only_turned_is_turned(tmp_path: Path, config: Callable[[], Any]) -> None:
    notes = check(tmp_path, net(6), config())
    assert any("inner.weight fits only as [in, out]" in note for note in notes)


def test_a_square_weight_that_nothing_tells_of_is_said(tmp_path: Path) -> None:
    base = save_module(tmp_path / "base", nn.Sequential(nn.Linear(8, 8)), MINE)
    adapter = make_adapter(
        tmp_path / "a", lambda: nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(r=2, target_modules=["0"])
    )
    report = adapterkit.merge(base, [adapter], tmp_path / "out")
    assert any("0.weight is square" in note and "conv1d=" in note for note in report.notes)


def test_a_square_weight_of_a_known_class_needs_no_word(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", layers=1)  # Llama's q_proj, square
    report = adapterkit.merge(base, [plain_adapter(tmp_path / "a", base)], tmp_path / "out")
    assert not any("square" in note for note in report.notes)


def test_a_square_conv1d_is_known_by_its_name(tmp_path: Path) -> None:
    check(tmp_path, net(8, "conv1d"), peft.LoraConfig(r=2, target_modules=["conv1d", "last"]))


def test_a_square_conv1d_that_the_user_names(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=BOTH)
    notes = check(tmp_path, net(8), config, conv1d=("inner",))
    assert not any("square" in note for note in notes)


class Mixed(nn.Module):
    """A Conv1D that its shape tells of, a square one, and a linear layer that is wrapped last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.even, self.last = Conv1D(24, 8), Conv1D(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.even(self.wide(x)[..., :8]))


MIXED = ["wide", "even", "last"]


def test_a_square_weight_among_others_that_lie_both_ways_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"even.weight is square.*wide.weight is kept as \[in, out\]") as raised:
        check(tmp_path, Mixed, peft.LoraConfig(r=2, target_modules=MIXED))
    assert "conv1d=" in raised.value.hint


def test_and_merges_once_the_user_names_them(tmp_path: Path) -> None:
    check(tmp_path, Mixed, peft.LoraConfig(r=2, target_modules=MIXED), conv1d=("wide", "even"))


# ------------------------------------------------------------------ the reason in the sentence


def refusal(tmp_path: Path, base: dict[str, tuple[int, ...]], out: int, inner: int, kind: str = "llama") -> TargetError:
    """Why a LoRA of ``out x inner`` does not fit the only module of a base."""
    from models import random_tensors, write_checkpoint

    ((name, _),) = base.items()
    folder = write_checkpoint(tmp_path / "base", random_tensors(base), {"model_type": kind})
    module = f"base_model.model.{name.removesuffix('.weight')}"
    shapes = {f"{module}.lora_A.weight": (4, inner), f"{module}.lora_B.weight": (out, 4)}
    adapter = write_adapter(tmp_path / "adapter", random_tensors(shapes))
    with pytest.raises(TargetError) as raised:
        adapterkit.plan_merge(folder, [adapter], fingerprints=False)
    return raised.value


def test_a_weight_that_fits_only_turned_in_a_known_class(tmp_path: Path) -> None:
    error = refusal(tmp_path, {"model.layers.0.mlp.up_proj.weight": (8, 24)}, 24, 8)
    assert "fits only the other way round" in error.message
    assert "another base" not in error.hint


def test_another_number_of_rows(tmp_path: Path) -> None:
    error = refusal(tmp_path, {"lm_head.weight": (40, 8)}, 44, 8)
    assert "another number of rows" in error.message
    assert "44 rows" in error.hint
    assert "another base" not in error.hint


@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv2d])
def test_grouped_convolutions_are_called_so(tmp_path: Path, make: Any, groups: int) -> None:
    def build() -> nn.Module:
        return nn.Sequential(make(16, 16, 3, groups=groups))

    base = save_module(tmp_path / "base", build(), MINE)
    adapter = make_adapter(tmp_path / "a", build, peft.LoraConfig(r=8, target_modules=["0"]))
    with pytest.raises(TargetError, match=f"a convolution in {groups} groups") as raised:
        adapterkit.plan_merge(base, [adapter], fingerprints=False)
    assert "another base" not in raised.value.hint


def test_one_module_of_another_size_is_no_other_base(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", layers=2)
    adapter = plain_adapter(tmp_path / "a", base)
    tensors = read_tensors(adapter)
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    write_adapter(adapter, tensors | {name: torch.zeros(4, 24)})
    with pytest.raises(TargetError, match="16 x 24") as raised:
        adapterkit.plan_merge(base, [adapter], fingerprints=False)
    assert raised.value.hint == "give the base it was trained on"


def test_no_module_fits_another_base(tmp_path: Path) -> None:
    adapter = plain_adapter(tmp_path / "a", plain_base(tmp_path / "base"))
    other = plain_base(tmp_path / "other", width=24)
    with pytest.raises(TargetError) as raised:
        adapterkit.plan_merge(other, [adapter], fingerprints=False)
    assert raised.value.hint == "this adapter was trained on another base"
