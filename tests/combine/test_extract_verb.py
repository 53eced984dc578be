"""`extract`: known differences come back, and what PEFT makes of them is the tuned model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import (
    live,
    load_model,
    logits,
    plain_adapter,
    plain_base,
    random_tensors,
    read_bytes,
    read_tensors,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file

from adapterkit import extract, merge
from adapterkit.cli import main
from adapterkit.errors import AdapterkitError, CheckpointError, TargetError, UsageError


def tuned(folder: Path, base: Path, change: Callable[[str, torch.Tensor], torch.Tensor], **config: Any) -> Path:
    """A copy of a checkpoint with other values."""
    tensors = {name: change(name, tensor).contiguous() for name, tensor in read_tensors(base).items()}
    said = json.loads((base / "config.json").read_text())
    return write_checkpoint(folder, tensors, {**said, **config})


def moved(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Everything moves by a tenth of its size; tensors that are not all alike keep their shape."""
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name)))
    return tensor + 0.1 * tensor.std().nan_to_num(0.1) * noise.to(tensor.dtype)


def test_a_known_adapter_comes_back(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", width=64, dtype="float32", shards=2)
    adapter = plain_adapter(tmp_path / "adapter", base, rank=16)
    merge(base, [adapter], tmp_path / "tuned")
    report = extract(base, tmp_path / "tuned", tmp_path / "out", rank=16)
    got, factors = read_tensors(tmp_path / "out"), read_tensors(adapter)
    assert len(report.modules) == 6
    assert set(got) == set(factors)
    assert report.unchanged == 5
    for row in report.modules:
        key = f"base_model.model.{row.module.removesuffix('.weight')}"
        wanted = 0.5 * factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()  # alpha 8
        found = got[f"{key}.lora_B.weight"].double() @ got[f"{key}.lora_A.weight"].double()
        assert (found - wanted).norm() / wanted.norm() < 1e-5
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert said["target_modules"] == ["q_proj", "up_proj"]
    assert said["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "mixtral", "gpt_oss", "llama tied"])
def test_all_of_a_full_fine_tune_comes_back(kind: str, make_base: Callable[..., Path], tmp_path: Path) -> None:
    """Embeddings, norms, biases, transposed kernels, stacked experts: at full rank PEFT has the tuned model."""
    kind, _, tie = kind.partition(" ")
    base = make_base(kind, **({"tie_word_embeddings": True} if tie else {}))
    other = tuned(tmp_path / "tuned", base, moved)
    extract(base, other, tmp_path / "out", energy=1.0, own_ranks=True)
    double = kind not in ("mixtral", "gpt_oss")  # transformers' grouped products of experts know no float64
    wanted = logits(load_model(other), double)
    merge(base, [tmp_path / "out"], tmp_path / "ours")
    assert (logits(load_model(tmp_path / "ours"), double) - wanted).abs().max() / wanted.std() < 1e-4
    if not tie:  # PEFT's own merge adds a tied delta twice
        theirs = live(base, tmp_path / "out")
        assert (logits(theirs, double) - wanted).abs().max() / wanted.std() < 1e-4


def test_the_error_of_a_rank_is_that_of_the_dense_svd(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama")
    other = tuned(tmp_path / "tuned", base, moved)
    report = extract(base, other, tmp_path / "out", energy=0.8, own_ranks=True)
    before, after = read_tensors(base), read_tensors(other)
    assert len({row.rank for row in report.modules}) > 1
    for row in report.modules:
        s = torch.linalg.svdvals((after[row.module] - before[row.module]).double())
        tails = [float(s[k:].norm() / s.norm()) for k in range(len(s) + 1)]
        assert row.error <= 1.01 * tails[row.rank] + 1e-9
        assert 1 - row.error**2 >= 0.8
        assert row.norm == pytest.approx(float(s.norm()), rel=1e-5)


def test_a_vocabulary_that_grew_is_stored_whole(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama")

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        grown = "embed_tokens" in name or "lm_head" in name
        return torch.cat([tensor, torch.ones(4, tensor.shape[1])]) if grown else moved(name, tensor)

    other = tuned(tmp_path / "tuned", base, change, vocab_size=100)
    (other / "tokenizer.json").write_text("{}")
    report = extract(base, other, tmp_path / "out", rank=32)
    assert set(report.saved) >= {"model.embed_tokens.weight", "lm_head.weight"}
    assert any("has 100 rows, and 96 in the base" in note for note in report.notes)
    merge(base, [tmp_path / "out"], tmp_path / "merged")
    got, wanted = read_tensors(tmp_path / "merged"), read_tensors(other)
    for name, value in wanted.items():
        assert (got[name] - value).abs().max() < 1e-5, name
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_head_that_the_base_does_not_have(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base("llama", tie_word_embeddings=True)
    tensors = read_tensors(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    said = {**json.loads((base / "config.json").read_text()), "tie_word_embeddings": False}
    other = write_checkpoint(tmp_path / "tuned", tensors, said)
    report = extract(base, other, tmp_path / "out")
    assert report.saved == ("lm_head.weight",)
    merge(base, [tmp_path / "out"], tmp_path / "merged")
    got = read_tensors(tmp_path / "merged")
    assert torch.equal(got["lm_head.weight"], tensors["lm_head.weight"])
    assert torch.equal(got["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])


def test_threads_do_not_change_a_byte(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", width=64)
    other = tuned(tmp_path / "tuned", base, moved)
    for jobs in (1, 4):
        extract(base, other, tmp_path / f"out{jobs}", energy=0.5, jobs=jobs)
    assert read_bytes(tmp_path / "out1") == read_bytes(tmp_path / "out4")


def _nan(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, float("nan")) if "layers.1.mlp" in name else tensor


def test_bad_input(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    wide = plain_base(tmp_path / "wide", width=32)
    nan = tuned(tmp_path / "nan", base, _nan)
    gpt2 = tuned(tmp_path / "gpt2", base, moved, model_type="gpt2")
    other = tuned(tmp_path / "other", base, moved)
    strange = write_checkpoint(tmp_path / "strange", random_tensors({"a.weight": (4, 4)}), {"model_type": "llama"})
    before = sorted(tmp_path.rglob("*"))
    cases: list[tuple[Path, dict[str, Any], type[AdapterkitError], str]] = [
        (base, {}, TargetError, "is the same as"),
        (wide, {}, TargetError, r"is \[40, 16\] in .*|is \[16, 16\] in"),
        (nan, {}, CheckpointError, "layers.1.mlp.up_proj.weight has NaN"),
        (gpt2, {}, TargetError, "is a llama and .* a gpt2"),
        (strange, {}, TargetError, "no parameter in common"),
        (other, {"rank": 64}, UsageError, "larger than every layer"),
        (other, {"energy": 0.0}, UsageError, "energy must be in"),
    ]
    for path, how, error, words in cases:
        with pytest.raises(error, match=words):
            extract(base, path, tmp_path / "out", **how)
        assert sorted(tmp_path.rglob("*")) == before, words
    with pytest.raises(TargetError, match="is the same as"):  # known when the plan is made
        extract(base, base, save_plan=tmp_path / "plan.json")
    assert sorted(tmp_path.rglob("*")) == before


def test_loose_files_and_the_adapter_lie_in_one_folder(tmp_path: Path) -> None:
    """A file that was named by itself makes no input of its folder; an output over it is still refused."""
    torch.manual_seed(0)
    weight, change = torch.randn(32, 32), torch.randn(32, 2) @ torch.randn(2, 32)
    name = "double_blocks.0.img_attn.proj.weight"
    for stem, values in (("base", weight), ("tuned", weight + change)):
        save_file({name: values}, tmp_path / f"{stem}.safetensors")
    base, other = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    extract(base, other, tmp_path / "lora", rank=2)
    found = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    a, b = (next(t for key, t in found.items() if factor in key) for factor in ("lora_A", "lora_B"))
    assert torch.allclose(b.float() @ a.float(), change, atol=1e-3)
    for out in (tmp_path, base):
        with pytest.raises(AdapterkitError):
            extract(base, other, out, rank=2, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "lora", "tuned.safetensors"]


def test_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    other = tuned(tmp_path / "tuned", base, moved)
    with pytest.raises(SystemExit) as stopped:
        main(["extract", str(base), str(other), "-o", str(tmp_path / "out"), "--rank", "4"])
    out = capsys.readouterr().out
    assert not stopped.value.code
    assert out.count("up_proj") == 3
    assert "whole" in out
    assert "of the squared difference kept" in out
