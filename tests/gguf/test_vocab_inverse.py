"""From GGUF back to a tokenizer's files: they cut text as before, and become the same key-values again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from awkward import awkward
from test_vocab import gpt2, packed
from vocab_runtime import write_model
from vocab_zoo import Case, families, pre_cases

from adapterkit.errors import CheckpointError
from adapterkit.gguf.checkpoint import open_gguf
from adapterkit.gguf.metadata import text
from adapterkit.gguf.reader import GGUFHeader
from adapterkit.gguf.vocab import Vocab, pretokenizers, read_vocab, tokenizer_files
from adapterkit.gguf.vocab.table import MODEL, PRE

if TYPE_CHECKING:
    from pathlib import Path

FAMILIES = (
    "framed",
    "spm-model",
    "spm-json",
    "plain-bpe",
    "wordpiece-uncased",
    "wordpiece-cased",
    "unigram-model",
    "unigram-json",
)


def header_of(vocab: Vocab, folder: Path) -> GGUFHeader:
    return open_gguf(write_model(folder / "model.gguf", vocab)).header


def again(files: dict[str, bytes], vocab: Vocab, config: Any) -> Vocab:
    return read_vocab(files, config, kind="auto", rows=vocab.size)


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {case.name: case for case in families()}


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name: str, cases: dict[str, Case], tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    case = cases[name]
    settings = {"chat_template": [{"name": "default", "template": "{{ a }}\n"}, {"name": "rag", "template": "{{ b }}"}]}
    files = {**case.files, "tokenizer_config.json": json.dumps(settings).encode()}
    size = read_vocab(files, case.config, kind="auto", rows=0).size
    vocab = read_vocab(files, case.config, kind="auto", rows=size + 7)
    back = tokenizer_files(header_of(vocab, tmp_path))
    assert [one.data for one in again(back, vocab, case.config).entries] == [one.data for one in vocab.entries]
    tokenizer = Tokenizer.from_str(back["tokenizer.json"].decode())
    for said in case.texts:
        if said.strip() or not name.startswith("unigram"):
            got = tokenizer.encode(said, add_special_tokens=case.special)
            assert list(got.ids) == case.ids(said), said


@pytest.mark.parametrize("name", ["llama-bpe", "deepseek-v3", "falcon", "bloom", "tekken"])
def test_pre_tokenizers_there_and_back(name: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    case = next(case for case in pre_cases() if case.name == name)
    vocab = read_vocab(case.files, {}, kind="bpe", rows=0)
    back = tokenizer_files(header_of(vocab, tmp_path))
    assert again(back, vocab, {}).entries == vocab.entries
    tokenizer = Tokenizer.from_str(back["tokenizer.json"].decode())
    assert all(list(tokenizer.encode(said).ids) == case.ids(said) for said in case.texts)


def test_names_that_mean_the_same_stay(tmp_path: Path) -> None:
    """Which of several equal names a file has is not seen in its regexes."""
    base = read_vocab(packed(gpt2()), {}, kind="bpe", rows=0)
    for name in sorted({row.name for row in pretokenizers.ROWS} | set(pretokenizers.SAME)):
        row = pretokenizers.row_of(name)
        assert row is not None
        entries = tuple(text(PRE, name) if one.key == PRE else one for one in base.entries)
        back = tokenizer_files(header_of(Vocab(entries, base.size), tmp_path))
        found = again(back, base, {"model_type": "gpt2"})
        kept = next(one for one in found.entries if one.key == PRE)
        assert kept == text(PRE, name), name


def test_transformers_reads_the_files(cases: dict[str, Case], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name in ("framed", "spm-json", "wordpiece-uncased", "unigram-json"):
        case = cases[name]
        settings = {"chat_template": "{% for m in messages %}[{{ m.content }}]{% endfor %}"}
        vocab = read_vocab(
            {**case.files, "tokenizer_config.json": json.dumps(settings).encode()}, {}, kind="auto", rows=0
        )
        folder = tmp_path / name
        folder.mkdir()
        for path, data in tokenizer_files(header_of(vocab, tmp_path)).items():
            (folder / path).write_bytes(data)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        tokenizer = AutoTokenizer.from_pretrained(folder)
        for said in ("Hello world", "I've 123 🙂", "a  b\n"):
            assert tokenizer(said)["input_ids"] == case.ids(said)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "[hi]"


def test_holes_and_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    data = gpt2()
    top = max(data["model"]["vocab"].values())
    data["added_tokens"].append({"id": top + 40, "content": "<far>", "special": True})
    vocab = read_vocab(packed(data), {}, kind="bpe", rows=top + 64)
    back = tokenizer_files(header_of(vocab, tmp_path))
    tokenizer = Tokenizer.from_str(back["tokenizer.json"].decode())
    assert tokenizer.encode("a<far>").ids[-1] == top + 40
    assert again(back, vocab, {}).entries == vocab.entries


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (MODEL, "rwkv", "a tokenizer 'rwkv' cannot be written"),
        (PRE, "youtu", "'youtu' would be written"),
        ("tokenizer.ggml.tokens", "", "no list of tokens"),
        ("tokenizer.ggml.token_type", "", "not as many in tokenizer.ggml.token_type"),
    ],
)
def test_refused(key: str, value: str, says: str, tmp_path: Path) -> None:
    vocab = read_vocab(packed(gpt2()), {}, kind="bpe", rows=0)
    entries = tuple(text(key, value) if one.key == key else one for one in vocab.entries)
    with pytest.raises(CheckpointError, match=says):
        tokenizer_files(header_of(Vocab(entries, vocab.size), tmp_path))


def test_no_tokenizer(tmp_path: Path) -> None:
    assert tokenizer_files(header_of(read_vocab({}, {}, kind="none", rows=8), tmp_path)) == {}


def test_the_texts_are_two_hundred() -> None:
    assert len(set(awkward())) == 200
