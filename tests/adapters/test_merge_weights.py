"""Several adapters at once: all deltas summed, one rounding, in any order; against a float64 sum."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import (
    assert_merged,
    make_adapter,
    peft_merged,
    plain_adapter,
    plain_base,
    read_bytes,
    read_tensors,
    write_adapter,
)

import adapterkit
from adapterkit.errors import TargetError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WEIGHTS = [[0.3, -1.5, 2.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.5]]


def sum_of(base: Path, parts: list[tuple[dict[str, torch.Tensor], float]]) -> dict[str, torch.Tensor]:
    before = {name: tensor.double() for name, tensor in read_tensors(base).items()}
    return {name: old + sum(w * (new[name].double() - old) for new, w in parts) for name, old in before.items()}


@pytest.fixture(scope="module")
def three(
    make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, list[Path], list[dict[str, torch.Tensor]]]]:
    """Three adapters of different rank, method and reach on one base, and PEFT's float64 merge of each alone."""
    from peft import LoraConfig

    made: dict[str, Any] = {}

    def make(dtype: str) -> Any:
        if dtype not in made:
            folder = tmp_path_factory.mktemp("three")
            base = make_base("llama", dtype)
            configs = [
                LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]),
                LoraConfig(r=8, lora_alpha=5, use_dora=True, target_modules=["k_proj", "up_proj"]),
                LoraConfig(
                    r=4, use_rslora=True, target_modules=["q_proj", "embed_tokens"], trainable_token_indices=None
                ),
            ]
            adapters = [make_adapter(folder / str(i), base, config, seed=i) for i, config in enumerate(configs)]
            exact = [peft_merged(base, a, folder / f"peft{i}").exact for i, a in enumerate(adapters)]
            made[dtype] = base, adapters, exact
        return made[dtype]

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_sum_with_one_rounding(dtype: str, weights: list[float], three: Any, tmp_path: Path) -> None:
    base, adapters, exact = three(dtype)
    adapterkit.merge(base, adapters, tmp_path / "out", weights=weights)
    assert_merged(base, tmp_path / "out", sum_of(base, list(zip(exact, weights, strict=True))))


def test_order_does_not_matter_beyond_float32(three: Any, tmp_path: Path) -> None:
    base, adapters, exact = three("float32")
    wanted = sum_of(base, [(new, 1.0) for new in exact])
    for number, order in enumerate(itertools.permutations(adapters)):
        adapterkit.merge(base, order, tmp_path / str(number))
        assert_merged(base, tmp_path / str(number), wanted)


def test_same_adapter_twice_is_twice_its_delta(three: Any, tmp_path: Path) -> None:
    base, adapters, _ = three("bfloat16")
    adapterkit.merge(base, [adapters[0], adapters[0]], tmp_path / "twice")
    adapterkit.merge(base, [adapters[0]], tmp_path / "double", weights=[2.0])
    for name, tensor in read_tensors(tmp_path / "twice").items():
        assert torch.allclose(tensor.float(), read_tensors(tmp_path / "double")[name].float(), rtol=2**-7), name


def test_weight_one_is_no_weight(three: Any, tmp_path: Path) -> None:
    base, adapters, _ = three("bfloat16")
    adapterkit.merge(base, [adapters[1]], tmp_path / "one", weights=[1.0])
    adapterkit.merge(base, [adapters[1]], tmp_path / "none")
    assert read_bytes(tmp_path / "one") == read_bytes(tmp_path / "none")


def test_weights_of_replaced_parameters(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """``modules_to_save`` and trained rows count with their weight too: W + w (new - W)."""
    from peft import LoraConfig

    base = make_base("llama", "bfloat16")
    configs = [
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 50]),
    ]
    adapters = [make_adapter(tmp_path / f"a{i}", base, config, seed=i) for i, config in enumerate(configs)]
    exact = [peft_merged(base, a, tmp_path / f"peft{i}").exact for i, a in enumerate(adapters)]
    adapterkit.merge(base, adapters, tmp_path / "out", weights=[0.5, -0.25])
    assert_merged(base, tmp_path / "out", sum_of(base, [(exact[0], 0.5), (exact[1], -0.25)]))


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0]])
def test_another_number_of_weights(weights: list[float], tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapters = [plain_adapter(tmp_path / str(seed), base, seed=seed) for seed in range(2)]
    with pytest.raises(UsageError, match=f"{len(weights)} weights? for 2 adapters"):
        adapterkit.merge(base, adapters, tmp_path / "out", weights=weights)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), float("-inf")])
def test_weight_that_is_no_number(weight: float, tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    with pytest.raises(UsageError, match="weight"):
        adapterkit.merge(base, [plain_adapter(tmp_path / "a", base)], tmp_path / "out", weights=[weight])


def test_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no adapter"):
        adapterkit.merge(plain_base(tmp_path / "base"), [], tmp_path / "out")


@pytest.mark.parametrize("grown", [False, True])
def test_two_adapters_on_the_embedding(grown: bool, make_base: Callable[..., Path], tmp_path: Path) -> None:
    """Each brings the weight it started from. While they agree on it, both deltas are added to it."""
    from peft import LoraConfig

    base = make_base("llama", "bfloat16")
    config = LoraConfig(r=2, target_modules=["embed_tokens"])
    adapters = [make_adapter(tmp_path / str(seed), base, config, seed=seed) for seed in range(2)]
    if grown:
        tensors = read_tensors(adapters[1])
        tensors["base_model.model.model.embed_tokens.base_layer.weight"] += 1
        write_adapter(adapters[1], tensors, **json.loads((adapters[1] / "adapter_config.json").read_text()))
        with pytest.raises(TargetError, match="each bring their own"):
            adapterkit.merge(base, adapters, tmp_path / "out")
        return
    exact = [peft_merged(base, a, tmp_path / f"peft{i}").exact for i, a in enumerate(adapters)]
    adapterkit.merge(base, adapters, tmp_path / "out")
    assert_merged(base, tmp_path / "out", sum_of(base, [(new, 1.0) for new in exact]))
