"""Rerankers in llama-server's rerank endpoint (xllamacpp), beside transformers and its tokenizer."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import arch_zoo as zoo
import numpy as np
import pytest
import vocab_folders
from gguf import GGUFReader

from adapterkit.errors import CheckpointError, TargetError, UsageError
from adapterkit.gguf.arch.rerank import PROMPT
from adapterkit.verbs.convert import convert

QUERY = "what is a panda"
TEXTS = ("hi there", "the giant panda is a bear", "a cat")

_SERVER = """
import json, sys
import xllamacpp as x
files, query, texts = json.loads(sys.argv[1])
found = []
for file in files:
    p = x.CommonParams()
    p.model.path = file
    p.n_ctx = 512; p.n_batch = 512; p.n_ubatch = 512; p.n_parallel = 1; p.n_gpu_layers = 0; p.warmup = False
    p.fit_params = False; p.cpuparams.n_threads = 1; p.verbosity = -1; p.port = 0; p.embedding = True
    p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
    p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    p.pooling_type = x.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
    server = x.Server(p)
    asked = {"query": query, "documents": texts}
    answer = server.handle_rerank(asked)
    assert "results" in answer, answer
    rows = answer["results"]
    found.append([row["relevance_score"] for row in sorted(rows, key=lambda row: row["index"])])
    del server
