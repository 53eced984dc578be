"""Damaged, foreign and half-saved adapters, named after the reports of people who met them in other tools.

Every case ends in one sentence that names the tensor or the field, with its exit code, and nothing is written.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import edit_config, plain_adapter, plain_base, read_bytes, read_tensors, write_adapter

import adapterkit
from adapterkit.errors import AdapterError, AdapterkitError, NotFound, TargetError, UnsafeError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return plain_adapter(tmp_path / "adapter", base)


def rewrite(adapter: Path, change: Callable[[Tensors], Any]) -> Path:
    """Change an adapter's tensors; ``change`` edits the map in place or gives another."""
    tensors = read_tensors(adapter)
    tensors = change(tensors) or tensors
    return write_adapter(adapter, tensors, **json.loads((adapter / "adapter_config.json").read_text()))


def refused(base: Path, adapter: Path, kind: type[AdapterkitError], words: str) -> AdapterkitError:
    before = read_bytes(base.parent)
    with pytest.raises(kind, match=words) as caught:
        adapterkit.merge(base, [adapter], base.parent / "out")
    assert read_bytes(base.parent) == before
    assert caught.value.hint
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700
    return caught.value


# ------------------------------------------------------------------ nothing merged, or not all of it


def test_unsloth_zoo_1234_nothing_matched(base: Path, adapter: Path) -> None:
    """0 of 326 weights were changed and "Merge complete" was printed."""
    rewrite(adapter, lambda t: {k.replace("model.layers", "model.visual.blocks"): v for k, v in t.items()})
    error = refused(base, adapter, TargetError, r"has no target in the base .* \(and 5 more modules\)")
    assert "nearest: model.layers.0" in error.hint


def test_ms_swift_4697_one_layer_has_no_target(base: Path, adapter: Path) -> None:
    rewrite(adapter, lambda t: {k.replace("layers.2", "layers.7"): v for k, v in t.items()})
    refused(base, adapter, TargetError, r"model\.layers\.7\.mlp\.up_proj\.lora_A\.weight' has no target")


def test_peft_1579_wrong_prefix(base: Path, adapter: Path) -> None:
    """In a trainer's own class every key is off by a prefix that could be a module's; wrappers are `test_saved_forms`'s."""
    rewritten = rewrite(
        plain_adapter(adapter.parent / "policy", base),
        lambda t: {k.replace(PREFIX, "policy."): v for k, v in t.items()},
    )
    refused(base, rewritten, TargetError, "has no target in the base")


def test_peft_2118_keys_without_the_prefix_are_read_as_module_paths(base: Path, adapter: Path, tmp_path: Path) -> None:
    adapterkit.merge(base, [adapter], tmp_path / "with")
    rewrite(adapter, lambda t: {k.removeprefix(PREFIX): v for k, v in t.items()})
    report = adapterkit.merge(base, [adapter], tmp_path / "without")
    assert any("lack the prefix" in note for note in report.notes)
    assert read_bytes(tmp_path / "with") == read_bytes(tmp_path / "without")


def test_internvl_548_adapter_name_left_in_the_keys(base: Path, adapter: Path, tmp_path: Path) -> None:
    adapterkit.merge(base, [adapter], tmp_path / "with")
    rewrite(adapter, lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()})
    report = adapterkit.merge(base, [adapter], tmp_path / "without")
    assert any("carry an adapter's name" in note for note in report.notes)
    assert read_bytes(tmp_path / "with") == read_bytes(tmp_path / "without")


def test_two_adapters_mixed_in_one_file(base: Path, adapter: Path) -> None:
    def mix(t: Tensors) -> Tensors:
        return {
            key.replace(".weight", f".{name}.weight"): tensor.clone()
            for name in ("a", "b")
            for key, tensor in t.items()
        }

    refused(base, rewrite(adapter, mix), AdapterError, "two tensors for .* mixes several adapters|holds two tensors")


