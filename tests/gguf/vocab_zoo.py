"""Small tokenizers of every family, trained here, with the texts that they and llama.cpp must cut alike."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from awkward import awkward

from adapterkit.gguf.vocab import pretokenizers, proto

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SPECIALS = ["<|start|>", "<|end|>", "<|tool|>"]
MARKED = [
    "<|start|>hello<|end|>",
    "a<|end|><|end|> b",
    " <|tool|> ",
    "<|start|>\n\n<|end|>\n",
    "x<|en|>y <|end",
    "1<|end|>2",
]


@dataclass(frozen=True)
class Case:
    """A tokenizer's files, and what it makes of texts.

    Attributes:
        ids: of a text, by the tokenizer's own library.
        special: whether ids have what the tokenizer puts around a text.
    """

    name: str
    files: Mapping[str, bytes]
    ids: Callable[[str], list[int]]
    texts: tuple[str, ...]
    special: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    kind: str = "auto"


@cache
def corpus() -> tuple[str, ...]:
    said = "the quick brown fox jumps over a lazy dog while numbers and letters make merges worth their place"
    words = said.split()
    lines = [" ".join(words[i % 17 : i % 17 + 6]) + f" {i} {i * i}.{i % 7}!" for i in range(160)]
    code = [f"def f{i}(x, y={i}):\n    return x[{i}] + y  # it's {i}\n" for i in range(40)]
    return (*awkward(), *lines, *code)


def _from_json(tokenizer: Any) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer.encode(text).ids)


def _case(name: str, tokenizer: Any, texts: tuple[str, ...], **more: Any) -> Case:
    return Case(name, {"tokenizer.json": tokenizer.to_str().encode()}, _from_json(tokenizer), texts, **more)


def byte_level(pre_tokenizer: Mapping[str, Any], *, ignore_merges: bool = False, size: int = 800) -> Any:
    """A byte-level BPE with this pre-tokenizer, trained on the corpus."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    data = json.loads(Tokenizer(models.BPE()).to_str())
    data["pre_tokenizer"] = pre_tokenizer
    data["model"]["ignore_merges"] = ignore_merges
    tokenizer = Tokenizer.from_str(json.dumps(data))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=SPECIALS[:2], show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([SPECIALS[2]])
    tokenizer.add_tokens([AddedToken("quickfox", normalized=False), AddedToken("    ", normalized=False)])
    return tokenizer


@cache
def pre_cases() -> list[Case]:
    """One byte-level BPE for each list of regexes that llama.cpp knows."""
    found: dict[tuple[str, ...], Case] = {}
    for row in pretokenizers.ROWS:
        key = tuple(map(pretokenizers.canonical, row.regexes))
        if key not in found:
            tokenizer = byte_level(pretokenizers.as_json(row), ignore_merges=row.ignore_merges)
            texts = (*awkward(), *MARKED, "a quickfox  ran", "x    y     z")
            found[key] = _case(row.name, tokenizer, texts)
    return list(found.values())


def framed_bpe() -> Case:
    """Llama 3's manner: a token is put before each text."""
    from tokenizers import processors

    row = next(row for row in pretokenizers.ROWS if row.name == "llama-bpe")
    tokenizer = byte_level(pretokenizers.as_json(row), ignore_merges=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", pair="<|start|> $A <|start|> $B:1", special_tokens=[("<|start|>", 0)]
    )
    return _case("framed", tokenizer, (*awkward(), *MARKED), special=True)


@cache
def sentencepiece_model(kind: str) -> bytes:
    import sentencepiece

    own: dict[str, Any] = {"vocab_size": 1100}
    if kind == "bpe":
        own |= {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
        own |= {"split_digits": True, "allow_whitespace_only_pieces": True}
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for text in corpus() if text.strip()),
        model_writer=written,
        model_type=kind,
        character_coverage=0.98,
        hard_vocab_limit=False,
        minloglevel=2,
        **own,
    )
    return written.getvalue()


def sentencepiece_case(name: str, file: str, model: bytes) -> Case:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = untied() if file == "spiece.model" else tuple(awkward())
    return Case(name, {file: model}, lambda text: list(processor.encode(text)), texts)


def spm_json(trained: bytes | None = None, names: tuple[str, str, str] = ("<unk>", "<s>", "</s>")) -> Case:
    """A SentencePiece BPE as transformers converts it: all pairs as merges, in the order of scores."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    model = proto.parse(trained or sentencepiece_model("bpe"), "model")
    ids = {piece.text: number for number, piece in enumerate(model.pieces)}
    merges = []
    for piece in sorted((p for p in model.pieces if p.type == 1), key=lambda piece: -piece.score):
        ways = [(piece.text[:at], piece.text[at:]) for at in range(1, len(piece.text))]
        merges += sorted((w for w in ways if w[0] in ids and w[1] in ids), key=lambda w: (ids[w[0]], ids[w[1]]))
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=names[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    first = names[1]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first} $B:1", special_tokens=[(first, ids[first])]
    )
    texts = (*(text for text in awkward() if text), "<s>a </s> b", "x</s>", "</s>\n")
    return _case("spm-json", tokenizer, texts, special=True)


def plain_bpe() -> Case:
    """A BPE over plain text with byte tokens that was trained as such: its merges are not SentencePiece's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=specials, show_progress=False, max_token_length=12)
    tokenizer.train_from_iterator((part for text in corpus() for part in text.split("\n")), trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:3]  # bytes are not found in the text
    made = Tokenizer.from_str(json.dumps(data))
    return _case("plain-bpe", made, (*awkward(), "<s>a </s> b"))


def wordpiece(lowercase: bool) -> Case:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        corpus(), trainers.WordPieceTrainer(vocab_size=1500, special_tokens=names, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    texts = tuple(text for text in (*awkward(), "a [MASK] b") if not (_spacing_mark_or_hangul(text) or "\x85" in text))
    return _case(f"wordpiece-{'un' if lowercase else ''}cased", tokenizer, texts, special=True)


def _spacing_mark_or_hangul(text: str) -> bool:
    """llama.cpp's own way with these is noted where such a tokenizer is converted."""
    return any(unicodedata.category(c) == "Mc" or "\uac00" <= c <= "\ud7a3" for c in text)


def untied() -> tuple[str, ...]:
    """Texts without runs: of "a" + "aa" and "aa" + "a" with equal sums, rounding alone chooses one."""
    return tuple(text for text in awkward() if re.search(r"([^ ]+?)\1\1", text) is None)


def unigram() -> Case:
    """T5's manner: a character map, runs of spaces, a token after each text."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    charsmap = proto.parse(sentencepiece_model("unigram"), "model").charsmap
    tokenizer = Tokenizer(models.Unigram())
    runs = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap), *runs])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    names = ["<pad>", "</s>", "<unk>", "<extra_id_0>"]
    trainer = trainers.UnigramTrainer(vocab_size=900, unk_token="<unk>", special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return _case("unigram-json", tokenizer, untied(), special=True)


def families() -> list[Case]:
    return [
        framed_bpe(),
        sentencepiece_case("spm-model", "tokenizer.model", sentencepiece_model("bpe")),
        spm_json(),
        plain_bpe(),
        wordpiece(lowercase=True),
        wordpiece(lowercase=False),
        sentencepiece_case("unigram-model", "spiece.model", sentencepiece_model("unigram")),
        unigram(),
    ]
