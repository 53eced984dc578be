"""RWKV's "World" tokenizer (``rwkv`` in GGUF), from ``rwkv_vocab_v20230424.txt``: the longest token of bytes that fits."""

from __future__ import annotations

import ast
import warnings
from typing import TYPE_CHECKING

from adapterkit.errors import CheckpointError
from adapterkit.gguf.metadata import Entry, text
from adapterkit.gguf.vocab.table import CONTROL, MODEL, TokenTable

if TYPE_CHECKING:
    from adapterkit.gguf.vocab.sources import Sources

FILE = "rwkv_vocab_v20230424.txt"
# Token 0 ends a text; two line breaks end a turn of the models' chats.
ROLES = {"bos": "<s>", "eos": "<s>", "eot": "\\n\\n"}


def read(sources: Sources, table: TokenTable, pre: str | None) -> tuple[list[Entry], list[Entry]]:
    """Fill the table; gives the keys before the tokens and those after them.

    A line of the file is ``id literal length``, with a literal of Python; GGUF has bytes as Python shows them.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if FILE not in sources.files:
        raise CheckpointError(f"{FILE} is missing", "copy it from the model's own repository")
    table.put(0, "<s>", CONTROL)
    for number, line in enumerate(sources.files[FILE].decode("utf-8").splitlines(), 1):
        token, said, own = _parsed(line, number)
        if len(token) != said:
            raise CheckpointError(f"{FILE} is damaged at line {number}", "download it again")
        table.put(own, repr(token)[2:-1])
    return [text(MODEL, "rwkv")], []


def _parsed(line: str, number: int) -> tuple[bytes, int, int]:
    first, _, rest = line.partition(" ")
    literal, _, length = rest.rpartition(" ")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's own words about text like `1if`
            token = ast.literal_eval(literal)
        if not isinstance(token, (str, bytes)):
            raise ValueError(literal)
        return token.encode() if isinstance(token, str) else token, int(length), int(first)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise CheckpointError(f"{FILE} is damaged at line {number}", "download it again") from None
