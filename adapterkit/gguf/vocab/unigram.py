"""Unigram (``t5`` in GGUF), from ``tokenizer.json`` or a SentencePiece model: T5, XLM-RoBERTa and their like."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.errors import CheckpointError
from adapterkit.gguf.metadata import Entry, array, boolean, text
from adapterkit.gguf.reader import U8
from adapterkit.gguf.vocab import proto
from adapterkit.gguf.vocab.sources import TOKENIZER
from adapterkit.gguf.vocab.spaces import spaces
from adapterkit.gguf.vocab.spm import BYTE_TOKEN, PREFIX, file_of
from adapterkit.gguf.vocab.table import (
    BYTE,
    CONTROL,
    MODEL,
    NORMAL,
    PADDING_SCORE,
    PRE,
    UNKNOWN,
    UNUSED,
    TokenTable,
    padding,
)

if TYPE_CHECKING:
    from adapterkit.gguf.vocab.sources import Sources

T5, DEFAULT = "t5", "default"
TRIM, CHARSMAP = "tokenizer.ggml.remove_extra_whitespaces", "tokenizer.ggml.precompiled_charsmap"
# XLM-RoBERTa's ids begin with four of fairseq's; its model file has three others there.
_FAIRSEQ, FAIRSEQ_FILE = (
    (("<s>", CONTROL), ("<pad>", CONTROL), ("</s>", CONTROL), ("<unk>", UNKNOWN)),
    "sentencepiece.bpe.model",
)


def read(sources: Sources, table: TokenTable, pre: str | None) -> tuple[list[Entry], list[Entry]]:
    """Fill the table; gives the keys before the tokens and those after them.

    Raises:
        CheckpointError: files missing, or a tokenizer that llama.cpp cannot do.
    """
    name = file_of(sources)
    if TOKENIZER in sources and sources.model_kind == "Unigram":
        prefix, trim, charsmap = _of_json(sources, table)
    elif name is not None:
        prefix, trim, charsmap = _of_model(sources, name, table)
    else:
        raise CheckpointError(
            "no tokenizer.json with a unigram model and no SentencePiece model", "copy the tokenizer's files"
        )
    after = [boolean(PREFIX, prefix), boolean(TRIM, trim)]
    if charsmap:
        after.append(array(CHARSMAP, U8, charsmap))
    return [text(MODEL, T5), text(PRE, pre or DEFAULT)], after


def _of_json(sources: Sources, table: TokenTable) -> tuple[bool, bool, bytes]:
    vocabulary = sources.model.get("vocab")
    if not isinstance(vocabulary, list) or not vocabulary:
        raise CheckpointError(f"the model of {TOKENIZER} has no vocabulary", "copy the tokenizer's files again")
    unknown = sources.model.get("unk_id")
    for number, pair in enumerate(vocabulary):
        try:
            token, score = str(pair[0]), float(pair[1])
        except (TypeError, ValueError, IndexError):
            message = f"token {number} of {TOKENIZER} is {str(pair)[:60]}, not a text and a score"
            raise CheckpointError(message, "copy the tokenizer's files again") from None
        kind = UNKNOWN if number == unknown else NORMAL
        if sources.model.get("byte_fallback") and BYTE_TOKEN.fullmatch(token):
            kind = BYTE
        if score == PADDING_SCORE and token == padding(number):
            kind = UNUSED
        table.put(number, token, kind, score)
    scores = dict(table.scores)
    table.add(token for token in sources.added.values() if token.id != unknown)
    for number, score in scores.items():
        table.scores[number] = score
    stated = spaces(sources.tokenizer)
    for step in stated.others:
        table.notes.append(f"this tokenizer normalizes text ({step}), llama.cpp does not")
    if stated.prefix and not stated.each:
        table.notes.append(
            "llama.cpp puts a space after special tokens too, this tokenizer only at the start of a text"
        )
    if stated.trim != stated.ends:
        table.notes.append(
            "llama.cpp takes away spaces at the ends with runs of them; this tokenizer does one of the two"
        )
    return stated.prefix, stated.trim, stated.charsmap


def _of_model(sources: Sources, name: str, table: TokenTable) -> tuple[bool, bool, bytes]:
    model = proto.parse(sources.files[name], name)
    if model.kind != proto.UNIGRAM:
        raise CheckpointError(
            f"{name} is a BPE model, and this architecture is known with a unigram", "give its own tokenizer"
        )
    pieces = [(piece.text, piece.type, piece.score) for piece in model.pieces]
    if name == FAIRSEQ_FILE:
        pieces = [(token, kind, 0.0) for token, kind in _FAIRSEQ] + pieces[len(_FAIRSEQ) - 1 :]
        pieces.append(("<mask>", CONTROL, 0.0))
    for number, (token, kind, score) in enumerate(pieces):
        table.put(number, token, kind, score)
    table.add(sources.added.values())
    return model.prefix, model.trim, model.charsmap
