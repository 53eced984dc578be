"""GGUF -> Hugging Face -> GGUF with a model's own tokenizer and card: the same bytes, and a folder that works."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import vocab_folders as folders

from adapterkit.verbs.convert import convert

if TYPE_CHECKING:
    from pathlib import Path

gguf = pytest.importorskip("gguf")
zoo = pytest.importorskip("arch_zoo")


def build(folder: Path, kind: str, family: str) -> dict[str, int]:
    """A tiny model with a tokenizer of its own; gives special tokens."""
    tiny = (zoo.ZOO | zoo.ENCODERS)[kind]
    zoo.ZOO["sized"] = replace(tiny, config={**tiny.config, "vocab_size": folders.SIZE, "pad_token_id": 1})
    zoo.build(folder, "sized")
    roles = folders.tokenizer(folder, family, ())
    config = json.loads((folder / "config.json").read_text())
    config |= {f"{role}_token_id": roles[role] for role in ("bos", "eos", "pad") if role in roles}
    (folder / "config.json").write_text(json.dumps(config))
    return roles


def there_and_back(at: Path) -> tuple[Any, Path]:
    """What is made of ``at/hf`` and of that again, which are compared; the first, read by gguf, and the folder between."""
    convert(at / "hf", at / "one.gguf")
    convert(at / "one.gguf", at / "back", to="hf")
    convert(at / "back", at / "two.gguf")
    assert (at / "one.gguf").read_bytes() == (at / "two.gguf").read_bytes()
    return gguf.GGUFReader(at / "one.gguf"), at / "back"


@pytest.mark.parametrize(
    ("kind", "family", "model"), [("roberta", folders.ROBERTA, "gpt2"), ("xlm_roberta", folders.FAIRSEQ, "t5")]
)
def test_robertas(kind: str, family: str, model: str, tmp_path: Path) -> None:
    import torch
    import transformers

    assert build(tmp_path / "hf", kind, family)["pad"] == 1
    reader, back = there_and_back(tmp_path)
    # 130 positions, of which padding takes two: what the converter of llama-cpp-python 0.3.36 writes.
    assert reader.fields["bert.context_length"].contents() == 128
    assert reader.fields["tokenizer.ggml.model"].contents() == model
    said = json.loads((back / "config.json").read_text())
    assert (said["max_position_embeddings"], said["pad_token_id"], said["model_type"]) == (130, 1, "roberta")
    text = "the quick brown fox jumps over<mask> a lazy dog 123"
    found = []
    for folder in (tmp_path / "hf", back):
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        ids = tokenizer(text, return_tensors="pt").input_ids
        model_of = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            found.append((ids.tolist(), model_of(ids).last_hidden_state))
    assert found[0][0] == found[1][0]
    assert (found[0][1] - found[1][1]).abs().max() < 1e-6


def test_symbols_of_the_user_stay_such(tmp_path: Path) -> None:
    build(tmp_path / "hf", "llama", folders.BARE)
    reader, _ = there_and_back(tmp_path)
    tokens, types = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert (types[tokens.index("<|user|>")], types[tokens.index("<tool>")]) == (4, 4)


def test_pooling_and_card(tmp_path: Path) -> None:
    build(tmp_path / "hf", "bert", folders.WORDS)
    hf = tmp_path / "hf"
    modules = [{"idx": 1, "name": "1", "path": "pool", "type": "sentence_transformers.models.Pooling"}]
    (hf / "modules.json").write_text(json.dumps(modules))
    (hf / "pool").mkdir()
    (hf / "pool" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (hf / "README.md").write_text("---\ntags: [a]\ndatasets: [org/one, two]\npipeline_tag: feature-extraction\n---\n")
    reader, back = there_and_back(tmp_path)
    assert reader.fields["bert.pooling_type"].contents() == 2  # CLS of gguf's PoolingType
    assert gguf.PoolingType.CLS == 2
    assert [one["path"] for one in json.loads((back / "modules.json").read_text())] == ["", "1_Pooling"]
    said = json.loads((back / "1_Pooling" / "config.json").read_text())
    assert said == {
        "word_embedding_dimension": 64,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_cls_token": True,
        "pooling_mode_lasttoken": False,
    }
    assert "datasets:\n- org/one\n- Two\n" in (back / "README.md").read_text()


def test_the_config_says_how_experts_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published DeepSeek V3 configs have a word for it, those of transformers 5 have not."""
    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", zoo.read_vocab)
    hf = tmp_path / "hf"
    zoo.build(hf, "deepseek_v3")
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "scoring_func": "sigmoid"}))
    reader, _ = there_and_back(tmp_path)
    assert reader.fields["deepseek2.expert_gating_func"].contents() == 2


def test_what_is_needed_may_be_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose every layer has experts says so with a 0, without which its config would not be read again."""
    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", zoo.read_vocab)
    config = {**zoo.ZOO["glm4_moe"].config, "first_k_dense_replace": 0}
    zoo.ZOO["dots1"] = zoo.Tiny("Dots1ForCausalLM", config)
    zoo.build(tmp_path / "hf", "dots1")
    reader, back = there_and_back(tmp_path)
    assert reader.fields["dots1.leading_dense_block_count"].contents() == 0
    assert json.loads((back / "config.json").read_text())["first_k_dense_replace"] == 0


@pytest.mark.parametrize(("kind", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_config_says_the_scale_that_the_runtime_has_built_in(
    kind: str, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma's 27B, known by its layers, scales queries by hidden_size / num_attention_heads and not by the head size."""
    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", zoo.read_vocab)
    tiny = zoo.ZOO[kind]
    config = {**tiny.config, "num_hidden_layers": layers, "hidden_size": 32, "intermediate_size": 16}
    monkeypatch.setitem(zoo.ZOO, "27b", replace(tiny, config={**config, "query_pre_attn_scalar": 8, "head_dim": 16}))
    zoo.build(tmp_path / "hf", "27b")
    _, back = there_and_back(tmp_path)
    assert json.loads((back / "config.json").read_text())["query_pre_attn_scalar"] == 32 // 4


def test_floats_beside_quantized_weights_are_not_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases of experts are matrices, and in float32 in a GGUF file."""
    from models import read_tensors

    from adapterkit.gguf.quantize import Quantization

    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", zoo.read_vocab)
    hf = tmp_path / "hf"
    zoo.build(hf, "gpt_oss")
    convert(hf, tmp_path / "q.gguf", quantization=Quantization("Q8_0"))
    convert(tmp_path / "q.gguf", tmp_path / "back", to="hf")
    stored, back = read_tensors(hf), read_tensors(tmp_path / "back")
    name = "model.layers.0.mlp.experts.gate_up_proj_bias"
    assert back[name].dtype == stored[name].dtype
    assert (back[name] == stored[name]).all()
    assert str(back["model.layers.0.self_attn.q_proj.weight"].dtype) == "torch.float16"