def test_peft_2084_tensor_that_nobody_uses(base: Path, adapter: Path) -> None:
    """PEFT drops unexpected keys without a word."""
    rewrite(adapter, lambda t: t.update({f"{PREFIX}{Q0}.lora_C.weight": torch.ones(2, 2)}))
    refused(base, adapter, TargetError, r"q_proj\.lora_C\.weight' has no target")


def test_stray_weight_of_another_shape(base: Path, adapter: Path) -> None:
    rewrite(adapter, lambda t: t.update({f"{PREFIX}lm_head.weight": torch.ones(40, 8)}))
    refused(base, adapter, TargetError, r"lm_head\.weight' is \[40, 8\]")


def test_verl_7285_merged_equals_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A "merged" folder that is the base: here every module of the adapter changes its weight, the rest stays."""
    report = adapterkit.merge(base, [adapter], tmp_path / "out")
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    modules = {key.removeprefix(PREFIX).partition(".lora_")[0] for key in read_tensors(adapter)}
    assert changed == {f"{module}.weight" for module in modules}
    assert report.touched == len(changed)


def test_unsloth_869_zero_b_is_merged_and_changes_nothing(base: Path, adapter: Path, tmp_path: Path) -> None:
    rewrite(adapter, lambda t: {k: v * (".lora_A." in k) for k, v in t.items()})
    adapterkit.merge(base, [adapter], tmp_path / "out")
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


# ------------------------------------------------------------------ another base


def test_peft_1457_adapter_of_a_wider_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = plain_base(tmp_path / "other", width=32)
    error = refused(other, adapter, TargetError, r"made for a weight of 48 x 16, and model\.layers\.0.* is 96 x 32")
    assert "another base" in error.hint


def test_adapter_of_a_deeper_base(adapter: Path, tmp_path: Path) -> None:
    other = plain_base(tmp_path / "other", layers=2)
    refused(other, adapter, TargetError, r"model\.layers\.2.* has no target")


def test_llamafactory_6105_adapter_in_place_of_the_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is an adapter, not a checkpoint"):
        adapterkit.merge(adapter, [base], tmp_path / "out")
    with pytest.raises(UsageError, match="merged alone with weight 1 it is itself"):
        adapterkit.merge(base, [base], tmp_path / "out")


def test_peft_1300_token_past_the_vocabulary(base: Path, adapter: Path) -> None:
    rewrite(
        adapter,
        lambda t: t.update({f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 16)}),
    )
    edit_config(adapter, trainable_token_indices=[40])
    refused(base, adapter, TargetError, "token 40 is past the 40 rows")


@pytest.mark.parametrize("ids", [[1, 1], [-1], ["a"], [True], "abc", [], None, {"lm_head": [1]}], ids=str)
def test_token_ids_that_are_none(ids: Any, base: Path, adapter: Path) -> None:
    rewrite(
        adapter,
        lambda t: t.update({f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 16)}),
    )
    edit_config(adapter, trainable_token_indices=ids)
    refused(base, adapter, AdapterkitError, "token")


# ------------------------------------------------------------------ damaged files


@pytest.mark.parametrize("shape", [(0,), (0, 16), (4, 0)], ids=str)
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_peft_2450_zero3_empty_factors(factor: str, shape: tuple[int, ...], base: Path, adapter: Path) -> None:
    rewrite(adapter, lambda t: t.update({f"{PREFIX}{Q0}.{factor}.weight": torch.empty(shape)}))
    error = refused(base, adapter, AdapterError, rf"{Q0}.* is empty.*ZeRO-3")
    assert "full state dict" in error.hint


def test_trl_4416_flattened_factors(base: Path, adapter: Path) -> None:
    """FSDP's flat parameters: one dimension, and not empty."""
    rewrite(adapter, lambda t: t.update({f"{PREFIX}{Q0}.lora_A.weight": torch.ones(64)}))
    refused(base, adapter, AdapterError, "no matrix")


