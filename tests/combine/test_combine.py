"""`combine` against PEFT: what it writes loads there and is the sum that it names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    edit_config,
    live,
    load_model,
    make_adapter,
    plain_adapter,
    plain_base,
    read_bytes,
    read_tensors,
    write_adapter,
)

from adapterkit import check, combine, extract, merge, open_family, resize
from adapterkit.errors import (
    AdapterError,
    AdapterkitError,
    OutputError,
    TargetError,
    UnsupportedAdapter,
    UsageError,
)
from adapterkit.ops.rules import RULES


def config(**fields: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "down_proj"], **fields})


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """W' - W of every parameter by PEFT's own merge, in float64."""
    before = load_model(base, double=True).state_dict()
    after = live(base, adapter).merge_and_unload().state_dict()
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


def assert_sum(
    base: Path, out: Path, adapters: list[Path], weights: list[float], tolerance: float = 2e-6
) -> dict[str, torch.Tensor]:
    """PEFT's delta of ``out`` is the weighted sum of PEFT's deltas of ``adapters``."""
    found, single = deltas(base, out), [deltas(base, adapter) for adapter in adapters]
    names = {name for one in single for name in one}
    assert set(found) == names
    for name in names:
        wanted = sum(w * one[name] for w, one in zip(weights, single, strict=True) if name in one)
        assert isinstance(wanted, torch.Tensor)
        error = (found[name] - wanted).norm() / wanted.norm()
        assert error < tolerance, (name, error)
    return found


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.1.*q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "all linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
    "one layer": {"layers_to_transform": [1]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
}


@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("method", ["linear", "cat", "svd", "core"])
def test_one_adapter_is_itself(variant: str, method: str, make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama")
    adapter = make_adapter(tmp_path / "a", base, config(**VARIANTS[variant]))
    how = {"rule": "linear"} if method == "core" else {}
    combine([adapter], tmp_path / "out", method=method, **how)
    assert_sum(base, tmp_path / "out", [adapter], [1.0])


@pytest.mark.parametrize("variant", ["dora", "dora embedding", "loha", "hira"])
def test_one_adapter_without_low_rank_is_itself_at_full_rank(
    variant: str, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    import peft

    base = make_base("llama")
    told = {
        "dora": config(use_dora=True),
        "dora embedding": config(use_dora=True, target_modules=["embed_tokens", "k_proj"]),
        "loha": peft.LoHaConfig(r=3, alpha=6, target_modules=["q_proj"]),
        "hira": peft.HiraConfig(r=3, target_modules=["q_proj"]),
    }[variant]
    adapter = make_adapter(tmp_path / "a", base, told)
    report = combine([adapter], tmp_path / "out", base=base, energy=1.0)
    assert_sum(base, tmp_path / "out", [adapter], [1.0], tolerance=2e-5)
    assert report.rank > 4


def test_transposed_kernels(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("gpt2")
    targets = ["c_attn", "c_proj", "c_fc"]
    adapters = [
        make_adapter(tmp_path / name, base, config(target_modules=targets, fan_in_fan_out=True), seed=seed)
        for seed, name in enumerate("ab")
    ]
    combine(adapters, tmp_path / "out", weights=[0.5, -2])
    assert_sum(base, tmp_path / "out", adapters, [0.5, -2])
    combine(adapters, tmp_path / "again", weights=[0.5, -2], base=base)
    assert read_bytes(tmp_path / "again") == read_bytes(tmp_path / "out")


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_stacked_experts(kind: str, make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base(kind)
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapters = [
        make_adapter(tmp_path / f"a{i}", base, config(lora_dropout=0.0, use_rslora=i == 1, r=2 + i, **targets), seed=i)
        for i in range(2)
    ]
    combine(adapters, tmp_path / "out", base=base, weights=[1, 0.5])
    assert_sum(base, tmp_path / "out", adapters, [1, 0.5])


def test_convolution(tmp_path: Path) -> None:
    from models import save_module

    def module() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv1d(4, 6, 5))

    base = save_module(tmp_path / "base", module())
    adapters = [make_adapter(tmp_path / f"a{i}", module, config(target_modules=["0", "1"]), seed=i) for i in range(2)]
    combine(adapters, tmp_path / "out")
    merge(base, [tmp_path / "out"], tmp_path / "ours")
    merge(base, adapters, tmp_path / "theirs")
    assert live(module, tmp_path / "out") is not None
    for name, wanted in read_tensors(tmp_path / "theirs").items():
        assert (read_tensors(tmp_path / "ours")[name] - wanted).abs().max() < 2e-5


def test_unlike_adapters_add_up(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """Other ranks, scalings, modules and layers."""
    base = make_base("llama")
    told = [
        config(),
        config(r=8, use_rslora=True, target_modules=["q_proj", "up_proj"]),
        config(r=2, target_modules=["down_proj", "embed_tokens"]),
        config(target_modules=["v_proj"], layers_to_transform=[0]),
    ]
    adapters = [make_adapter(tmp_path / f"a{i}", base, one, seed=i) for i, one in enumerate(told)]
    weights = [0.7, -0.2, 1.5, 1.0]
    report = combine(adapters, tmp_path / "out", method="cat", weights=torch.tensor(weights, dtype=torch.float64))
    assert_sum(base, tmp_path / "out", adapters, weights)
    assert report.rank == 12  # q_proj has the first two adapters', down_proj 4 + 2
    combine(adapters, tmp_path / "own", method="cat", weights=weights, own_ranks=True)
    assert_sum(base, tmp_path / "own", adapters, weights)
    said = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert said["rank_pattern"] == said["alpha_pattern"] != {}


def test_svd_is_the_best_of_its_rank(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama")
    adapters = [make_adapter(tmp_path / f"a{i}", base, config(), seed=i) for i in range(3)]
    report = combine(adapters, tmp_path / "out", method="svd", rank=5)
    found, single = deltas(base, tmp_path / "out"), [deltas(base, adapter) for adapter in adapters]
    for name, got in found.items():
        whole = sum((one[name] for one in single), torch.zeros(()))
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        best = (u[:, :5] * s[:5]) @ vh[:5]
        assert (got - best).norm() / best.norm() < 1e-5
        row = next(row for row in report.modules if row.module == name)
        assert row.norm == pytest.approx(float(whole.norm()), rel=1e-5)
        assert row.error == pytest.approx(float((whole - best).norm() / whole.norm()), rel=1e-4)


@pytest.mark.parametrize("method", [name for name in RULES if name != "nearswap" and not RULES[name].based])
def test_every_method_gives_what_peft_loads(method: str, make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama")
    adapters = [make_adapter(tmp_path / f"a{i}", base, config(), seed=i) for i in range(2)]
    report = combine(adapters, tmp_path / "out", method=method, weights=[0.6, 0.6], scale=0.9, rank=6, jobs=2)
    combine(adapters, tmp_path / "again", method=method, weights=[0.6, 0.6], scale=0.9, rank=6, jobs=1)
    assert read_bytes(tmp_path / "again") == read_bytes(tmp_path / "out")
    found = deltas(base, tmp_path / "out")
    for row in report.modules:
        size = row.norm * (1 - row.error**2) ** 0.5
        got = float(found[row.module].norm()) if row.module in found else 0.0  # Model Stock: t = 0 for opposed adapters
        assert got == pytest.approx(size, rel=1e-3 if row.error else 1e-5), row


def test_adapters_with_dora_add_up(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama")
    told = [config(use_dora=True), config(r=2)]
    adapters = [make_adapter(tmp_path / f"a{i}", base, one, seed=i) for i, one in enumerate(told)]
    combine(adapters, tmp_path / "out", base=base, rank=32, weights=[0.5, 1])
    assert_sum(base, tmp_path / "out", adapters, [0.5, 1], tolerance=2e-5)


def test_trained_biases_heads_and_tokens_are_carried(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("qwen2")
    told = [
        config(bias="all", modules_to_save=["lm_head"]),
        config(r=2, target_modules=["v_proj"], trainable_token_indices=[3, 5]),
        config(lora_bias=True, target_modules=["k_proj"]),
    ]
    adapters = [make_adapter(tmp_path / f"a{i}", base, one, seed=i) for i, one in enumerate(told)]
    with pytest.raises(UsageError, match=r"train biases .* add base="):
        combine(adapters, tmp_path / "out", method="cat")
    report = combine(adapters[:2], tmp_path / "two", method="cat")
    assert_sum(base, tmp_path / "two", adapters[:2], [1, 1])
    combine(adapters[2:], tmp_path / "alone", weights=[0.5])
    assert_sum(base, tmp_path / "alone", adapters[2:], [0.5])
    told = [config(modules_to_save=["lm_head"]), config(target_modules=["v_proj"], trainable_token_indices=[3, 5])]
    adapters[:2] = [make_adapter(tmp_path / f"b{i}", base, one, seed=i) for i, one in enumerate(told)]
    report = combine(adapters, tmp_path / "out", method="cat", base=base)
    assert "lm_head.weight" in report.carried
    assert_sum(base, tmp_path / "out", adapters, [1, 1, 1])


def test_the_tokenizer_the_base_and_its_revision_are_carried(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    told = {"base_model_name_or_path": "org/base", "revision": "abc", "task_type": "CAUSAL_LM"}
    adapters = [plain_adapter(tmp_path / name, base, seed=i, **told) for i, name in enumerate("ab")]
    (adapters[1] / "tokenizer.json").write_text("{}")
    (adapters[1] / "optimizer.pt").write_text("no")
    combine(adapters, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {name: said[name] for name in told} == told
    assert sorted(read_bytes(tmp_path / "out")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
    ]


def test_the_record_says_what_it_was_made_from(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    one = plain_adapter(tmp_path / "a", base)
    combine([one, one], tmp_path / "out", weights=[0.5, 2], method="svd", rank=3)
    resize(tmp_path / "out", tmp_path / "small", rank=2)
    merge(base, [one], tmp_path / "merged")
    extract(base, tmp_path / "merged", tmp_path / "back", rank=4)
    made, small, back = (json.loads((tmp_path / n / "adapterkit.json").read_text()) for n in ("out", "small", "back"))
    assert (made["kind"], made["operation"]["name"]) == ("combined", "combine")
    assert [parent["parameters"]["weight"] for parent in made["parents"]] == [0.5, 2]
    weights = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() in {file["sha256"] for file in made["files"]}
    assert len(small["parents"]) == 1
    assert [parent["role"] for parent in back["parents"]] == ["base", "tuned"]


def test_weights_of_zero_leave_an_adapter_out(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    one = plain_adapter(tmp_path / "a", base, modules=["q_proj"])
    other = plain_adapter(tmp_path / "b", base, seed=3)
    report = combine([one, other], tmp_path / "out", weights=[1, 0], method="cat")
    assert (len(report.modules), report.rank) == (3, 4)


def test_half_precision_rounds_once(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "a", base, lora_alpha=4)
    combine([adapter], tmp_path / "out", dtype="bf16")
    before = read_tensors(adapter)
    assert {n: t.bfloat16().tolist() for n, t in before.items()} == {
        n: t.tolist() for n, t in read_tensors(tmp_path / "out").items()
    }


def test_a_search_over_weights_needs_no_files(tmp_path: Path) -> None:
    from adapterkit import combined
    from adapterkit.adapters.bound_rule import BoundRule

    base = plain_base(tmp_path / "base")
    family = open_family([plain_adapter(tmp_path / name, base, seed=i) for i, name in enumerate("ab")])
    for weights in ([1, 0], [0.5, 0.5], [-1, 2]):
        combine(family, tmp_path / "out", method="cat", weights=weights, force=True)
        written = read_tensors(tmp_path / "out")
        for slot, (found,) in combined(family, BoundRule("cat"), weights):
            assert torch.equal(found.factors.b, written[f"base_model.model.{slot.module}.lora_B.weight"])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"weights": [1]}, "1 weight for 2 adapters"),
    ({"weights": [1, float("nan")]}, "must be a finite number"),
    ({"weights": [0, 0]}, "every weight is 0"),
    ({"scale": float("inf")}, "scale= must be a finite number"),
    ({"method": "ties", "density": 1.5, "rank": 4}, r"density of method ties must be in \(0, 1\]"),
    ({"method": "ties", "beta": 1, "rank": 4}, "has no parameter beta"),
    ({"method": "nothing"}, "no combination method"),
    ({"method": "ties"}, "gives deltas of full rank"),
    ({"method": "cat", "space": "core"}, "cannot run in space core"),
    ({"rank": 17}, "rank 17 is larger than every layer"),
    ({"rank": 0}, "rank must be at least 1"),
    ({"energy": 1.5}, "energy must be in"),
    ({"dtype": "int8"}, "is not a value of dtype"),
]


@pytest.mark.parametrize(("how", "words"), BAD, ids=[words[:30] for _, words in BAD])
def test_bad_arguments_are_refused_before_anything_is_written(how: dict[str, Any], words: str, tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapters = [plain_adapter(tmp_path / name, base, seed=i) for i, name in enumerate("ab")]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=words):
        combine(adapters, tmp_path / "deep" / "out", **how)
    assert sorted(tmp_path.rglob("*")) == before


def _nan(folder: Path, base: Path) -> Path:
    plain_adapter(folder, base, seed=3)
    tensors = read_tensors(folder)
    tensors["base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"][3, 1] = float("nan")
    return write_adapter(folder, tensors)


def _head(folder: Path, base: Path, seed: int) -> Path:
    plain_adapter(folder, base, seed=seed)
    tensors = read_tensors(folder)
    tensors["base_model.model.lm_head.weight"] = torch.full((40, 16), float(seed))
    return write_adapter(folder, tensors, modules_to_save=["lm_head"])


def test_bad_adapters_are_named_and_nothing_is_left_behind(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    other_base = plain_base(tmp_path / "wider", width=32)
    good = plain_adapter(tmp_path / "good", base)
    wide = plain_adapter(tmp_path / "wide", other_base)
    named = [
        plain_adapter(tmp_path / n, base, base_model_name_or_path=f"org/{n}", seed=i) for i, n in enumerate(("x", "y"))
    ]
    nan = _nan(tmp_path / "nan", base)
    heads = [_head(tmp_path / f"head{i}", base, i) for i in (1, 2)]
    dora = plain_adapter(tmp_path / "dora", base, use_dora=True)
    tensors = read_tensors(dora)
    for name in [n for n in tensors if "lora_B" in n]:
        tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = torch.ones(len(tensors[name]))
    write_adapter(dora, tensors, use_dora=True)
    prompt = edit_config(plain_adapter(tmp_path / "prompt", base), peft_type="PROMPT_TUNING")
    before = sorted(tmp_path.rglob("*"))
    cases: list[tuple[list[Path], dict[str, Any], type[AdapterkitError], str]] = [
        ([], {}, UsageError, "no adapter was given"),
        ([good, wide], {}, TargetError, "48 x 16 in .*good and 96 x 32 in .*wide; they belong to different bases"),
        (named, {}, TargetError, "trained on org/x and .* on org/y; if both are the same model, name it with base="),
        ([good, nan], {}, AdapterError, "nan: model.layers.2.mlp.up_proj.weight: .* NaN"),
        (heads, {}, TargetError, "each bring their own 'lm_head.weight'"),
        ([dora], {"rank": 4}, UsageError, r"dora changes model.*\(dora r=4\); add base='BASE'"),
        ([good, dora], {"method": "cat", "base": base}, UsageError, "dora has no low rank at .*; use method='linear'"),
        ([dora], {"base": base}, UsageError, "dora has no low rank .* give rank='R' or energy='E'"),
        ([good, prompt], {}, UnsupportedAdapter, "PROMPT_TUNING"),
        ([good, good], {"base": other_base}, TargetError, "trained on another base"),
    ]
    for adapters, how, error, words in cases:
        with pytest.raises(error, match=words):
            combine(adapters, tmp_path / "deep" / "out", **how)
        assert sorted(tmp_path.rglob("*")) == before, words


def test_an_existing_target_is_kept_unless_forced(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "a", base)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        combine([adapter], tmp_path / "out")
    combine([adapter], tmp_path / "out", force=True)
    with pytest.raises(UsageError, match="lies in or over the input"):
        combine([adapter], adapter, force=True)


@pytest.mark.parametrize("left", ["linear", "svd"])
def test_a_base_named_settles_different_names(left: str, tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    named = [
        plain_adapter(tmp_path / n, base, base_model_name_or_path=f"org/{n}", seed=i) for i, n in enumerate(("x", "y"))
    ]
    assert combine(named, tmp_path / "out", base=base, method=left).base == "org/x"


@pytest.mark.parametrize("server", ["vllm", "llama.cpp"])
def test_servers_have_nothing_against_the_result(server: str, tmp_path: Path) -> None:
    told = {"base_model_name_or_path": "org/base"}
    base = plain_base(tmp_path / "base")
    one = plain_adapter(tmp_path / "a", base, use_rslora=True, alpha_pattern={"q_proj": 3}, **told)
    other = plain_adapter(tmp_path / "b", base, rank=8, modules=["q_proj"], **told)
    assert not check(base, [one], server=server).ok
    combine([one, other], tmp_path / "out", energy=0.9)
    report = check(base, [tmp_path / "out"], server=server)
    assert report.ok
    assert not [finding for finding in report.findings if finding.code.startswith(server)]
