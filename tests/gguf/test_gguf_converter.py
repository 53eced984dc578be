"""Keys, types and bits as llama.cpp's own converter writes them (that of llama-cpp-python 0.3.36).

The expected values were read from files of that converter. `bench/proofs/converter.py` compares whole files with ours, for
every architecture. These are the ones that were once otherwise.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from vocab_runtime import values
from vocab_zoo import spm_json

from adapterkit.gguf.vocab import read_vocab
from adapterkit.verbs.convert import convert

if TYPE_CHECKING:
    from pathlib import Path

gguf = pytest.importorskip("gguf")
zoo = pytest.importorskip("arch_zoo")
TOKEN = "tokenizer.ggml."


@pytest.fixture
def _numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", zoo.read_vocab)


def written(folder: Path, kind: str, **said: Any) -> Any:
    """A tiny model's GGUF, read by gguf."""
    zoo.build(folder, kind)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **said}))
    convert(folder, folder / "out.gguf")
    return gguf.GGUFReader(folder / "out.gguf")


def key(reader: Any, name: str) -> tuple[list[str], Any]:
    field = reader.fields[name]
    return [kind.name for kind in field.types], field.contents()


@pytest.mark.usefixtures("_numbered")
@pytest.mark.parametrize(
    ("kind", "said", "expected"),
    [
        ("nemotron", {}, {"nemotron.attention.layer_norm_rms_epsilon": (["FLOAT32"], 9.999999747378752e-06)}),
        (
            "modernbert",
            {"classifier_pooling": "mean"},
            {
                "modern-bert.attention.layer_norm_rms_epsilon": (["FLOAT32"], 9.999999747378752e-06),
                "modern-bert.attention.layer_norm_epsilon": (["FLOAT32"], 9.999999747378752e-06),
                "modern-bert.classifier.pooling_type": (["UINT32"], 1),
            },
        ),
        (
            "granite_hybrid_dense",
            {},
            {"granitehybrid.expert_count": (["UINT32"], 0), "granitehybrid.expert_used_count": (["UINT32"], 0)},
        ),
    ],
)
def test_keys(kind: str, said: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    reader = written(tmp_path / "hf", kind, **said)
    assert {name: key(reader, name) for name in expected} == expected


@pytest.mark.usefixtures("_numbered")
def test_a_correction_of_experts_keeps_its_shape(tmp_path: Path) -> None:
    tensors = {one.name: one for one in written(tmp_path / "hf", "ernie4_5_moe").tensors}
    bias = tensors["blk.1.exp_probs_b.bias"]
    assert (bias.shape.tolist(), bias.tensor_type.name) == ([4, 1], "F32")


@pytest.mark.usefixtures("_numbered")
def test_multipliers_are_applied_one_after_the_other(tmp_path: Path) -> None:
    """In float32, as transformers does too: the product of both would round once less."""
    import numpy as np
    from models import read_tensors

    hf = tmp_path / "hf"
    tensors = {one.name: one for one in written(hf, "falcon_h1").tensors}
    stored = read_tensors(hf)["model.layers.0.self_attn.k_proj.weight"].numpy()
    expected = stored * np.float32(0.7) * np.float32(0.8)
    assert (tensors["blk.0.attn_k.weight"].data == expected).all()
    assert (expected != stored * np.float32(0.7 * 0.8)).any()


def _spm(names: tuple[str, str, str] = ("<unk>", "<s>", "</s>"), **settings: Any) -> dict[str, bytes]:
    from vocab_zoo import sentencepiece_model

    files = dict(spm_json(names=names).files)
    files["tokenizer.model"] = sentencepiece_model("bpe")
    added = json.loads(files["tokenizer.json"])["added_tokens"]
    listed = {str(one["id"]): {"content": one["content"], "special": True} for one in added}
    files["tokenizer_config.json"] = json.dumps({"added_tokens_decoder": listed, **settings}).encode()
    return files


def test_listed_tokens_have_the_score_of_added_ones() -> None:
    found = values(read_vocab(_spm(), {}, kind="auto", rows=0).entries)
    assert found[TOKEN + "tokens"][:3] == ["<unk>", "<s>", "</s>"]
    assert found[TOKEN + "scores"][:3] == [-1000.0, -1000.0, -1000.0]
    assert found[TOKEN + "token_type"][:3] == [3, 3, 3]
    files = _spm()
    del files["tokenizer_config.json"]
    assert values(read_vocab(files, {}, kind="auto", rows=0).entries)[TOKEN + "scores"][1:3] == [0.0, 0.0]


def test_gemma_4_shows_the_marks_of_its_turns() -> None:
    files = _spm()
    data = json.loads(files["tokenizer.json"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    size = len(data["model"]["vocab"])
    for number, name in enumerate(("<|channel>", "<|turn>")):
        data["added_tokens"].append({"id": size + number, "content": name, **flags})
    files["tokenizer.json"] = json.dumps(data).encode()
    found = values(read_vocab(files, {"model_type": "gemma4"}, kind="auto", rows=0).entries)
    assert found[TOKEN + "model"] == "gemma4"
    assert found[TOKEN + "merges"]
    assert set(found[TOKEN + "scores"]) == {-1000.0}
    types = dict(zip(found[TOKEN + "tokens"], found[TOKEN + "token_type"], strict=True))
    assert (types["<|channel>"], types["<|turn>"], types["<s>"]) == (4, 3, 3)


GLM = ("[gMASK]", "<|user|>", "<|endoftext|>", "<|observation|>")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("glm4", {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "eot": "<|user|>", "unknown": "<|endoftext|>"}),
        ("glm4v", {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "eot": "<|user|>", "unknown": "<|endoftext|>"}),
        ("glm4_moe", {"bos": "[gMASK]", "eot": "<|user|>", "unknown": "<|endoftext|>", "eom": "<|observation|>"}),
    ],
)
def test_special_tokens_of_glm(model: str, expected: dict[str, str]) -> None:
    from vocab_zoo import byte_level

    from adapterkit.gguf.vocab import pretokenizers

    row = next(row for row in pretokenizers.ROWS if row.name == "glm4")
    tokenizer = byte_level(pretokenizers.as_json(row), ignore_merges=True, size=300)
    tokenizer.add_special_tokens(list(GLM))
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    found = values(read_vocab(files, {"model_type": model}, kind="auto", rows=0).entries)
    assert found[TOKEN + "pre"] == "glm4"
    roles = {role: f"{TOKEN}{role}_token_id" for role in ("bos", "eos", "eot", "eom", "unknown")}
    tokens = found[TOKEN + "tokens"]
    assert {role: tokens[found[name]] for role, name in roles.items() if name in found} == expected


def test_gemma_ends_a_turn() -> None:
    files = _spm()
    data = json.loads(files["tokenizer.json"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    size = len(data["model"]["vocab"])
    data["added_tokens"].append({"id": size, "content": "<end_of_turn>", **flags})
    files["tokenizer.json"] = json.dumps(data).encode()
    found = values(read_vocab(files, {"model_type": "gemma"}, kind="auto", rows=0).entries)
    assert found[TOKEN + "eot_token_id"] == size


CARD = """---
tags:
- chat
pipeline_tag: text-generation
language: en
datasets:
- org/my-data
---
"""


@pytest.mark.usefixtures("_numbered")
def test_datasets_and_task_of_a_card(tmp_path: Path) -> None:
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "README.md").write_text(CARD)
    reader = written(hf, "llama")
    assert key(reader, "general.tags") == (["ARRAY", "STRING"], ["chat", "text-generation"])
    assert key(reader, "general.languages") == (["ARRAY", "STRING"], ["en"])
    assert key(reader, "general.dataset.count") == (["UINT32"], 1)
    assert key(reader, "general.dataset.0.name") == (["STRING"], "My Data")
    assert key(reader, "general.dataset.0.organization") == (["STRING"], "Org")
    # The converter writes https://huggingface.co/org/my-data, where there is no dataset.
    assert key(reader, "general.dataset.0.repo_url")[1] == "https://huggingface.co/datasets/org/my-data"
