"""WordPiece (``bert`` in GGUF), from ``tokenizer.json`` or ``vocab.txt``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.metadata import Entry, boolean, text
from adapterkit.gguf.vocab.bpe import checked_vocabulary
from adapterkit.gguf.vocab.pretokenizers import steps
from adapterkit.gguf.vocab.sources import TOKENIZER, WORDS, AddedToken
from adapterkit.gguf.vocab.table import CONTROL, MODEL, PRE, SPACE, USER_DEFINED, TokenTable

if TYPE_CHECKING:
    from adapterkit.gguf.vocab.sources import Sources

BERT, DEFAULT = "bert", "default"
LOWERCASE, STRIP_ACCENTS = "tokenizer.ggml.normalizer.lowercase", "tokenizer.ggml.normalizer.strip_accents"
INSIDE = "##"  # marks a piece that does not begin a word
_NAMES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def read(sources: Sources, table: TokenTable, pre: str | None) -> tuple[list[Entry], list[Entry]]:
    """Fill the table; gives the keys before the tokens and those after them.

    GGUF marks the pieces that begin a word, with SentencePiece's space, where BERT marks the others.

    Raises:
        CheckpointError: files missing, or a tokenizer that llama.cpp cannot do.
    """
    vocabulary = _vocabulary(sources)
    for token, number in vocabulary.items():
        table.put(number, token)
    table.add(sources.added.values() if sources.added else _named(vocabulary))
    for number, token in table.texts.items():
        if table.types[number] not in (CONTROL, USER_DEFINED):
            table.texts[number] = token[len(INSIDE) :] if token.startswith(INSIDE) else SPACE + token
    lowercase, accents = _normalizer(sources, table)
    if accents:
        table.notes.append(
            "llama.cpp takes away the vowel signs of Indic scripts with the accents and leaves Hangul whole, this tokenizer not"
        )
    return [text(MODEL, BERT), text(PRE, pre or DEFAULT)], [
        boolean(LOWERCASE, lowercase),
        boolean(STRIP_ACCENTS, accents),
    ]


def _vocabulary(sources: Sources) -> dict[str, int]:
    if TOKENIZER in sources:
        if sources.model_kind != "WordPiece":
            raise CheckpointError(
                f"{TOKENIZER} has a {sources.model_kind}, not a WordPiece", "give the model's own tokenizer"
            )
        prefix = sources.model.get("continuing_subword_prefix", INSIDE)
        if prefix != INSIDE:
            raise CheckpointError(
                f"this WordPiece marks pieces inside a word with {prefix!r}, not {INSIDE!r}", "use another"
            )
        return checked_vocabulary(sources.model.get("vocab"))
    if WORDS not in sources:
        raise CheckpointError(f"no {TOKENIZER} and no {WORDS}", "copy the tokenizer's files beside the weights")
    lines = sources.files[WORDS].decode("utf-8", "replace").split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return {line.rstrip("\r"): number for number, line in enumerate(lines)}


def _named(vocabulary: dict[str, int]) -> list[AddedToken]:
    """The special tokens of a ``vocab.txt``, which does not mark them."""
    return [AddedToken(vocabulary[name], name, special=True) for name in _NAMES if name in vocabulary]


def _normalizer(sources: Sources, table: TokenTable) -> tuple[bool, bool]:
    """``(lowercase, strip_accents)``; None as ``strip_accents`` means "same as lowercase"."""
    lowercase: Any = sources.settings.get("do_lower_case", True)
    accents: Any = sources.settings.get("strip_accents")
    for step in steps(sources.tokenizer.get("normalizer"), "normalizers"):
        kind = step.get("type")
        if kind == "BertNormalizer":
            lowercase, accents = step.get("lowercase", True), step.get("strip_accents")
            if not step.get("handle_chinese_chars", True):
                table.notes.append("llama.cpp cuts Chinese text into characters, this tokenizer does not")
        elif kind == "Lowercase":
            lowercase = True
        elif kind == "StripAccents":
            accents = True
        elif kind not in ("NFD", "NFC"):
            table.notes.append(f"this tokenizer normalizes text ({kind}), llama.cpp does not")
    return bool(lowercase), bool(lowercase if accents is None else accents)
