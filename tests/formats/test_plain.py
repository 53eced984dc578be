"""Bake: whatever was trained, as plain LoRA that gives the same merged weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import edit_config, make_adapter, peft_merged, read_tensors

from adapterkit.adapters.fold import fold
from adapterkit.adapters.load import load_adapter
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.errors import UnsupportedAdapter, UsageError
from adapterkit.verbs.convert import convert

MODULES = ["q_proj", "up_proj"]
PATTERNS = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.0.*": 5}}


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    found = fold(open_checkpoint(base), [load_adapter(adapter)]).checkpoint
    return {name: tensor.read(0, tensor.numel).view(tensor.shape) for name, tensor in found.tensors.items()}


def lora(**fields: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=6, lora_alpha=9, target_modules=MODULES, **fields)


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


def test_patterns_and_rslora_are_folded_into_the_factors(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama")
    adapter = make_adapter(tmp_path / "adapter", base, lora(use_rslora=True, **PATTERNS))
    convert(adapter, tmp_path / "plain", to="peft", plain=True)
    config = config_of(tmp_path / "plain")
    assert config["r"] == config["lora_alpha"] == 6
    assert not {"use_rslora", "rank_pattern", "alpha_pattern"} & set(config)
    assert {t.shape[0] for n, t in read_tensors(tmp_path / "plain").items() if "lora_A" in n} == {6}
    # PEFT reads the plain file and comes to what it makes of the first.
    one = peft_merged(base, adapter, tmp_path / "one").exact
    two = peft_merged(base, tmp_path / "plain", tmp_path / "two").exact
    before = read_tensors(base)
    for name, tensor in one.items():
        scale = (tensor - before[name]).abs().max()
        assert (two[name] - tensor).abs().max() <= 2e-6 * scale


def test_one_scaling_leaves_the_factors_as_they_are(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama")
    adapter = make_adapter(tmp_path / "adapter", base, lora(use_rslora=True))
    convert(adapter, tmp_path / "plain", to="peft", plain=True)
    before, after = read_tensors(adapter), read_tensors(tmp_path / "plain")
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert config_of(tmp_path / "plain")["lora_alpha"] == pytest.approx(9 * 6**0.5)


def others() -> dict[str, Any]:
    import peft

    return {
        "dora_rslora_patterns": lora(use_dora=True, use_rslora=True, **PATTERNS),
        "pissa": lora(init_lora_weights="pissa"),
        "adalora": peft.AdaLoraConfig(target_modules=MODULES, init_r=4, total_step=9),
        "vera": peft.VeraConfig(target_modules=MODULES, r=4),
        "lokr": peft.LoKrConfig(target_modules=MODULES, r=2),
        "oft": peft.OFTConfig(target_modules=MODULES, r=0, oft_block_size=4),
        "ia3": peft.IA3Config(target_modules=MODULES, feedforward_modules=["up_proj"]),
        "gralora": peft.GraloraConfig(target_modules=MODULES, r=4, gralora_k=2),
    }


@pytest.mark.parametrize("kind", sorted(others()))
def test_any_method_becomes_plain_lora(kind: str, make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama")
    adapter = make_adapter(tmp_path / "adapter", base, others()[kind])
    written = convert(adapter, tmp_path / "plain", to="peft", plain=True, base=base)
    before, exact = read_tensors(base), peft_merged(base, adapter, tmp_path / "one").exact
    baked = peft_merged(base, tmp_path / "plain", tmp_path / "two").exact
    errors = {row.module: row.error for row in written.modules}
    changed = 0
    for name, tensor in exact.items():
        delta = (tensor - before[name]).double()
        if float(delta.norm()) == 0:
            assert torch.equal(baked[name], tensor)
            continue
        changed += 1
        error = float((baked[name] - tensor).double().norm() / delta.norm())
        assert error <= errors[name] + 5e-6
        assert error <= 1e-5
    assert changed == 2 * 2


def test_a_share_of_the_energy_and_a_rank(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama")
    adapter = make_adapter(tmp_path / "adapter", base, others()["oft"])
    before, exact = read_tensors(base), merged(base, adapter)
    for name, limit in (("energy", {"energy": 0.8}), ("rank", {"rank": 3})):
        written = convert(adapter, tmp_path / name, to="peft", plain=True, base=base, **limit)
        baked = merged(base, tmp_path / name)
        for key, error in {row.module: row.error for row in written.modules}.items():
            delta = (exact[key] - before[key]).double()
            assert float((baked[key] - exact[key]).double().norm() / delta.norm()) == pytest.approx(error, rel=1e-3)
            s = torch.linalg.svdvals(delta)
            if name == "energy":
                assert error**2 <= 0.2 + 1e-6
            else:
                assert error == pytest.approx(float(s[3:].norm() / s.norm()), rel=0.01)  # within 1 % of the optimum


def test_what_is_needed_and_what_cannot_be_held(make_base: Callable[..., Path], tmp_path: Path) -> None:
    import peft

    base = make_base("llama")
    adapter = make_adapter(tmp_path / "adapter", base, others()["vera"])
    with pytest.raises(UsageError, match="computed against its base"):
        convert(adapter, tmp_path / "plain", to="peft", plain=True)
    with pytest.raises(UsageError, match="energy must be in"):
        convert(adapter, tmp_path / "plain", to="peft", plain=True, base=base, energy=2.0)
    norms = make_adapter(tmp_path / "norms", base, peft.LNTuningConfig(target_modules=["input_layernorm"]))
    convert(norms, tmp_path / "kept", to="peft", plain=True, base=base)
    qwen = make_base("qwen2")
    scaled = make_adapter(tmp_path / "ia3", qwen, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(UnsupportedAdapter, match=r"vector '.*q_proj.bias'.*which a LoRA cannot hold"):
        convert(scaled, tmp_path / "plain", to="peft", plain=True, base=qwen)
    assert not (tmp_path / "plain").exists()
    edit_config(adapter, r=5)
