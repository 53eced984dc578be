"""Prompts that both models answer: a user's file, or a small mixed set.

A text file holds prompts with blank lines between them. A ``.jsonl`` file holds one on each line: a string, or an object with
``text`` (or ``prompt``), with ``messages`` (put through the chat template), or with ``ids``, token numbers that need no
tokenizer.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterkit.disk import open_regular
from adapterkit.errors import NotFound, UsageError
from adapterkit.foreign import json_value

MOST_BYTES = 16 << 20
MOST_TOKENS = 512  # of one prompt; the rest is not scored


@dataclass(frozen=True)
class Prompt:
    """A text, a chat, or token numbers."""

    text: str = ""
    messages: tuple[dict[str, str], ...] = ()
    ids: tuple[int, ...] = ()

    @property
    def start(self) -> str:
        """Its first words, to show."""
        text = self.text or " / ".join(m["content"] for m in self.messages) or " ".join(map(str, self.ids[:16]))
        text = " ".join(text.split())
        return text if len(text) <= 80 else text[:77] + "..."


BUILT_IN = Path(__file__).with_name("prompts.txt")


def read_prompts(path: Path | None) -> tuple[Prompt, ...]:
    """The prompts of a file, or the built-in set.

    Raises:
        NotFound: there is no such file.
        UsageError: it is empty, not text, too large, or a line is not understood.
    """
    path = path or BUILT_IN
    try:
        with open(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(MOST_BYTES + 1) if size <= MOST_BYTES else b""
    except NotFound:
        raise NotFound(f"{path} does not exist", "give a text file of prompts") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})", "give a text file of prompts") from None
    if size > MOST_BYTES:
        raise UsageError(f"{path} has {size >> 20} MiB of prompts", f"give at most {MOST_BYTES >> 20}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UsageError(f"{path} is not text", "give prompts as UTF-8, with blank lines between them")
    found = _lines(text, path) if path.suffix == ".jsonl" else _paragraphs(text)
    if not found:
        raise UsageError(f"{path} holds no prompts", "write some, with blank lines between them")
    return tuple(found)


def _paragraphs(text: str) -> list[Prompt]:
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    return [Prompt("\n".join(block)) for block in blocks if block]


def _lines(text: str, path: Path) -> list[Prompt]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            prompt = _prompt(line)
            if prompt is None:
                raise UsageError(
                    f"{path}, line {number}: not a prompt", 'write a string, or an object like {"text": "..."}'
                )
            found.append(prompt)
    return found


def _prompt(line: str) -> Prompt | None:
    try:
        value: Any = json_value(line)
    except ValueError:
        return None
    if isinstance(value, str):
        return Prompt(value) if value.strip() else None
    if not isinstance(value, dict):
        return None
    text, messages, ids = value.get("text", value.get("prompt")), value.get("messages"), value.get("ids")
    if isinstance(text, str) and text.strip():
        return Prompt(text)
    if isinstance(ids, list) and ids and all(type(one) is int and one >= 0 for one in ids):
        return Prompt(ids=tuple(ids))
    if isinstance(messages, list) and messages and all(_is_message(one) for one in messages):
        return Prompt(messages=tuple({"role": one["role"], "content": one["content"]} for one in messages))
    return None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
