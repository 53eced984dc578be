"""One spelling for every JSON value, so that a digest of it means something.

Canonical bytes: keys sorted by code point, no spaces, ASCII with ``\\uXXXX`` escapes, integers exact, floats as the
shortest decimal that reads back to the same double (Python's ``repr``); NaN and infinities have no spelling. Not RFC
8785: that one orders keys by UTF-16 unit and spells numbers as JavaScript does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring_ascii as _text_of
from types import MappingProxyType
from typing import Any

from adapterkit.errors import RegistryError

MAX_BYTES = 16 << 20
MAX_DEPTH = 32
_MAX_INT = 1 << 64
_encode = json.JSONEncoder(sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode


def canonical(value: Any) -> bytes:
    """The one byte spelling of a plain JSON value (dict, list, str, int, float, bool, None)."""
    return _encode(value).encode("ascii")


def canonical_row(*values: str | Sequence[int]) -> bytes:
    """`canonical` of a list of texts and lists of integers, in a third of the time: an identity has one for each tensor."""
    spelled = (_text_of(one) if isinstance(one, str) else f"[{','.join(map(str, one))}]" for one in values)
    return f"[{','.join(spelled)}]".encode("ascii")


def sha256(data: bytes) -> str:
    """The sha256 of ``data`` as 64 lower-case hex digits."""
    import hashlib

    return hashlib.sha256(data).hexdigest()


def parse(data: bytes, where: str) -> Any:
    """The JSON value in ``data``: no duplicate keys, no NaN, at most 16 MiB and 32 levels.

    Raises:
        RegistryError: ``data`` is not such a value; ``where`` is named in the sentence.
    """
    if len(data) > MAX_BYTES:
        raise RegistryError(f"{where} is larger than {MAX_BYTES} bytes and is not read as JSON")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise RegistryError(f"{where} is nested too deeply to be read as JSON") from None
    except ValueError as error:
        raise RegistryError(f"{where} is not valid JSON: {error}") from None
    return value


def freeze(value: Any, where: str, depth: int = 0) -> Any:
    """A read-only copy of a JSON value: objects become read-only mappings and arrays become tuples.

    Raises:
        RegistryError: ``value`` holds something that JSON has no spelling for.
    """
    if depth > MAX_DEPTH:
        raise RegistryError(f"{where} is nested deeper than {MAX_DEPTH} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, int):
        if abs(value) >= _MAX_INT:
            raise RegistryError(f"{where} holds an integer of more than 64 bits")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RegistryError(f"{where} holds {value}, which JSON cannot say")
        return float(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise RegistryError(f"{where} has a key that is not text")
        return MappingProxyType({_text(key, where): freeze(item, where, depth + 1) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item, where, depth + 1) for item in value)
    raise RegistryError(f"{where} holds a {type(value).__name__}, which JSON cannot say")


def thaw(value: Any) -> Any:
    """The plain dicts and lists behind a frozen value."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [thaw(item) for item in value]
    return value


def _text(value: str, where: str) -> str:
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise RegistryError(f"{where} holds text that is not valid Unicode") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names a key twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")
