"""LoRA on stacked experts (``target_parameters``) against PEFT, and per-expert adapters of the older module trees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import (
    apart,
    assert_merged,
    edit_config,
    live,
    load_model,
    logits,
    make_adapter,
    peft_merged,
    read_tensors,
    write_adapter,
)

import adapterkit
from adapterkit.errors import TargetError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EXPERTS = {
    "qwen3_moe": "mlp.experts",
    "mixtral": "mlp.experts",
    "gpt_oss": "mlp.experts",
    "llama4": "feed_forward.experts",
}
CHOICES = {"both": ["gate_up_proj", "down_proj"], "gate_up": ["gate_up_proj"], "down": ["down_proj"]}


def lora(**fields: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": [], **fields})


def check(base: Path, config: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", base, config)
    exact = peft_merged(base, adapter, tmp_path / "peft").exact
    adapterkit.merge(base, [adapter], tmp_path / "out")
    assert_merged(base, tmp_path / "out", exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", EXPERTS)
def test_vllm_52194_target_parameters(
    kind: str, choice: str, dtype: str, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    parameters = [f"{EXPERTS[kind]}.{name}" for name in CHOICES[choice]]
    check(make_base(kind, dtype), lora(target_parameters=parameters), tmp_path)


def test_named_the_other_way_round(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """Wrappers nest in the order in which parameters are registered, not in which they are named."""
    parameters = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    check(make_base("gpt_oss"), lora(target_parameters=parameters), tmp_path)


def test_vllm_55545_scaling_per_parameter(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """Patterns meet the path with the parameter's name; rsLoRA takes the rank of one expert."""
    config = lora(
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        alpha_pattern={r"layers\.1\.mlp\.experts\.gate_up_proj": 30},
        rank_pattern={"experts.down_proj": 2},
        use_rslora=True,
    )
    check(make_base("qwen3_moe"), config, tmp_path)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_router_and_attention_too(kind: str, make_base: Callable[..., Path], tmp_path: Path) -> None:
    config = lora(target_modules=["q_proj"], target_parameters=["mlp.gate.weight", "mlp.experts.down_proj"])
    check(make_base(kind), config, tmp_path)


def test_different_parameters_in_different_layers(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """One wrapper in each layer, and the key does not say of which parameter: the shapes do."""
    config = lora(target_parameters=["0.mlp.experts.gate_up_proj", "1.mlp.experts.down_proj"])
    check(make_base("qwen3_moe"), config, tmp_path)


def test_unsloth_5410_square_experts_of_older_peft(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """Llama-4-like stacks that are square: up to PEFT 0.18 the delta was turned round, since 0.19.1 it is not.

    The same file, read with its version changed, must give the transposed delta for each expert.
    """
    base = make_base("llama4", intermediate_size=32)  # down_proj [E, 32, 32]
    adapter = make_adapter(tmp_path / "adapter", base, lora(target_parameters=["feed_forward.experts.down_proj"]))
    adapterkit.merge(base, [adapter], tmp_path / "new")
    adapterkit.merge(base, [edit_config(adapter, peft_version="0.18.1")], tmp_path / "old")
    old, new, before = (read_tensors(folder) for folder in (tmp_path / "old", tmp_path / "new", base))
    name = "model.layers.0.feed_forward.experts.down_proj"
    turned = (new[name].double() - before[name].double()).mT
    assert ((old[name].double() - before[name].double()) - turned).abs().max() < 1e-6
    assert turned.abs().max() > 0.1


# ------------------------------------------------------------------ adapters made on module trees of transformers 4

GATED = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("kind", "module", "linears"),
    [
        ("qwen3_moe", "model.layers.{}.mlp.experts.{}.{}", GATED),
        ("mixtral", "model.layers.{}.block_sparse_moe.experts.{}.{}", ("w1", "w3", "w2")),
    ],
)
def test_peft_issue_3711_adapters_of_separate_experts(
    kind: str, module: str, linears: tuple[str, ...], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    """Experts were modules of their own; their tensors in the checkpoint are still so, and take the delta one to one."""
    base = make_base(kind, "bfloat16")
    stored = read_tensors(base)
    generator = torch.Generator().manual_seed(3)
    factors, exact = {}, {name: tensor.double() for name, tensor in stored.items()}
    for layer in range(2):
        for expert in range(4):
            for linear in linears:
                name = module.format(layer, expert, linear)
                rows, columns = stored[f"{name}.weight"].shape
                a, b = torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator)
                factors[f"base_model.model.{name}.lora_A.weight"] = a
                factors[f"base_model.model.{name}.lora_B.weight"] = b
                exact[f"{name}.weight"] = exact[f"{name}.weight"] + 2 * (b.double() @ a.double())
    adapter = write_adapter(tmp_path / "adapter", factors, r=4, lora_alpha=8, peft_version="0.17.0")
    adapterkit.merge(base, [adapter], tmp_path / "out")
    assert_merged(base, tmp_path / "out", exact)


# ------------------------------------------------------------------ what does not fit


def test_unsloth_zoo_885_experts_that_do_not_fit_are_refused(make_base: Callable[..., Path], tmp_path: Path) -> None:
    small, large = make_base("qwen3_moe"), make_base("qwen3_moe", num_experts=5)
    adapter = make_adapter(tmp_path / "adapter", small, lora(target_parameters=["mlp.experts.gate_up_proj"]))
    with pytest.raises(TargetError, match=r"fits no side of model.layers.0.mlp.experts.gate_up_proj \[5, 48, 32\]"):
        adapterkit.merge(large, [adapter], tmp_path / "out")


def test_parameters_missing_from_the_config_are_refused(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("gpt_oss")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = make_adapter(tmp_path / "adapter", base, lora(target_parameters=parameters))
    edit_config(adapter, target_parameters=parameters[:1])
    with pytest.raises(TargetError, match="wraps 2 parameters and target_parameters names 1"):
        adapterkit.merge(base, [adapter], tmp_path / "out")


def test_merged_experts_answer_as_the_live_model(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("gpt_oss")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = make_adapter(tmp_path / "adapter", base, lora(target_parameters=parameters), scale=0.1)
    adapterkit.merge(base, [adapter], tmp_path / "out")
    theirs = logits(live(base, adapter), double=False)  # its kernels have no float64
    assert apart(logits(load_model(tmp_path / "out"), double=False), theirs) < 1e-4
