"""Several adapters on one weight, against PEFT with all of them active (not its merge, which turns OFT the other way)."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from models import plain_adapter, plain_base, read_tensors, save_module
from torch import nn

import adapterkit
from adapterkit.errors import UnsupportedAdapter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

IN, OUT = 16, 24


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(IN, OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(OUT, IN)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.emb(ids)


ON: dict[str, Any] = {"target_modules": ["lin"]}
DEPENDENT: dict[str, Callable[[], Any]] = {
    "ia3": lambda: peft.IA3Config(feedforward_modules=[], **ON),
    "ia3 inputs": lambda: peft.IA3Config(feedforward_modules=["lin"], **ON),
    "hra": lambda: peft.HRAConfig(r=4, **ON),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=8, **ON),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, **ON),
    "road": lambda: peft.RoadConfig(group_size=8, **ON),
    "bat": lambda: peft.MissConfig(r=8, init_weights="bat", **ON),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True, **ON),
}
SUMMED: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, **ON),
    "hira": lambda: peft.HiraConfig(r=4, **ON),
    "miss": lambda: peft.MissConfig(r=4, **ON),
    "delora": lambda: peft.DeloraConfig(r=4, **ON),
    "glora": lambda: peft.GloraConfig(r=4, config_A_B="lora", config_C="lora", config_D_E="vector", **ON),
    "peanut": lambda: peft.PeanutConfig(r=4, **ON),
}


def trained(folder: Path, net: nn.Module, configs: Sequence[Any]) -> Any:
    """Save adapters ``0``, ``1``, ... of one model; gives the live model with all of them, in float64."""
    model = peft.get_peft_model(net, configs[0], adapter_name="0")
    for number, config in enumerate(configs[1:], 1):
        model.add_adapter(str(number), config)
    generator = torch.Generator().manual_seed(1)
    names = [str(number) for number in range(len(configs))]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".{number}." in f"{name}." for number in names) and "lora_magnitude_vector" not in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    model.base_model.set_adapter(names)
    return model.double().eval()


def train(folder: Path, configs: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The same for the linear layer; gives what the live model computes, as its weight and bias."""
    model = trained(folder, Net(), configs)
    with torch.no_grad():
        bias = model(torch.zeros(1, IN, dtype=torch.float64))
        weight = (model(torch.eye(IN, dtype=torch.float64)) - bias).T
    return {"lin.weight": weight, "lin.bias": bias[0]}


