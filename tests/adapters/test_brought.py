"""One fact, one file: what an adapter brings replaces every form of the same fact that the base has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import plain_adapter, plain_base

import adapterkit

BASE, TRAINED = "BASE {{ messages[0]['content'] }}", "TRAINED {{ messages[0]['content'] }}"


def _word_level(folder: Path, words: str = "ab") -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, **{word: n for n, word in enumerate(words, 3)}}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def _inline(folder: Path, text: str) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": text}))


FORMS = {
    "jinja": lambda folder, text: (folder / "chat_template.jinja").write_text(text),
    "json": lambda folder, text: (folder / "chat_template.json").write_text(json.dumps({"chat_template": text})),
    "inline": _inline,
}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", base)
    for folder in (base, adapter):
        _word_level(folder)
    return base, adapter


@pytest.mark.parametrize("trained", FORMS)
@pytest.mark.parametrize("before", FORMS)
def test_no_form_of_the_base_s_template_is_left(before: str, trained: str, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    FORMS[before](base, BASE)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text(BASE)
    FORMS[trained](adapter, TRAINED)
    out = base.parent / "out"
    adapterkit.merge(base, [adapter], out)
    said = {
        str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file() and f.suffix != ".safetensors"
    }
    assert [name for name, data in said.items() if b"BASE {{" in data] == []
    assert [name for name, data in said.items() if b"TRAINED {{" in data] != []


def test_transformers_reads_the_adapter_s_template(pair: tuple[Path, Path]) -> None:
    from transformers import AutoTokenizer

    base, adapter = pair
    FORMS["jinja"](base, BASE)
    _inline(adapter, TRAINED)
    adapterkit.merge(base, [adapter], base.parent / "out")
    assert AutoTokenizer.from_pretrained(base.parent / "out").chat_template == TRAINED


def test_an_adapter_without_a_template_leaves_the_base_s(pair: tuple[Path, Path]) -> None:
    from transformers import AutoTokenizer

    base, adapter = pair
    _inline(base, BASE)
    adapterkit.merge(base, [adapter], base.parent / "out")
    assert AutoTokenizer.from_pretrained(base.parent / "out").chat_template == BASE


@pytest.mark.parametrize(("words", "left"), [("ab", True), ("abc", False)], ids=["same words", "other words"])
def test_another_vocabulary_replaces_its_other_forms(words: str, left: bool, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    for name in ("tokenizer.model", "vocab.json", "merges.txt"):
        (base / name).write_text("of the base")
    (base / "added_tokens.json").write_text('{"<x>": 9}')
    _word_level(adapter, words)
    report = adapterkit.merge(base, [adapter], base.parent / "out")
    names = {path.name for path in (base.parent / "out").iterdir()}
    assert ("tokenizer.model" in names, "vocab.json" in names, "merges.txt" in names) == (left,) * 3
    assert "added_tokens.json" not in names
    assert any("left out of the base's files" in note and "added_tokens.json" in note for note in report.notes)


def test_processor_and_generation_config_of_the_adapter(pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    (base / "preprocessor_config.json").write_text('{"size": 1}')
    (base / "generation_config.json").write_text('{"temperature": 1.0}')
    FORMS["jinja"](base, BASE)
    (adapter / "processor_config.json").write_text('{"image_processor": {"size": 2}, "chat_template": "TRAINED"}')
    (adapter / "generation_config.json").write_text('{"temperature": 0.5}')
    adapterkit.merge(base, [adapter], base.parent / "out")
    out = base.parent / "out"
    assert not (out / "preprocessor_config.json").exists()
    assert not (out / "chat_template.jinja").exists()
    assert json.loads((out / "processor_config.json").read_text())["image_processor"] == {"size": 2}
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.5


@pytest.mark.parametrize("data", [b"[" * 100_000, b"{", b"[]", b"\xff\xfe"], ids=["nested", "cut", "list", "bytes"])
def test_a_file_that_cannot_be_read_states_nothing(data: bytes, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    FORMS["jinja"](base, BASE)
    (adapter / "tokenizer_config.json").write_bytes(data)
    (adapter / "processor_config.json").write_bytes(data)
    adapterkit.merge(base, [adapter], base.parent / "out")
    assert (base.parent / "out" / "chat_template.jinja").read_text() == BASE
