"""SentencePiece BPE (``llama`` in GGUF), from ``tokenizer.model`` or from a ``tokenizer.json`` that was made of one.

llama.cpp joins the two neighbours whose union has the best score. A list of merges says the same if it has every pair
that makes a token, all pairs of a token together; their order is then the tokens' order, from which come the scores.
"""

from __future__ import annotations

import re
from itertools import groupby
from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError, option
from adapterkit.gguf.metadata import Entry, array, boolean, text
from adapterkit.gguf.reader import STRING
from adapterkit.gguf.vocab import proto
from adapterkit.gguf.vocab.bpe import GPT2, checked_vocabulary, joined
from adapterkit.gguf.vocab.sources import SENTENCEPIECE, TOKENIZER
from adapterkit.gguf.vocab.spaces import Spaces, spaces
from adapterkit.gguf.vocab.table import (
    ADDED_SCORE,
    BYTE,
    MERGES,
    MODEL,
    NORMAL,
    PRE,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    TokenTable,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.gguf.vocab.sources import Sources

LLAMA, GEMMA4, DEFAULT, PREFIX = "llama", "gemma4", "default", "tokenizer.ggml.add_space_prefix"
_GEMMA4 = frozenset(("gemma4", "gemma4_text"))  # their tokenizer has a kind of its own in llama.cpp
# Of these, what runs of a chat are told apart by: shown as text although they are special.
_SHOWN = frozenset(
    (
        *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>"),
        '<|"|>',
    )
)
# Merges over plain text with spaces escaped: what llama.cpp has for such lists that SentencePiece would not make.
PLAIN_MERGES = "sarvam-moe"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def read(sources: Sources, table: TokenTable, pre: str | None) -> tuple[list[Entry], list[Entry]]:
    """Fill the table; gives the keys before the tokens and those after them.

    Raises:
        CheckpointError: files missing or contradictory, or a tokenizer that llama.cpp cannot do.
    """
    model = _model(sources)
    if model is not None:
        return _of_model(model, sources, table)
    if sources.model_kind != "BPE":
        raise CheckpointError(
            "no tokenizer.model, and no tokenizer.json with a BPE", "copy the tokenizer's files beside the weights"
        )
    return _of_json(sources, table, pre)


def file_of(sources: Sources) -> str | None:
    return next((name for name in SENTENCEPIECE if name in sources), None)


def _model(sources: Sources) -> proto.SentencePieceModel | None:
    name = file_of(sources)
    if name is None or (sources.model_types & _GEMMA4 and TOKENIZER in sources):
        return None
    try:
        model = proto.parse(sources.files[name], name)
    except CheckpointError:
        # Llama 3 was first published with a list for tiktoken under this name.
        if TOKENIZER in sources:
            return None
        raise
    if model.kind != proto.BPE:
        raise CheckpointError(
            f"{name} is a unigram model, and this architecture is known with a BPE", "give its own tokenizer"
        )
    return model


def _of_model(model: proto.SentencePieceModel, sources: Sources, table: TokenTable) -> tuple[list[Entry], list[Entry]]:
    for number, piece in enumerate(model.pieces):
        shown = piece.text.replace(SPACE, " ") if piece.type == USER_DEFINED else piece.text
        table.put(number, shown, piece.type, piece.score)
    check_agreement(model, sources)
    table.add(sources.added.values())
    table.scores |= {number: ADDED_SCORE for number in sources.decoded if number in table.scores}
    for number, piece in enumerate(model.pieces):
        # Symbols of the user stay what they are, however they look, unless a file calls them special.
        added = sources.added.get(number)
        if piece.type == USER_DEFINED and added and not added.special and number not in sources.decoded:
            table.put(number, piece.text.replace(SPACE, " "), USER_DEFINED, piece.score)
    prefix = model.prefix
    if TOKENIZER in sources and sources.model_kind == "BPE":
        stated = spaces(sources.tokenizer)
        prefix = stated.prefix
        _note_spaces(stated, table)
    elif model.charsmap or model.trim:
        table.notes.append("this tokenizer normalizes text (characters, runs of spaces), llama.cpp does not")
    return _llama(prefix, sources, table)


def check_agreement(model: proto.SentencePieceModel, sources: Sources) -> None:
    """Refuse a ``tokenizer.model`` beside a ``tokenizer.json`` of another tokenizer.

    Raises:
        CheckpointError: an id of the one is another token in the other.
    """
    if sources.model_kind != "BPE":
        return
    for token, number in checked_vocabulary(sources.model.get("vocab")).items():
        if number < len(model.pieces) and number not in sources.added and model.pieces[number].text != token:
            raise CheckpointError(
                f"token {number} is {model.pieces[number].text!r} in {file_of(sources)} and {token!r} in {TOKENIZER}",
                "keep the files of one tokenizer",
            )


def _of_json(sources: Sources, table: TokenTable, pre: str | None) -> tuple[list[Entry], list[Entry]]:
    vocabulary = checked_vocabulary(sources.model.get("vocab"))
    stated = spaces(sources.tokenizer)
    merges = [joined(pair) for pair in sources.model.get("merges") or ()]
    order = _order(merges)
    for token, number in vocabulary.items():
        kind = BYTE if BYTE_TOKEN.fullmatch(token) else UNKNOWN if token == sources.model.get("unk_token") else NORMAL
        table.put(number, token, kind, -float(order.get(token, len(order))))
    table.add(sources.added.values())
    own = {
        token for token, number in vocabulary.items() if number not in sources.added and table.types[number] == NORMAL
    }
    missing = _incomplete(merges, own)
    if stated.words and any(SPACE in token[1:] for token in own):
        missing = missing or "tokens that reach over a space"
    if stated.others:
        missing = missing or f"the step {stated.others[0]}"
    _note_spaces(stated, table)
    if sources.model_types & _GEMMA4:
        table.types |= {number: USER_DEFINED for number, token in table.texts.items() if token in _SHOWN}
        table.scores = dict.fromkeys(table.scores, ADDED_SCORE)
        return [text(MODEL, GEMMA4)], [boolean(PREFIX, stated.prefix), array(MERGES, STRING, merges)]
    if missing is None or pre == DEFAULT:
        return _llama(stated.prefix, sources, table)
    if pre in (None, PLAIN_MERGES) and not (stated.prefix or stated.others or stated.words or _over_lines(merges)):
        return [text(MODEL, GPT2), text(PRE, PLAIN_MERGES)], [array(MERGES, STRING, merges)]
    raise CheckpointError(
        f"this BPE over plain text is not one that SentencePiece makes ({missing}), and llama.cpp would cut text otherwise",
        f"give {option('pre', DEFAULT)} to write it as SentencePiece all the same",
    )


def _order(merges: Sequence[str]) -> dict[str, int]:
    """Place of each token among those that merges make."""
    order: dict[str, int] = {}
    for pair in merges:
        order.setdefault("".join(pair.split(" ", 1)), len(order))
    return order


def _incomplete(merges: Sequence[str], own: set[str]) -> str | None:
    """What keeps a list of merges from being the one that SentencePiece's scores come to; None if nothing does."""
    pairs = set(merges)
    for token in own:
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in own and right in own and f"{left} {right}" not in pairs:
                return f"{token!r} is not made of {left!r} and {right!r}"
    made = [token for token, _ in groupby("".join(pair.split(" ", 1)) for pair in merges)]
    return None if len(made) == len(set(made)) else "the merges of a token are apart"


def _over_lines(merges: Sequence[str]) -> bool:
    return any("\n" in pair and pair.replace(" ", "").strip("\n") for pair in merges)


def _note_spaces(stated: Spaces, table: TokenTable) -> None:
    if stated.prefix and not stated.each:
        table.notes.append(
            "llama.cpp puts a space after special tokens too, this tokenizer only at the start of a text"
        )
    if stated.charsmap or stated.trim:
        table.notes.append("this tokenizer normalizes text (characters, runs of spaces), llama.cpp does not")


def _llama(prefix: bool, sources: Sources, table: TokenTable) -> tuple[list[Entry], list[Entry]]:
    stated: Any = sources.settings.get("add_prefix_space")
    if TOKENIZER not in sources and isinstance(stated, bool):
        prefix = stated
    if not any(kind == BYTE for kind in table.types.values()):
        table.notes.append("this vocabulary has no bytes; llama.cpp stops at a character that it lacks")
    return [text(MODEL, LLAMA), text(PRE, DEFAULT)], [boolean(PREFIX, prefix)]
