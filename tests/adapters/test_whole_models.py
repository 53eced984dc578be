"""Whole models merged into their common base: float64 formulas, TIES as mergekit has it, ties, refusals, records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import adapterkit
from adapterkit.errors import TargetError, UsageError

Tensors = dict[str, torch.Tensor]


def llama(*, tied: bool = True, vocab: int = 40, **more: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, tie_word_embeddings=tied, **sizes, **more))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three models trained from it, all tied."""
    folder = tmp_path_factory.mktemp("models")
    llama().save_pretrained(folder / "base")
    for seed in (1, 2, 3):
        moved(folder / "base", folder / f"m{seed}", seed)
    return folder


def moved(base: Path, out: Path, seed: int) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(out)


def read(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def test_the_weighted_sum_of_task_vectors(models: Path, tmp_path: Path) -> None:
    adapterkit.merge(models / "base", [models / "m1", models / "m2"], tmp_path / "out", weights=[0.3, 0.7])
    base, one, two, out = (read(f) for f in (models / "base", models / "m1", models / "m2", tmp_path / "out"))
    assert out.keys() == base.keys()
    for name, w in base.items():
        w = w.double()
        wanted = w + 0.3 * (one[name].double() - w) + 0.7 * (two[name].double() - w)
        torch.testing.assert_close(out[name].double(), wanted, rtol=0, atol=2e-7)
    assert adapterkit.verify(tmp_path / "out", base=models / "base", adapters=[models / "m1", models / "m2"]).ok


def test_ties_with_mergekits_formula(models: Path, tmp_path: Path) -> None:
    """Trim by magnitude, elect by the sum, divide by the weights that agree; vectors too, one tensor at a time."""
    names = ["m1", "m2", "m3"]
    weights = [0.5, 1.0, 0.25]
    adapterkit.merge(
        models / "base",
        [models / name for name in names],
        tmp_path / "out",
        weights=weights,
        method="ties",
        parameters={"density": 0.4},
    )
    base, out = read(models / "base"), read(tmp_path / "out")
    tuned = [read(models / name) for name in names]
    for name, w in base.items():
        deltas = []
        for weight, model in zip(weights, tuned, strict=True):
            delta = model[name].double() - w.double()
            kept = max(1, int(0.4 * delta.numel()))
            cut = delta.abs().flatten().sort(descending=True).values[kept - 1]
            deltas.append(weight * torch.where(delta.abs() >= cut, delta, 0.0))
        stack = torch.stack(deltas)
        agree = stack.sign() == stack.sum(0).sign()
        divisor = (torch.tensor(weights).double().view(-1, *[1] * w.dim()) * agree * (stack != 0)).sum(0)
        wanted = w.double() + (stack * agree).sum(0) / torch.where(divisor == 0, 1.0, divisor)
        close = (out[name].double() - wanted).abs() < 1e-6
        assert close.double().mean() > 0.999, name  # the last bit of an entry at the cut may fall on either side


def test_an_adapter_and_a_model_together(models: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(models / "base"), LoraConfig(target_modules=["q_proj"], r=2)
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(str(tmp_path / "adapter"))
    adapterkit.merge(models / "base", [models / "m1", tmp_path / "adapter"], tmp_path / "out")
    adapterkit.merge(models / "m1", tmp_path / "adapter", tmp_path / "by-hand")
    out, wanted = read(tmp_path / "out"), read(tmp_path / "by-hand")
    for name, tensor in wanted.items():
        torch.testing.assert_close(out[name], tensor, rtol=0, atol=5e-7)


def test_a_tied_base_and_a_model_that_is_not(models: Path, tmp_path: Path) -> None:
    """The output layer becomes a tensor of its own, and the config says so."""
    model = llama(tied=False)
    model.load_state_dict({**read(models / "m1"), "lm_head.weight": read(models / "m2")["model.embed_tokens.weight"]})
    model.save_pretrained(tmp_path / "untied")
    adapterkit.merge(models / "base", tmp_path / "untied", tmp_path / "out", weights=[0.5])
    base, out = read(models / "base"), read(tmp_path / "out")
    head = read(models / "m2")["model.embed_tokens.weight"]
    torch.testing.assert_close(out["lm_head.weight"], (base["model.embed_tokens.weight"] + head) / 2, rtol=0, atol=2e-7)
    assert not LlamaForCausalLM.from_pretrained(tmp_path / "out").config.tie_word_embeddings


def test_a_model_that_stores_its_tie_twice(models: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice"
    LlamaForCausalLM.from_pretrained(models / "m1").save_pretrained(twice)
    tensors = read(twice)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, twice / "model.safetensors", metadata={"format": "pt"})
    adapterkit.merge(models / "base", [twice, models / "m2"], tmp_path / "out", weights=[0.5, 0.5])
    adapterkit.merge(models / "base", [models / "m1", models / "m2"], tmp_path / "plain", weights=[0.5, 0.5])
    out, plain = read(tmp_path / "out"), read(tmp_path / "plain")
    assert out.keys() == plain.keys()
    assert all(torch.equal(out[name], plain[name]) for name in plain)


def test_a_base_with_two_tensors_where_the_model_has_one(tmp_path: Path) -> None:
    """The base's output layer is its own; the model's is its embedding, and that is what it brings."""
    llama(tied=False).save_pretrained(tmp_path / "base")
    tied = llama()
    with torch.no_grad():
        for parameter in tied.parameters():
            parameter.add_(0.05)
    tied.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in read(tmp_path / "tied")
    adapterkit.merge(tmp_path / "base", tmp_path / "tied", tmp_path / "out", weights=[0.5])
    base, model, out = (read(tmp_path / name) for name in ("base", "tied", "out"))
    wanted = (base["lm_head.weight"] + model["model.embed_tokens.weight"]) / 2
    torch.testing.assert_close(out["lm_head.weight"], wanted, rtol=0, atol=2e-7)
    # And where its config says that they are not tied, the tensor is missing.
    config = json.loads((tmp_path / "tied/config.json").read_text())
    (tmp_path / "tied/config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(TargetError, match=r"has no 'lm_head.weight', which the base has;"):
        adapterkit.merge(tmp_path / "base", tmp_path / "tied", tmp_path / "again", weights=[0.5])


def test_buffers_that_cannot_be_weighed(models: Path, tmp_path: Path) -> None:
    for name, value in (("base", 1), ("same", 1), ("other", 2)):
        place = tmp_path / name
        LlamaForCausalLM.from_pretrained(models / ("base" if name == "base" else "m1")).save_pretrained(place)
        tensors = {**read(place), "model.table": torch.full((4,), value, dtype=torch.int64)}
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    adapterkit.merge(tmp_path / "base", tmp_path / "same", tmp_path / "out", weights=[0.5])
    assert torch.equal(read(tmp_path / "out")["model.table"], torch.ones(4, dtype=torch.int64))
    with pytest.raises(TargetError, match=r"'model.table' holds i64 and is not the base's"):
        adapterkit.merge(tmp_path / "base", tmp_path / "other", tmp_path / "again", weights=[0.5])


def test_what_is_no_merge_of_models(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="merged alone with weight 1 it is itself"):
        adapterkit.merge(models / "base", models / "m1", tmp_path / "out")
    llama(vocab=48).save_pretrained(tmp_path / "larger")
    with pytest.raises(TargetError, match=r"embed_tokens.weight' is \[48, 16\] and the base's is \[40, 16\]"):
        adapterkit.merge(models / "base", [models / "m1", tmp_path / "larger"], tmp_path / "out")
    llama().save_pretrained(tmp_path / "less")
    tensors = read(tmp_path / "less")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "less" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TargetError, match=r"has no 'model.layers.1.mlp.up_proj.weight'"):
        adapterkit.merge(models / "base", [models / "m1", tmp_path / "less"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_check_plans_models_together_and_names_other_settings(models: Path, tmp_path: Path) -> None:
    llama(rms_norm_eps=1e-3).save_pretrained(tmp_path / "other")
    report = adapterkit.check(models / "base", [models / "m1", tmp_path / "other"])
    assert report.ok
    assert report.touched == 20
    report = adapterkit.check(models / "base", [models / "m1"])
    assert not report.ok
    assert adapterkit.check(models / "base", [models / "m1", models / "m2"], server="llama.cpp").touched == 20
    notes = adapterkit.merge(models / "base", [models / "m1", tmp_path / "other"], tmp_path / "out").notes
    assert any("rms_norm_eps 0.001 (base 1e-06); the result has the base's" in note for note in notes)


def test_parts_of_models(models: Path, tmp_path: Path) -> None:
    both = [models / "m1", models / "m2"]
    adapterkit.merge(models / "base", both, tmp_path / "out", weights=[0.5, 0.5], only="*.mlp.*")
    base, out = read(models / "base"), read(tmp_path / "out")
    changed = {name for name in base if not torch.equal(base[name], out[name])}
    assert changed == {name for name in base if ".mlp." in name}


def test_the_record_names_models(models: Path, tmp_path: Path) -> None:
    from adapterkit.registry.beside import read_beside

    adapterkit.merge(models / "base", [models / "m1", models / "m2"], tmp_path / "out", weights=[0.5, 0.5])
    record = read_beside(tmp_path / "out")
    assert record is not None
    assert [parent.role for parent in record.parents] == ["base", "model", "model"]
    swapped = adapterkit.verify(tmp_path / "out", base=models / "base", adapters=[models / "m2", models / "m1"])
    assert any("names other adapters than were given" in finding.text for finding in swapped.findings)
