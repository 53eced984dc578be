"""LoRA on experts as trainers other than PEFT save it, against the products written out; `target_parameters` against PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from models import (
    assert_merged,
    make_adapter,
    peft_merged,
    random_tensors,
    read_tensors,
    write_adapter,
    write_checkpoint,
)

import adapterkit
from adapterkit.errors import TargetError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

E, R, H, FF = 4, 4, 16, 12
MOE = {"hidden_size": H, "num_hidden_layers": 1, "num_attention_heads": 2, "num_experts": E, "num_experts_per_tok": 2}
EXPERTS = "model.layers.0.mlp.experts"
SIZES = {"gate_proj": (FF, H), "up_proj": (FF, H), "down_proj": (H, FF)}


def separate(folder: Path, kind: str = "qwen3_moe", extra: dict[str, tuple[int, ...]] | None = None) -> Path:
    """A base that stores every expert by itself."""
    shapes = {f"{EXPERTS}.{e}.{leaf}.weight": size for e in range(E) for leaf, size in SIZES.items()}
    shapes |= {"model.embed_tokens.weight": (32, H), "lm_head.weight": (32, H), **(extra or {})}
    return write_checkpoint(folder, random_tensors(shapes), {"model_type": kind, **MOE})


def stacked(folder: Path, kind: str, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A base that stores experts as one parameter."""
    found = {f"{EXPERTS}.{leaf}": shape for leaf, shape in shapes.items()}
    config = {"model_type": kind, **MOE, "num_local_experts": E}
    return write_checkpoint(folder, random_tensors({"lm_head.weight": (32, H), **found}), config)


def factors(shapes: dict[str, tuple[int, ...]], seed: int = 1) -> dict[str, torch.Tensor]:
    return {key: value * 0.1 for key, value in random_tensors(shapes, seed=seed).items()}


def pair(module: str, a: tuple[int, ...], b: tuple[int, ...], seed: int = 1) -> dict[str, torch.Tensor]:
    key = f"base_model.model.{module}.lora_"
    return factors({f"{key}A.weight": a, f"{key}B.weight": b}, seed)


