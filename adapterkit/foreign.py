"""JSON, numbers and text from strangers: what no sensible file holds is none to us, and every refusal is a `ValueError`.

`json.loads` alone raises `RecursionError` where lists nest deeply, takes whole numbers that no float and no C program holds,
and gives text with half a character in it, which nothing can write.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 128  # of lists and objects in each other; a tokenizer's own nest about ten deep
MAX_DIGITS = 40  # of a whole number
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class OddJson(ValueError):
    """It is JSON, and holds what no sensible file does; the text says what."""


def json_value(data: bytes | str) -> Any:
    """The value of a JSON text, in UTF-8 where it is bytes.

    Raises:
        OddJson: it nests deeper than `MAX_DEPTH`, has a whole number of more than `MAX_DIGITS` digits, or half a character (a
            lone surrogate).
        ValueError: it is not JSON.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    try:
        found = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise OddJson(f"values that nest more than {MAX_DEPTH} deep") from None
    if _SURROGATE.search(text):
        try:
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise OddJson("text with half a character in it") from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _deeper(found, MAX_DEPTH):
        raise OddJson(f"values that nest more than {MAX_DEPTH} deep")
    return found


def printable(text: str) -> str:
    """The text with everything that is not printed, half characters too, as an escape: ``\\x1b``, ``\\u202e``."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def for_page(text: str) -> str:
    """Text for HTML and SVG: no markup, and nothing that does not print."""
    from html import escape

    return escape(printable(text))


def is_whole(text: str) -> bool:
    """Whether a text is a whole number as files write them: ASCII digits, at most 18. ``"²".isdigit()`` holds, and `int`
    refuses it, as it refuses 5,000 digits."""
    return 0 < len(text) < 19 and text.isascii() and text.isdigit()


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise OddJson(f"a number of {len(digits)} digits")
    return int(digits)


def _deeper(value: Any, most: int) -> bool:
    """Whether lists and objects nest more than ``most`` deep."""
    level = [value]
    for _ in range(most + 1):
        inside = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [inner for values in inside for inner in values if isinstance(inner, dict | list)]
        if not level:
            return False
    return True
