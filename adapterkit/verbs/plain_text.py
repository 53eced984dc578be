"""A text that a model reads: what a file holds, and its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.errors import NotFound, UsageError

if TYPE_CHECKING:
    from pathlib import Path


def read_text(path: Path) -> str:
    """What a file of text holds.

    Raises:
        NotFound: there is none.
        UsageError: it is no text in UTF-8.
    """
    try:
        with open(disk.open_regular(path), encoding="utf-8") as file:
            return file.read()
    except NotFound:
        raise NotFound(f"{path} does not exist", "give a file of plain text") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no text ({error})", "give a file of plain text in UTF-8") from None


def text_ids(tokenizer: Any, said: str) -> tuple[int | None, list[int]]:
    """The token that begins a text, if the tokenizer adds one, and the text's own."""
    plain = list(tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"])
    framed = list(tokenizer("a")["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    first = framed[0] if len(framed) > len(bare) and framed[0] != bare[0] else None
    return first, plain if first is None else [first, *plain]