def product(adapter: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """``2 B A`` (alpha 8, rank 4) in float64, one for each expert where there are several."""
    key = f"base_model.model.{module}.lora_"
    return 2 * adapter[f"{key}B.weight"].double() @ adapter[f"{key}A.weight"].double()


def merged(base: Path, adapter: dict[str, torch.Tensor], tmp_path: Path, **config: Any) -> dict[str, torch.Tensor]:
    folder = write_adapter(tmp_path / "adapter", adapter, **config)
    adapterkit.merge(base, [folder], tmp_path / "out")
    return read_tensors(tmp_path / "out")


def assert_added(found: torch.Tensor, base: torch.Tensor, delta: torch.Tensor) -> None:
    assert (found.double() - base.double() - delta).abs().max() < 2e-6


COUNTS = {"one each": (E, E), "shared A": (1, E), "shared B": (E, 1), "one for all": (1, 1)}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("kind", ["qwen3_moe", "nobody_knows"])
@pytest.mark.parametrize("tinker", [False, True])
def test_factors_in_three_dimensions(tmp_path: Path, kind: str, tinker: bool, counts: tuple[int, int]) -> None:
    base = separate(tmp_path / "base", kind)
    called = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    adapter: dict[str, torch.Tensor] = {}
    for seed, (leaf, (out, inner)) in enumerate(SIZES.items()):
        module = f"{EXPERTS}.{called[leaf] if tinker else leaf}"
        adapter |= pair(module, (counts[0], R, inner), (counts[1], out, R), seed)
    found, before = merged(base, adapter, tmp_path), read_tensors(base)
    for leaf in SIZES:
        delta = product(adapter, f"{EXPERTS}.{called[leaf] if tinker else leaf}").expand(E, -1, -1)
        for e in range(E):
            name = f"{EXPERTS}.{e}.{leaf}.weight"
            assert_added(found[name], before[name], delta[e])


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_a_fused_projection_of_separate_experts(tmp_path: Path, counts: tuple[int, int]) -> None:
    base = separate(tmp_path / "base")
    adapter = pair(f"{EXPERTS}.gate_up_proj", (counts[0], R, H), (counts[1], 2 * FF, R))
    found, before = merged(base, adapter, tmp_path), read_tensors(base)
    delta = product(adapter, f"{EXPERTS}.gate_up_proj").expand(E, -1, -1)
    for e in range(E):
        for leaf, rows in (("gate_proj", delta[e, :FF]), ("up_proj", delta[e, FF:])):
            assert_added(found[f"{EXPERTS}.{e}.{leaf}.weight"], before[f"{EXPERTS}.{e}.{leaf}.weight"], rows)


def test_gate_and_up_of_gpt_oss_stand_in_turns(tmp_path: Path) -> None:
    base = stacked(tmp_path / "base", "gpt_oss", {"gate_up_proj": (E, H, 2 * FF), "down_proj": (E, FF, H)})
    adapter = pair(f"{EXPERTS}.w1", (1, R, H), (E, FF, R), 1) | pair(f"{EXPERTS}.w3", (E, R, H), (E, FF, R), 2)
    found, before = (read[f"{EXPERTS}.gate_up_proj"] for read in (merged(base, adapter, tmp_path), read_tensors(base)))
    assert_added(found[..., ::2], before[..., ::2], product(adapter, f"{EXPERTS}.w1").mT)
    assert_added(found[..., 1::2], before[..., 1::2], product(adapter, f"{EXPERTS}.w3").mT)


def test_gate_and_up_of_llama4_are_halves(tmp_path: Path) -> None:
    base = stacked(tmp_path / "base", "llama4_text", {"gate_up_proj": (E, H, 2 * FF), "down_proj": (E, FF, H)})
    adapter = pair(f"{EXPERTS}.gate_proj", (E, R, H), (E, FF, R), 1) | pair(f"{EXPERTS}.w3", (E, R, H), (E, FF, R), 2)
    found, before = (read[f"{EXPERTS}.gate_up_proj"] for read in (merged(base, adapter, tmp_path), read_tensors(base)))
    assert_added(found[..., :FF], before[..., :FF], product(adapter, f"{EXPERTS}.gate_proj").mT)
    assert_added(found[..., FF:], before[..., FF:], product(adapter, f"{EXPERTS}.w3").mT)


@pytest.mark.parametrize("form", ["gate_up_projs.{}", "{}.gate_up_proj"])
@pytest.mark.parametrize("width", [FF, H // 2])  # half as wide as the model: the stored matrices are square
def test_a_linear_layer_for_each_expert_of_gpt_oss(tmp_path: Path, form: str, width: int) -> None:
    base = stacked(tmp_path / "base", "gpt_oss", {"gate_up_proj": (E, H, 2 * width), "down_proj": (E, width, H)})
    adapter: dict[str, torch.Tensor] = {}
    trained = [0, 2, 3]  # the second expert was never chosen
    for e in trained:
        adapter |= pair(f"{EXPERTS}.{form.format(e)}", (R, H), (2 * width, R), e)
    found, before = (read[f"{EXPERTS}.gate_up_proj"] for read in (merged(base, adapter, tmp_path), read_tensors(base)))
    for e in trained:
        assert_added(found[e], before[e], product(adapter, f"{EXPERTS}.{form.format(e)}").T)
    assert found[1].equal(before[1])


def test_a_rank_and_alpha_of_its_own_for_one_expert(tmp_path: Path) -> None:
    base = stacked(tmp_path / "base", "gpt_oss", {"gate_up_proj": (E, H, 2 * FF), "down_proj": (E, FF, H)})
    adapter = pair(f"{EXPERTS}.down_projs.0", (R, FF), (H, R)) | pair(f"{EXPERTS}.down_projs.1", (2, FF), (H, 2))
    config = {"rank_pattern": {"down_projs.1": 2}, "alpha_pattern": {"down_projs.1": 1}}
    found, before = merged(base, adapter, tmp_path, **config), read_tensors(base)
    name = f"{EXPERTS}.down_proj"
    assert_added(found[name][0], before[name][0], product(adapter, f"{EXPERTS}.down_projs.0").T)
    assert_added(found[name][1], before[name][1], product(adapter, f"{EXPERTS}.down_projs.1").T / 4)


def test_another_number_of_experts_is_named(tmp_path: Path) -> None:
    for kind in ("qwen3_moe", "nobody_knows"):
        base = separate(tmp_path / kind, kind)
        adapter = pair(f"{EXPERTS}.w2", (E + 1, R, FF), (1, H, R))
        with pytest.raises(TargetError, match=rf"is for {E + 1} experts, and .* {E}"):
            merged(base, adapter, tmp_path / f"{kind}-out")


def test_experts_of_another_size_are_named(tmp_path: Path) -> None:
    base = separate(tmp_path / "base")
    adapter = pair(f"{EXPERTS}.gate_up_proj", (E, R, H), (E, 3 * FF, R))
    with pytest.raises(TargetError, match=rf"experts of {3 * FF} x {H}, and those of .* are {2 * FF} x {H}"):
        merged(base, adapter, tmp_path)


def test_the_output_layer_as_tinker_calls_it(tmp_path: Path) -> None:
    base = separate(tmp_path / "base")
    adapter = pair("model.unembed_tokens", (R, H), (32, R))
    found, before = merged(base, adapter, tmp_path), read_tensors(base)
    assert_added(found["lm_head.weight"], before["lm_head.weight"], product(adapter, "model.unembed_tokens"))


def test_convert_makes_peft_of_them_that_merges_the_same(tmp_path: Path) -> None:
    base = separate(tmp_path / "base")
    adapter = pair(f"{EXPERTS}.w1", (1, R, H), (E, FF, R)) | pair(f"{EXPERTS}.w2", (E, R, FF), (1, H, R), 2)
    one = merged(base, adapter, tmp_path)
    with pytest.raises(UsageError, match="base="):
        adapterkit.convert(tmp_path / "adapter", tmp_path / "no", to="peft")
    adapterkit.convert(tmp_path / "adapter", tmp_path / "peft", to="peft", base=base)
    adapterkit.merge(base, [tmp_path / "peft"], tmp_path / "two")
    two = read_tensors(tmp_path / "two")
    assert all((one[name] - two[name]).abs().max() < 1e-6 for name in one)


# ------------------------------------------------------------------ target_parameters on a parameter called weight


@pytest.mark.parametrize("both", [True, False])
def test_a_modules_own_stack_called_weight_as_peft_has_it(
    make_base: Callable[..., Path], tmp_path: Path, both: bool
) -> None:
    import peft

    base = make_base("jetmoe")
    named = ["mlp.input_linear.weight", *(["mlp.output_linear.weight"] if both else [])]
    modules = ["kv_proj"] if both else []
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=modules, target_parameters=named)
    adapter = make_adapter(tmp_path / "adapter", base, config)
    adapterkit.merge(base, [adapter], tmp_path / "out")
    assert_merged(base, tmp_path / "out", peft_merged(base, adapter, tmp_path / "peft").exact)


def test_a_linear_layer_without_target_is_called_by_its_own_name(tmp_path: Path) -> None:
    base = separate(tmp_path / "base")
    adapter = pair("model.layers.0.self_attn.q_proj", (R, H), (H, R))
    named = ["mlp.experts.gate_up_proj"]
    with pytest.raises(TargetError, match=r"no target in the base \('model.layers.0.self_attn.q_proj.weight'\)"):
        merged(base, adapter, tmp_path, target_parameters=named)
