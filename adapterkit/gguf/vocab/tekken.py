"""Mistral's ``tekken.json``: ranks of byte strings, from which the merges follow."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.metadata import Entry, array, text
from adapterkit.gguf.reader import STRING
from adapterkit.gguf.vocab import pretokenizers
from adapterkit.gguf.vocab.bpe import GPT2
from adapterkit.gguf.vocab.sources import TEKKEN
from adapterkit.gguf.vocab.table import CONTROL, MERGES, MODEL, NORMAL, PRE, TokenTable

if TYPE_CHECKING:
    from adapterkit.gguf.vocab.sources import Sources

# Special tokens of files that do not list them (mistral_common, Tekkenizer.DEPRECATED_SPECIAL_TOKENS).
_OLD = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
ROLES = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
_AGAIN = "copy the tokenizer's files again"


def read(sources: Sources, table: TokenTable, pre: str | None) -> tuple[list[Entry], list[Entry]]:
    """Fill the table; gives the keys before the tokens and those after them.

    Raises:
        CheckpointError: the file is not what it should be, or splits text by another expression than llama.cpp's.
    """
    data = sources.json(TEKKEN)
    config: dict[str, Any] = data.get("config") or {}
    try:
        size, specials = int(config["default_vocab_size"]), int(config["default_num_special_tokens"])
        tokens = [base64.b64decode(one["token_bytes"], validate=True) for one in data["vocab"][: size - specials]]
    except (AttributeError, KeyError, TypeError, ValueError, binascii.Error) as error:
        raise CheckpointError(f"{TEKKEN} is not as mistral-common writes it ({error})", _AGAIN) from None
    if len(tokens) + specials != size or len(set(tokens)) < len(tokens):
        raise CheckpointError(f"{TEKKEN} has {len(tokens)} different tokens, and says {size - specials}", _AGAIN)
    names = _specials(data.get("special_tokens"), specials)
    for number, name in enumerate(names):
        table.put(number, name, CONTROL)
    alphabet = byte_alphabet()
    texts = ["".join(alphabet[byte] for byte in token) for token in tokens]
    for number, shown in enumerate(texts):
        table.put(specials + number, shown, NORMAL)
    if pre is None:
        regexes = (pretokenizers.canonical(str(config.get("pattern"))),)
        row, notes = pretokenizers.recognise(regexes, ignore_merges=True)
        table.notes.extend(notes)
        pre = row.name
    return [text(MODEL, GPT2), text(PRE, pre)], [array(MERGES, STRING, _merges(tokens, texts))]


def _specials(listed: Any, count: int) -> list[str]:
    names = dict(enumerate(_OLD))
    if isinstance(listed, list):
        names = {one["rank"]: str(one["token_str"]) for one in listed if isinstance(one, dict) and "rank" in one}
    return [names.get(number, f"<SPECIAL_{number}>") for number in range(count)]


def _merges(tokens: list[bytes], texts: list[str]) -> list[str]:
    """Every way to make a token of two others, in the order of ranks."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    found = []
    for token in tokens:
        if len(token) < 2:
            continue
        ways = [
            (ranks[token[:at]], ranks[token[at:]])
            for at in range(1, len(token))
            if token[:at] in ranks and token[at:] in ranks
        ]
        if not ways:
            raise CheckpointError(f"token {token!r} of {TEKKEN} cannot be made of two others", _AGAIN)
        found += [f"{texts[left]} {texts[right]}" for left, right in sorted(ways)]
    return found


def byte_alphabet() -> list[str]:
    """GPT-2's letter for each byte: itself where it is visible, else the next free one from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = iter(range(256, 512))
    shown = set(visible)
    return [chr(byte) if byte in shown else chr(next(hidden)) for byte in range(256)]
