"""Token ids of llama.cpp against those of the tokenizer's own library, for every family and every pre-tokenizer."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

import pytest
from vocab_runtime import tokenized, write_model
from vocab_zoo import Case, families, pre_cases

from adapterkit.gguf.vocab import read_vocab

if TYPE_CHECKING:
    from pathlib import Path


def differences(cases: list[Case], folder: Path) -> dict[str, list[tuple[str, list[int], list[int]]]]:
    """Texts that llama.cpp cuts otherwise, by tokenizer, with both lists of ids."""
    paths = {}
    for number, case in enumerate(cases):
        vocab = read_vocab(case.files, case.config, kind=case.kind, rows=0)
        paths[write_model(folder / f"{number}.gguf", vocab)] = case
    answers = tokenized({path: [(text, case.special) for text in case.texts] for path, case in paths.items()})
    return {
        case.name: [
            (text, case.ids(text), ids)
            for text, ids in zip(case.texts, answers[path], strict=True)
            if case.ids(text) != ids
        ]
        for path, case in paths.items()
    }


def test_families(tmp_path: Path) -> None:
    cases = families()
    assert all(len(case.texts) > 150 for case in cases)
    assert differences(cases, tmp_path) == {case.name: [] for case in cases}


def test_every_pre_tokenizer(tmp_path: Path) -> None:
    cases = pre_cases()
    assert len(cases) > 20
    found = differences(cases, tmp_path)
    # llama.cpp's own expressions for these stand in for ones that it cannot run; the conversion says so.
    for name in ("tekken", "gpt-4o", "kimi-k2"):
        assert all(any(unicodedata.category(c).startswith("M") for c in text) for text, _, _ in found.pop(name))
    assert all(any(c.isdigit() for c in text) for text, _, _ in found.pop("tiny_aya"))
    assert found == {name: [] for name in found}


@pytest.mark.parametrize("pre", ["gpt-2", "qwen2"])
def test_a_wrong_name_is_seen(tmp_path: Path, pre: str) -> None:
    """The comparison can fail: one name for another cuts some of the texts otherwise."""
    case = next(case for case in pre_cases() if case.name == "llama-bpe")
    path = write_model(tmp_path / "wrong.gguf", read_vocab(case.files, {}, kind="bpe", rows=0, pre=pre))
    answers = tokenized({path: [(text, False) for text in case.texts]})[path]
    assert any(case.ids(text) != ids for text, ids in zip(case.texts, answers, strict=True))