print("RESULT" + json.dumps(found))
"""


def scores(*files: Path) -> Any:
    """Float64 ``[files, texts]``: what the rerank endpoint says of `TEXTS`."""
    asked = json.dumps([[str(file) for file in files], QUERY, TEXTS])
    done = subprocess.run([sys.executable, "-c", _SERVER, asked], capture_output=True, text=True, timeout=900)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), None)
    assert line is not None, f"llama.cpp gave no answer: {done.returncode} {done.stderr[-1500:]}"
    return np.array(json.loads(line.removeprefix("RESULT")))


def _logits(model: Any, ids: list[int], **more: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), **more).logits[0].double()


def _build(folder: Path, cls: str, family: str, kind: str = "qwen3", **config: Any) -> Any:
    """A tiny model with the tokenizer of its family."""
    tiny = (zoo.ZOO | zoo.ENCODERS)[kind]
    zoo.ZOO["scored"] = replace(tiny, cls=cls, config={**tiny.config, "vocab_size": vocab_folders.SIZE, **config})
    model = zoo.build(folder, "scored")
    vocab_folders.tokenizer(folder, family, ())
    return model


def _encode(folder: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("count", [1, 3])
def test_a_qwen3_classifier_answers_with_probabilities(count: int, tmp_path: Path) -> None:
    import torch

    labels = {i: f"kind {i}" for i in range(count)}
    model = _build(tmp_path / "hf", "Qwen3ForSequenceClassification", "qwen2", id2label=labels, pad_token_id=0)
    expected = []
    for text in TEXTS:
        logits = _logits(model, _encode(tmp_path / "hf", QUERY) + _encode(tmp_path / "hf", text))
        expected.append(float(torch.sigmoid(logits[0]) if count == 1 else torch.softmax(logits, -1)[0]))
    report = convert(tmp_path / "hf", tmp_path / "o.gguf")
    assert any("sigmoid" in note for note in report.notes)
    fields = GGUFReader(str(tmp_path / "o.gguf")).fields
    assert fields["qwen3.pooling_type"].contents() == 4
    assert fields["qwen3.classifier.output_labels"].contents() == [
        "kind 0",
        *(["not kind 0"] if count == 1 else []),
    ] + [f"kind {i}" for i in range(1, count)]
    convert(tmp_path / "o.gguf", tmp_path / "back", to="hf")
    convert(tmp_path / "back", tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "o.gguf").read_bytes()
    assert abs(scores(tmp_path / "o.gguf")[0] - expected).max() < 1e-5


@pytest.mark.parametrize("tied", [True, False, "with an output layer of its own"])
def test_a_language_model_that_answers_yes_or_no(tied: Any, tmp_path: Path) -> None:
    import torch

    hf = tmp_path / "hf"
    model = _build(hf, "Qwen3ForCausalLM", "qwen2", tie_word_embeddings=tied is True, max_position_embeddings=512)
    with pytest.raises(CheckpointError, match="no such tokens"):
        convert(hf, tmp_path / "o.gguf", as_reranker=True)
    words = json.loads((hf / "tokenizer.json").read_text())
    vocab = words["model"]["vocab"]
    for old, new in (
        (next(w for w in vocab if vocab[w] == 300), "yes"),
        (next(w for w in vocab if vocab[w] == 301), "no"),
    ):
        number = vocab.pop(old)
        vocab[new] = number
        words["model"]["merges"] = [m for m in words["model"]["merges"] if "".join(m) != old and old not in m]
    (hf / "tokenizer.json").write_text(json.dumps(words))
    if isinstance(tied, str):
        config = json.loads((hf / "config.json").read_text())
        (hf / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    report = convert(hf, tmp_path / "o.gguf", as_reranker=True)
    assert any("the probability of 'yes'" in note for note in report.notes)
    expected = []
    for text in TEXTS:
        asked = PROMPT.replace("{query}", QUERY).replace("{document}", text)
        logits = _logits(model, _encode(hf, asked))[-1]
        expected.append(float(torch.softmax(logits[[vocab["yes"], vocab["no"]]], -1)[0]))
    assert abs(scores(tmp_path / "o.gguf")[0] - expected).max() < 1e-5
    convert(tmp_path / "o.gguf", tmp_path / "back", to="hf")
    from transformers import AutoModelForSequenceClassification

    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "back").float().eval()
    asked = PROMPT.replace("{query}", QUERY).replace("{document}", TEXTS[0])
    assert float(torch.softmax(_logits(again, _encode(hf, asked)), -1)[0]) == pytest.approx(expected[0], abs=1e-5)


def test_others_are_not_written_as_rerankers(tmp_path: Path) -> None:
    _build(tmp_path / "hf", "LlamaForCausalLM", "qwen2", "llama")
    words = json.loads((tmp_path / "hf/tokenizer.json").read_text())
    words["model"]["vocab"] |= {"yes": 500, "no": 501}
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(TargetError, match="in a Qwen3ForCausalLM alone"):
        convert(tmp_path / "hf", tmp_path / "o.gguf", as_reranker=True)
    convert(tmp_path / "hf", tmp_path / "plain.gguf")
    for name in ("as_reranker", "allow_approximate"):
        given: Any = {name: True if name == "as_reranker" else ["sliding_window"]}
        with pytest.raises(UsageError, match="a model of its kind"):
            convert(tmp_path / "plain.gguf", tmp_path / "o.gguf", quant="Q8_0", **given)
    assert not (tmp_path / "o.gguf").exists()


ENCODERS = {
    "bert": ("BertForSequenceClassification", vocab_folders.WORDS, {}),
    "xlm_roberta": ("XLMRobertaForSequenceClassification", vocab_folders.FAIRSEQ, {}),
    "roberta": ("RobertaForSequenceClassification", vocab_folders.ROBERTA, {}),
    "modernbert": ("ModernBertForSequenceClassification", vocab_folders.MODERN, {"classifier_pooling": "cls"}),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_score_pairs(kind: str, tmp_path: Path) -> None:
    """The pair as the tokenizer frames it; of BERT with the type of the first text, which the runtime gives to all."""
    import torch
    from tokenizers import Tokenizer

    cls, family, more = ENCODERS[kind]
    hf = tmp_path / "hf"
    model = _build(hf, cls, family, kind, id2label={0: "LABEL_0"}, **more)
    encoder = Tokenizer.from_file(str(hf / "tokenizer.json"))
    expected = []
    for text in TEXTS:
        ids = encoder.encode(QUERY, text).ids
        types = {"token_type_ids": torch.zeros(1, len(ids), dtype=torch.long)} if kind == "bert" else {}
        expected.append(float(_logits(model, ids, **types)[0]))
    report = convert(hf, tmp_path / "o.gguf")
    assert any("type" in note for note in report.notes) == (kind == "bert")
    assert abs(scores(tmp_path / "o.gguf")[0] - expected).max() < zoo.GELU
    convert(tmp_path / "o.gguf", tmp_path / "back", to="hf")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0"}
    assert config["architectures"] == [cls.replace("XLMR", "R")]  # the same model by its older name
