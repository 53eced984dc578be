"""Tokenizers as key-values: what is written, what is recognised, and what is refused."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from vocab_runtime import values
from vocab_zoo import byte_level, framed_bpe, sentencepiece_case, sentencepiece_model, spm_json, unigram, wordpiece

from adapterkit.errors import AdapterkitError, CheckpointError, UsageError
from adapterkit.gguf.vocab import pretokenizers, proto, read_vocab
from adapterkit.gguf.vocab.sources import Sources
from adapterkit.gguf.vocab.special import special_tokens

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def keys(files: dict[str, bytes], config: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """The key-values of a tokenizer without their common beginning."""
    asked = {"kind": "auto", "rows": 0} | more
    found = values(read_vocab(files, config or {}, **asked).entries)
    return {key.removeprefix("tokenizer.ggml."): value for key, value in found.items()}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@cache
def trained() -> str:
    return str(byte_level(BYTES | {"use_regex": True}, size=300).to_str())


def gpt2(**changes: Any) -> dict[str, Any]:
    """The ``tokenizer.json`` of a small byte-level BPE, with parts of it replaced."""
    return json.loads(trained()) | changes


def packed(data: dict[str, Any], **others: Any) -> dict[str, bytes]:
    named = {name.replace("__", "."): value for name, value in others.items()}
    return {"tokenizer.json": json.dumps(data).encode(), **{k: json.dumps(v).encode() for k, v in named.items()}}


# ------------------------------------------------------------------ what is written


def test_byte_level_bpe() -> None:
    found = keys(packed(gpt2(), tokenizer_config__json={"eos_token": "<|end|>", "pad_token": "<|tool|>"}), rows=320)
    data = gpt2()
    assert found["model"] == "gpt2"
    assert found["pre"] == "gpt-2"
    assert len(found["tokens"]) == len(found["token_type"]) == 320
    ids = {token["content"]: token["id"] for token in data["added_tokens"]}
    assert {found["token_type"][ids[name]] for name in ("<|start|>", "<|end|>", "<|tool|>")} == {3}
    assert {found["token_type"][ids[name]] for name in ("quickfox", "    ")} == {4}
    assert found["tokens"][319] == "[PAD319]"
    assert found["token_type"][319] == 5
    assert found["merges"] == [" ".join(pair) for pair in data["model"]["merges"]]
    assert (found["eos_token_id"], found["padding_token_id"]) == (ids["<|end|>"], ids["<|tool|>"])
    assert (found["add_bos_token"], found["add_eos_token"]) == (False, False)
    assert "scores" not in found


def test_merges_with_spaces_in_them() -> None:
    data = gpt2()
    data["model"]["vocab"]["a b"] = 290
    data["model"]["merges"].append(["a ", "b"])
    assert keys(packed(data), rows=300)["merges"][-1] == "aĠ b"


def test_sentencepiece_model_piece_for_piece() -> None:
    model = proto.parse(sentencepiece_model("bpe"), "model")
    found = keys({"tokenizer.model": sentencepiece_model("bpe")}, rows=len(model.pieces) + 5)
    assert found["model"] == "llama"
    assert found["pre"] == "default"
    assert found["tokens"][: len(model.pieces)] == [piece.text for piece in model.pieces]
    assert found["scores"][: len(model.pieces)] == [piece.score for piece in model.pieces]
    assert found["token_type"][:3] == [2, 3, 3]
    assert found["token_type"][3:259] == [6] * 256
    assert found["scores"][-1] == -10000
    assert found["add_space_prefix"] is True


def test_scores_of_a_json_are_in_the_order_of_the_model_it_was_made_of() -> None:
    of_model = keys({"tokenizer.model": sentencepiece_model("bpe")})
    of_json = keys(dict(spm_json().files))
    assert of_json["model"] == "llama"
    assert of_json["tokens"] == of_model["tokens"]
    made = {
        number for number, score in enumerate(of_json["scores"]) if score < 0 and of_json["token_type"][number] == 1
    }
    joined = [n for n in sorted(made, key=lambda n: -of_json["scores"][n]) if len(of_json["tokens"][n]) > 1]
    assert joined == sorted(joined, key=lambda n: -of_model["scores"][n])


def test_the_own_reader_of_sentencepiece_files() -> None:
    import sentencepiece

    for kind in ("bpe", "unigram"):
        data = sentencepiece_model(kind)
        theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
        model = proto.parse(data, kind)
        assert [p.text for p in model.pieces] == [theirs.id_to_piece(n) for n in range(theirs.vocab_size())]
        assert [p.score for p in model.pieces] == [theirs.get_score(n) for n in range(theirs.vocab_size())]
        assert [p.type == 3 for p in model.pieces] == [theirs.is_control(n) for n in range(theirs.vocab_size())]
        assert bool(model.charsmap) == (kind == "unigram")
        again = proto.serialize(model, {"unk": 0, "bos": 1, "eos": 2})
        assert proto.parse(again, kind) == model
        back = sentencepiece.SentencePieceProcessor(model_proto=again)
        assert back.encode("Hello  wörld 🙂") == theirs.encode("Hello  wörld 🙂")


def test_wordpiece_marks_beginnings() -> None:
    case = wordpiece(lowercase=True)
    found = keys(dict(case.files), {"type_vocab_size": 2})
    vocabulary = json.loads(case.files["tokenizer.json"])["model"]["vocab"]
    assert found["model"] == "bert"
    assert found["tokens"][vocabulary["the"]] == "▁the"
    inside = next(token for token in vocabulary if token.startswith("##"))
    assert found["tokens"][vocabulary[inside]] == inside[2:]
    assert found["tokens"][:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert found["token_type_count"] == 2
    assert (found["cls_token_id"], found["bos_token_id"], found["seperator_token_id"]) == (2, 2, 3)
    assert found["normalizer.lowercase"] is True


def test_vocab_txt_alone_says_the_same() -> None:
    case = wordpiece(lowercase=False)
    vocabulary = json.loads(case.files["tokenizer.json"])["model"]["vocab"]
    lines = "".join(f"{token}\n" for token in sorted(vocabulary, key=vocabulary.__getitem__))
    settings = json.dumps({"do_lower_case": False}).encode()
    alone = keys({"vocab.txt": lines.encode(), "tokenizer_config.json": settings})
    whole = keys(dict(case.files))
    assert alone | {"add_bos_token": 0, "add_eos_token": 0, "add_sep_token": 0} == whole | {
        "add_bos_token": 0,
        "add_eos_token": 0,
        "add_sep_token": 0,
    }


def test_unigram() -> None:
    case = unigram()
    found = keys(dict(case.files))
    model = json.loads(case.files["tokenizer.json"])["model"]
    assert found["model"] == "t5"
    assert found["scores"] == pytest.approx([score for _, score in model["vocab"]])
    assert found["token_type"][:4] == [3, 3, 2, 3]
    assert bytes(found["precompiled_charsmap"]) == proto.parse(sentencepiece_model("unigram"), "m").charsmap
    assert (found["add_eos_token"], found["remove_extra_whitespaces"], found["unknown_token_id"]) == (True, True, 2)


def test_none() -> None:
    assert keys({}, kind="none", rows=7) == {"model": "none"}
    assert read_vocab({}, {}, kind="none", rows=7).size == 7


@pytest.mark.parametrize("name", ["framed", "spm", "wordpiece", "unigram", "gpt2", "turns"])
def test_special_tokens_are_those_of_ggufs_own_reader(name: str, tmp_path: Path) -> None:
    from gguf import SpecialVocab

    settings: dict[str, Any] = {"add_bos_token": True, "chat_template": "{{ messages }}"}
    if name == "framed":
        files = dict(framed_bpe().files)
        settings |= {"bos_token": "<|start|>", "eos_token": {"content": "<|end|>", "lstrip": False}}
    elif name == "turns":
        data = gpt2()
        data["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|tool|>"}}],
            "pair": [],
        }
        files = packed(data)
        settings |= {"eos_token": "<|end|>"}
    elif name == "spm":
        files = dict(spm_json().files)
        settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    elif name == "wordpiece":
        files = dict(wordpiece(lowercase=True).files)
        settings = {f"{r}_token": f"[{r.upper()}]" for r in ("cls", "sep", "pad", "unk", "mask")}
    elif name == "unigram":
        files = dict(unigram().files)
        settings |= {"eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": False}
    else:
        files = packed(gpt2())
        settings |= {"eos_token": "<|end|>", "add_bos_token": False}
    config = {"pad_token_id": 0, "eos_token_id": 1}
    files["tokenizer_config.json"] = json.dumps(settings).encode()
    for file, data_ in {**files, "config.json": json.dumps(config).encode()}.items():
        (tmp_path / file).write_bytes(data_)
    theirs = SpecialVocab(tmp_path)
    added = {token["content"]: token["id"] for token in json.loads(files["tokenizer.json"])["added_tokens"]}
    ours = special_tokens(Sources(files, config), added)
    assert ours.ids == theirs.special_token_ids
    assert ours.adds == {role: theirs.add_special_token[role] for role in theirs.add_special_token}


# ------------------------------------------------------------------ what is recognised


@pytest.mark.parametrize("row", pretokenizers.ROWS, ids=lambda row: row.name)
def test_a_row_is_recognised_whatever_was_added(row: pretokenizers.Pre) -> None:
    data = gpt2(pre_tokenizer=pretokenizers.as_json(row))
    data["model"]["ignore_merges"] = row.ignore_merges
    top = max(data["model"]["vocab"].values()) + 10
    data["added_tokens"].append({"id": top, "content": "<new>", "special": True})
    model_type = row.models[0] if row.models else "other"
    name = keys(packed(data), {"model_type": model_type})["pre"]
    theirs = next(one for one in pretokenizers.ROWS if one.name == name)
    assert [*map(pretokenizers.canonical, theirs.regexes)] == [*map(pretokenizers.canonical, row.regexes)] or (
        name == row.name
    )
    if row.models:
        assert name == row.name


@pytest.mark.parametrize(
    "pattern",
    [
        # As in Qwen2, Qwen 1's list for tiktoken, and llama.cpp's own adaption.
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]+|\s+(?!\S)",
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)",
    ],
)
@pytest.mark.parametrize(("behavior", "invert"), [("Isolated", False), ("Removed", True)])
def test_spellings_of_one_expression(pattern: str, behavior: str, invert: bool) -> None:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    steps = {"type": "Sequence", "pretokenizers": [split, BYTES]}
    assert keys(packed(gpt2(pre_tokenizer=steps)), {"model_type": "llama"})["pre"] == "qwen2"


def _split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


DIGITS, USES_REGEX = {"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+"
    "[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
# Steps of published tokenizers: the name that llama.cpp's table of hashes gives to the model.
PUBLISHED: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "meta-llama/Llama-3.2-1B": ("llama", "llama-bpe", [_split(LLAMA3), BYTES]),
    "ibm-granite/granite-4.1-3b": ("granitemoehybrid", "dbrx", [_split(LLAMA3, "Removed", True), BYTES]),
    "openai/gpt-oss-20b": ("gpt_oss", "gpt-4o", [_split(O200K), BYTES]),
    "MiniMaxAI/MiniMax-M2": ("minimax_m2", "minimax-m2", [_split(O200K, "Removed", True), BYTES]),
    "HuggingFaceTB/SmolLM2-135M": ("llama", "smollm", [DIGITS, USES_REGEX]),
    "bigcode/starcoder2-3b": ("starcoder2", "starcoder", [DIGITS, USES_REGEX]),
    "deepseek-ai/DeepSeek-V3": (
        "deepseek_v3",
        "deepseek-v3",
        [_split(r"\p{N}{1,3}"), _split("[一-龥\u3040-ゟ゠-ヿ]+"), _split(DEEPSEEK3), BYTES],
    ),
    "bigscience/bloomz-560m": ("bloom", "bloom", [_split(" ?[^(\\s|[.,!?…。，、।۔،])]+"), BYTES]),
    "tiiuae/falcon-7b": (
        "falcon",
        "falcon",
        [
            {"type": "Punctuation", "behavior": "Contiguous"},
            USES_REGEX,
            {"type": "Digits", "individual_digits": False},
            _split("[0-9][0-9][0-9]"),
        ],
    ),
    "deepseek-ai/deepseek-coder-6.7b": (
        "llama",
        "deepseek-coder",
        [_split("[\r\n]"), _split(r"\s?\p{L}+"), _split(r"\s?\p{P}+"), _split("[一-龥ࠀ-一가-퟿]+"), DIGITS, BYTES],
    ),
    "GSAI-ML/LLaDA-8B": (
        "llada",
        "bailingmoe",
        [
            _split(
                r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
            ),
            BYTES,
        ],
    ),
}


@pytest.mark.parametrize("published", PUBLISHED)
def test_published_tokenizers(published: str) -> None:
    model_type, name, steps = PUBLISHED[published]
    data = gpt2(pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    data["model"]["ignore_merges"] = name == "llama-bpe"
    assert keys(packed(data), {"model_type": model_type})["pre"] == name


def test_ends_of_turns_that_only_the_generation_config_names() -> None:
    data = gpt2()
    for place, text in enumerate(("<|myend|>", "<|eot_id|>")):
        data["added_tokens"].append({"id": 310 + place, "content": text, "special": True})
    files = packed(
        data, tokenizer_config__json={"eos_token": "<|end|>"}, generation_config__json={"eos_token_id": [1, 310, 311]}
    )
    found = keys(files, rows=312)
    assert found["eos_token_id"] == 1
    assert found["eot_token_id"] == 310  # llama.cpp knows the other by its text


# ------------------------------------------------------------------ what is refused


def other_split(pattern: str = r"\w+|\W") -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTES]}


def _odd_step() -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [{"type": "CharDelimiterSplit", "delimiter": "x"}, BYTES]}


def _model(**changes: Any) -> dict[str, Any]:
    return gpt2(model=gpt2()["model"] | changes)


def _renamed() -> dict[str, Any]:
    return {"added_tokens_decoder": {"1": {"content": "<other>"}}}


REFUSED: dict[str, tuple[Callable[[], dict[str, bytes]], str]] = {
    "nothing": (dict, "no tokenizer files"),
    "pre": (
        lambda: packed(gpt2(pre_tokenizer=other_split())),
        r"splits by \\w\+\|\\W; the nearest is \S+, which .*pre=",
    ),
    "step": (lambda: packed(gpt2(pre_tokenizer=_odd_step())), "CharDelimiterSplit"),
    "normalizer": (lambda: packed(gpt2(normalizer={"type": "Lowercase"})), "Lowercase"),
    "not_json": (lambda: {"tokenizer.json": b"{"}, "tokenizer.json is not valid JSON"),
    "not_an_object": (lambda: {"tokenizer.json": b"[]"}, "holds a list"),
    "no_model": (lambda: {"tokenizer.json": b"{}"}, "has no model"),
    "no_vocab": (lambda: packed(gpt2(model={"type": "BPE", "merges": []})), "has no vocabulary"),
    "word_level": (lambda: packed(gpt2(model={"type": "WordLevel", "vocab": {"a": 0}})), "WordLevel"),
    "two_names": (lambda: packed(gpt2(), tokenizer_config__json=_renamed()), "token 1"),
    "two_ids": (lambda: packed(gpt2(), added_tokens__json={"<|end|>": 7}), "keep the files of one"),
    "suffix": (lambda: packed(_model(end_of_word_suffix="</w>")), "end_of_word_suffix"),
    "merge": (lambda: packed(_model(merges=[["a"]])), "merge"),
    "merges_missing": (lambda: {"vocab.json": b'{"a": 0}'}, "merges.txt"),
    "class": (lambda: {"vocab.json": b'{"a": 0}', "merges.txt": b""}, "pre="),
    "tiktoken": (lambda: {"tokenizer.model": b"IQ== 0\nIg== 1\n"}, "no SentencePiece model"),
    "cut": (lambda: {"tokenizer.model": sentencepiece_model("bpe")[:5000]}, "no SentencePiece model"),
    "template": (
        lambda: packed(gpt2(), tokenizer_config__json={"chat_template": "{% for a %}"}),
        "does not parse: line 1",
    ),
    "contradiction": (
        lambda: {**packed(gpt2()), "tokenizer.model": sentencepiece_model("bpe")},
        "keep the files of one",
    ),
    "tekken": (lambda: {"tekken.json": b'{"config": {}, "vocab": []}'}, "tekken.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence(name: str) -> None:
    files, says = REFUSED[name]
    with pytest.raises(CheckpointError, match=says) as caught:
        keys(files())
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_more_tokens_than_rows() -> None:
    with pytest.raises(CheckpointError, match="303 tokens and the embedding 100 rows"):
        keys(packed(gpt2()), rows=100)


def test_another_family_than_the_architectures() -> None:
    with pytest.raises(CheckpointError, match="the tokenizer is a bpe, and this architecture has a unigram"):
        keys(packed(gpt2()), kind="unigram")


def test_a_pre_tokenizer_by_name() -> None:
    files = packed(gpt2(pre_tokenizer=other_split()))
    assert keys(files, pre="qwen2")["pre"] == "qwen2"
    with pytest.raises(UsageError, match="'qwen-2' is no pre-tokenizer"):
        keys(files, pre="qwen-2")


def test_added_tokens_beyond_the_embedding_are_left_out_and_named() -> None:
    data = gpt2()
    data["added_tokens"].append({"id": 305, "content": "[PAD]", "special": True})
    vocab = read_vocab(packed(data, tokenizer_config__json={"pad_token": "[PAD]"}), {}, kind="bpe", rows=303)
    found = values(vocab.entries)
    assert vocab.size == 303
    assert "[PAD]" not in found["tokenizer.ggml.tokens"]
    assert "tokenizer.ggml.padding_token_id" not in found
    assert any("'[PAD]' left out" in note for note in vocab.notes)


NOTED: dict[str, tuple[dict[str, Any], str]] = {
    "nfc": ({"normalizer": {"type": "NFC"}}, "to NFC first"),
    "prefix": ({"pre_tokenizer": BYTES | {"use_regex": True, "add_prefix_space": True}}, "a space before the text"),
    "greedy": (
        {"added_tokens": [{"id": 305, "content": "<m>", "special": True, "lstrip": True}]},
        "'<m>' take away the spaces",
    ),
}


@pytest.mark.parametrize("name", NOTED)
def test_what_llama_cpp_does_otherwise_is_said(name: str) -> None:
    changes, says = NOTED[name]
    assert any(says in note for note in read_vocab(packed(gpt2(**changes)), {}, kind="bpe", rows=0).notes)
    assert read_vocab(packed(gpt2()), {}, kind="bpe", rows=0).notes == ()


def test_merges_that_sentencepiece_would_not_make() -> None:
    data = json.loads(spm_json().files["tokenizer.json"])
    data["model"]["merges"] = data["model"]["merges"][::2]
    with pytest.raises(CheckpointError, match="not one that SentencePiece makes"):
        keys(packed(data))
    assert keys(packed(data), pre="default")["model"] == "llama"


def test_a_chat_template_that_is_several() -> None:
    several = [
        {"name": "default", "template": "{{ a }}"},
        {"name": "tool use", "template": "{% generation %}{% endgeneration %}"},
    ]
    found = keys(packed(gpt2(), tokenizer_config__json={"chat_template": several}))
    assert found["tokenizer.chat_template"] == "{{ a }}"
    assert found["tokenizer.chat_templates"] == ["tool_use"]
    assert found["tokenizer.chat_template.tool_use"].startswith("{% generation %}")
    files = {**packed(gpt2()), "chat_template.jinja": b"{{ b }}", "additional_chat_templates/rag.jinja": b"{{ c }}"}
    found = keys(files)
    assert (found["tokenizer.chat_template"], found["tokenizer.chat_template.rag"]) == ("{{ b }}", "{{ c }}")


def test_damaged_bytes_never_end_in_anything_else(tmp_path: Path) -> None:
    import random

    chance = random.Random(3)
    whole = {"tokenizer.model": sentencepiece_model("bpe"), "tokenizer.json": unigram().files["tokenizer.json"]}
    case = sentencepiece_case("m", "tokenizer.model", whole["tokenizer.model"])
    assert keys(dict(case.files))
    for name, data in whole.items():
        for _ in range(60):
            broken = bytearray(data)
            for _ in range(chance.randint(1, 4)):
                broken[chance.randrange(len(broken))] = chance.randrange(256)
            with suppress(AdapterkitError):
                keys({name: bytes(broken[: chance.randrange(1, len(broken) + 1)])})