def merged(
    tmp_path: Path, count: int, net: nn.Module | None = None, **options: Any
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    base = save_module(tmp_path / "base", net or Net(), {"model_type": "mine"})
    report = adapterkit.merge(base, [tmp_path / str(n) for n in range(count)], tmp_path / "out", force=True, **options)
    return read_tensors(tmp_path / "out"), report.notes


def apart(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """The largest difference, as a part of the largest value."""
    return max(((found[n].double() - want[n]).abs().max() / want[n].abs().max()).item() for n in want)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("make", (DEPENDENT | SUMMED).values(), ids=DEPENDENT | SUMMED)
def test_adapters_of_one_method_together_are_what_peft_runs(
    tmp_path: Path, make: Callable[[], Any], count: int
) -> None:
    want = train(tmp_path, [make() for _ in range(count)])
    found, notes = merged(tmp_path, count)
    assert apart(found, want) < 2e-6
    said = any("order matters" in note and note.index("/0, then") < note.index("/1") for note in notes)
    assert said == (make in DEPENDENT.values())


EMBEDDED: dict[str, Callable[[], Any]] = {
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=["emb"]),
    "oft of one": lambda: peft.OFTConfig(r=0, oft_block_size=8, block_share=True, target_modules=["emb"]),
    "lora": lambda: peft.LoraConfig(r=4, target_modules=["emb"]),
    "hira": lambda: peft.HiraConfig(r=4, target_modules=["emb"]),
}


@pytest.mark.parametrize("make", EMBEDDED.values(), ids=EMBEDDED)
def test_adapters_of_one_embedding_together_are_what_peft_runs(tmp_path: Path, make: Callable[[], Any]) -> None:
    """What an embedding gives out is changed by the first adapter first; a layer's weight has that the other way round."""
    with torch.no_grad():
        want = trained(tmp_path, Lookup(), [make() for _ in range(3)])(torch.arange(OUT))
    found, _ = merged(tmp_path, 3, Lookup())
    assert apart(found, {"emb.weight": want}) < 2e-6


@pytest.mark.parametrize("order", list(itertools.permutations(["dora", "lora", "dora again"])), ids="-".join)
def test_dora_scales_the_lora_before_it(tmp_path: Path, order: tuple[str, ...]) -> None:
    makes = {**DEPENDENT, **SUMMED, "dora again": DEPENDENT["dora"]}
    want = train(tmp_path, [makes[name]() for name in order])
    assert apart(merged(tmp_path, 3)[0], want) < 2e-6


def test_a_weight_is_how_far_each_step_goes(tmp_path: Path) -> None:
    train(tmp_path, [DEPENDENT["ia3"](), DEPENDENT["ia3"]()])
    found, _ = merged(tmp_path, 2, weights=(0.5, 2.0))
    (one, two) = (
        next(t for name, t in read_tensors(tmp_path / n).items() if name.endswith("ia3_l")).double() for n in "01"
    )
    w = Net().lin.weight.detach().double()
    want = w * (1 + 0.5 * (one - 1)) * (1 + 2 * (two - 1))
    assert (found["lin.weight"].double() - want).abs().max() < 1e-6


def test_methods_that_peft_holds_in_no_model_together_are_refused(tmp_path: Path) -> None:
    train(tmp_path / "a", [DEPENDENT["ia3"]()])
    train(tmp_path / "b", [SUMMED["lora"]()])
    base = save_module(tmp_path / "base", Net(), {"model_type": "mine"})
    both = [tmp_path / "a/0", tmp_path / "b/0"]
    for adapters in (both, both[::-1]):
        with pytest.raises(UnsupportedAdapter, match=r"changes lin.weight by what depends on its values") as raised:
            adapterkit.plan_merge(base, adapters, fingerprints=False)
        assert "merge one of them, then the other" in raised.value.hint


def test_two_inits_that_took_something_out_of_w_are_refused(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", layers=1)
    adapters = [
        plain_adapter(tmp_path / name, base, seed=seed, init_lora_weights="pissa") for seed, name in enumerate("ab")
    ]
    with pytest.raises(UnsupportedAdapter, match=r"pissa.* were each trained on") as raised:
        adapterkit.plan_merge(base, adapters, fingerprints=False)
    assert "plain=True" in raised.value.hint
    for name in "ab":
        adapterkit.convert(tmp_path / name, tmp_path / f"plain {name}", to="peft", plain=True, base=base)
        adapterkit.merge(base, [tmp_path / name], tmp_path / f"merged {name}")
    adapterkit.merge(base, [tmp_path / "plain a", tmp_path / "plain b"], tmp_path / "both")
    before, one, two, both = (read_tensors(tmp_path / name) for name in ("base", "merged a", "merged b", "both"))
    assert apart(both, {n: one[n].double() + two[n].double() - before[n].double() for n in before}) < 2**-7  # bfloat16
    plain = plain_adapter(tmp_path / "c", base, seed=3)
    assert adapterkit.plan_merge(base, [adapters[0], plain], fingerprints=False).folded.touched


def test_adapters_of_different_weights_need_no_order(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", layers=1)
    one = plain_adapter(tmp_path / "a", base, modules=["q_proj"], init_lora_weights="pissa")
    two = plain_adapter(tmp_path / "b", base, modules=["up_proj"], init_lora_weights="pissa")
    notes = adapterkit.plan_merge(base, [one, two], fingerprints=False).notes
    assert not any("order" in note for note in notes)
