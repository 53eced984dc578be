"""JSON from strangers: what no sensible file holds is refused before anything works with it."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from adapterkit.errors import CheckpointError

MAX_DEPTH = 128  # of lists and objects in each other; a tokenizer's own nest about ten deep
MAX_DIGITS = 40  # of a whole number
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(data: bytes, where: str) -> Any:
    """The value of a JSON text in UTF-8.

    Raises:
        CheckpointError: it is not JSON, nests deeper than `MAX_DEPTH`, holds a whole number of more than `MAX_DIGITS`
            digits, or text with half a character (a lone surrogate).
    """

    def refuse(what: str) -> NoReturn:
        raise CheckpointError(f"{where} holds {what}", "download or save it again")

    def whole(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            refuse(f"a number of {len(digits)} digits")
        return int(digits)

    try:
        text = data.decode("utf-8")
        found = json.loads(text, parse_int=whole)
        if _SURROGATE.search(text):
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        refuse("text with half a character in it")
    except (ValueError, RecursionError) as error:
        said = "it nests too deeply" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{where} is not valid JSON ({said})", "download or save it again") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _deeper(found, MAX_DEPTH):
        refuse(f"values that nest more than {MAX_DEPTH} deep")
    return found


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and objects nest more than ``most`` deep."""
    level = [value]
    for _ in range(most + 1):
        inside = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [inner for values in inside for inner in values if isinstance(inner, dict | list)]
        if not level:
            return False
    return True