def test_one_factor_is_missing(base: Path, adapter: Path) -> None:
    rewrite(adapter, lambda t: t.pop(f"{PREFIX}{Q0}.lora_B.weight") is None)
    refused(base, adapter, AdapterError, rf"{Q0} has no lora_B\.weight")


def test_factors_of_different_rank(base: Path, adapter: Path) -> None:
    rewrite(adapter, lambda t: t.update({f"{PREFIX}{Q0}.lora_B.weight": torch.ones(16, 3)}))
    refused(base, adapter, AdapterkitError, Q0)


def test_rank_that_is_not_the_configs(base: Path, adapter: Path) -> None:
    edit_config(adapter, r=8)
    refused(base, adapter, AdapterError, "has rank 4 in the file and 8 in the config")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_nan_in_a_factor(factor: str, value: float, base: Path, adapter: Path) -> None:
    """PEFT loads it, and merges it unless it is told to be safe."""
    name = f"{PREFIX}model.layers.2.mlp.up_proj.{factor}.weight"
    rewrite(adapter, lambda t: t[name].view(-1)[7:8].fill_(value) is None)
    error = refused(base, adapter, AdapterError, rf"'{name}' holds NaN or infinite values")
    assert "diverged" in error.hint


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_nan_in_a_whole_parameter(weight: float, base: Path, adapter: Path, tmp_path: Path) -> None:
    rewrite(adapter, lambda t: t.update({f"{PREFIX}lm_head.weight": torch.full((40, 16), float("nan"))}))
    edit_config(adapter, modules_to_save=["lm_head"])
    with pytest.raises(AdapterError, match=r"lm_head\.weight' holds NaN"):
        adapterkit.merge(base, [adapter], tmp_path / "out", weights=[weight])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_pickle_only_adapter(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    error = refused(base, adapter, UnsafeError, r"only as a pickle \(adapter_model\.bin\)")
    assert error.exit_code == 6


def test_no_weights(base: Path, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    assert refused(base, adapter, NotFound, r"no adapter_model\.safetensors").exit_code == 7


def test_adapter_without_tensors(base: Path, adapter: Path) -> None:
    refused(base, rewrite(adapter, lambda t: t.clear()), AdapterError, "holds no tensors")


def test_adapter_in_a_sub_folder(base: Path, adapter: Path, tmp_path: Path) -> None:
    adapterkit.merge(base, [adapter], tmp_path / "plain")
    adapter.rename(tmp_path / "moved")
    adapter.mkdir()
    (tmp_path / "moved").rename(adapter / "default")
    refused(base, adapter, NotFound, r"sub-folders \(default\)")
    adapterkit.merge(base, [adapter / "default"], tmp_path / "sub")
    assert read_bytes(tmp_path / "plain") == read_bytes(tmp_path / "sub")


# ------------------------------------------------------------------ configs


@pytest.mark.parametrize("value", [True, 3, "x", {"a": 1}, [1]])
def test_field_of_a_newer_peft(value: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    """A new field may mean a new formula; PEFT itself warns and merges with the old one."""
    edit_config(adapter, use_hyperlora=value, peft_version="0.99.0")
    error = refused(base, adapter, AdapterError, r"use_hyperlora \(PEFT 0\.99\.0\)")
    assert "allow_unknown" in error.hint
    adapterkit.merge(base, [adapter], tmp_path / "known", allow_unknown=True)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_field_of_a_newer_peft_that_is_not_used(value: Any, base: Path, adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, use_hyperlora=value)
    adapterkit.merge(base, [adapter], tmp_path / "out")


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": "16"},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"lora_alpha": [1]},
        {"r": "4"},
        {"use_rslora": "yes"},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"q_proj": "8"}},
        {"alpha_pattern": {"q_proj": True}},
        {"alpha_pattern": {"q_proj": float("inf")}},
        {"alpha_pattern": {"(": 8}},
        {"rank_pattern": {"*": 8}},
        {"use_bdlora": {"nblocks": 0}},
        {"target_parameters": [1]},
        {"fan_in_fan_out": 3},
        {"layer_replication": [[0, 99]]},
        {"layer_replication": [["a", "b"]]},
        {"layer_replication": [[0]]},
        {"layer_replication": 3},
    ],
    ids=str,
)
def test_field_that_makes_no_sense(fields: dict[str, Any], base: Path, adapter: Path) -> None:
    edit_config(adapter, **fields)
    refused(base, adapter, AdapterkitError, ".")


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\xff", '{"peft_type": null}', "[" * 99_999])
def test_config_that_is_none(text: str, base: Path, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(text, encoding="latin-1")
    refused(base, adapter, AdapterkitError, "adapter_config.json")


BOMBS = [
    "(a|a?)+$b",
    r"(.*)*(.*)*(.*)*z",
    r"((?:[a-z]+\.?)+)+!",
    "(?:a?){9999999}b",
    "((a{1,1000}){1,1000}){1,1000}",
    "(" * 3000 + ")" * 3000,
    "(?R)",
    "a" * 5000 + "+",
    r"(?:\w|\w\w|\w\w\w)*!",
]


@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
@pytest.mark.parametrize("pattern", BOMBS, ids=lambda pattern: pattern[:16])
def test_regex_that_was_made_to_hang(pattern: str, field: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    edit_config(adapter, **{field: {pattern: 16}})
    started = time.process_time()
    with contextlib.suppress(AdapterError, UnsafeError):
        adapterkit.merge(base, [adapter], tmp_path / "out")
    assert time.process_time() - started < 4


def test_many_patterns_share_one_limit_of_time(base: Path, adapter: Path) -> None:
    slow = {rf"(.+)(.+)(.+)(.+)(.+)\7\6\5x{{0,{index}}}": 16 for index in range(200)}  # 60 ms each, or so
    edit_config(adapter, alpha_pattern=slow)
    started = time.process_time()
    refused(base, adapter, UnsafeError, "takes too long to match")
    assert time.process_time() - started < 5


def test_a_pattern_for_each_module_is_no_bomb(tmp_path: Path) -> None:
    """AdaLoRA-like rank allocation writes hundreds of full names."""
    base = plain_base(tmp_path / "base", layers=120)
    adapter = plain_adapter(tmp_path / "adapter", base)
    names = [key.removeprefix(PREFIX).partition(".lora_")[0] for key in read_tensors(adapter)]
    edit_config(adapter, alpha_pattern={name: 8 + index for index, name in enumerate(dict.fromkeys(names))})
    started = time.process_time()
    adapterkit.plan_merge(base, [adapter])
    assert time.process_time() - started < 4


def test_regex_in_target_modules_is_never_run(base: Path, adapter: Path, tmp_path: Path) -> None:
    """``re.fullmatch`` on this one takes PEFT minutes; the tensors in the file say what is adapted."""
    adapterkit.merge(base, [adapter], tmp_path / "plain")
    fields = dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern"), r"(?:(?:\w|\w\w)*\.?)*!")
    edit_config(adapter, **fields)
    started = time.process_time()
    adapterkit.merge(base, [adapter], tmp_path / "out")
    assert time.process_time() - started < 2
    assert read_bytes(tmp_path / "plain") == read_bytes(tmp_path / "out")


def test_peft_3085_classes_named_in_a_config_are_not_imported(base: Path, adapter: Path, tmp_path: Path) -> None:
    import sys

    edit_config(
        adapter,
        auto_mapping={"base_model_class": "X", "parent_library": "this.module.runs"},
        megatron_core="antigravity",
        tokenizer_kwargs=None,
    )
    adapterkit.merge(base, [adapter], tmp_path / "out")
    assert "antigravity" not in sys.modules
