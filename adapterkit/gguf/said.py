"""Metadata that the user gives a GGUF output: a name, a file of ``general.*``, and single keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.json_data import parse_json
from adapterkit.disk import read_regular
from adapterkit.errors import CheckpointError, NotFound, UsageError, option
from adapterkit.gguf.metadata import Entry, array, boolean, f32, text, u32
from adapterkit.gguf.reader import STRING
from adapterkit.stores.files import brought

if TYPE_CHECKING:
    from adapterkit.gguf.plan import FileLayout

# What a file could not be read with, if it said something else of itself than it is.
FIXED = ("general.architecture", "general.type", "general.alignment", "general.quantization_version", "split.")
MOST = 1 << 20  # bytes of a file of metadata


def said(name: str | None, file: str | Path | None, pairs: Iterable[str]) -> tuple[Entry, ...]:
    """The entries that options ask for; a later one of the same key counts.

    Args:
        name: ``general.name``.
        file: JSON whose keys are ``general.*``.
        pairs: ``KEY=TYPE:VALUE`` as llama-quantize takes them, with the types ``int``, ``float``, ``bool`` and ``str``.

    Raises:
        NotFound: there is no such file.
        UsageError: one that is not of that form, or a key that is not the user's to say.
    """
    found: dict[str, Entry] = {}
    for entry in (*_of_file(file), *(() if name is None else (text("general.name", name),)), *map(_of_pair, pairs)):
        fixed = next(
            (key for key in FIXED if entry.key == key or (key.endswith(".") and entry.key.startswith(key))), None
        )
        if fixed is not None:
            raise UsageError(f"'{entry.key}' says what the file is, and cannot be given", "leave it out")
        found[entry.key] = entry
    return tuple(found.values())


def with_said(layout: FileLayout, entries: Sequence[Entry]) -> FileLayout:
    """A layout whose keys have these values; new ones come last."""
    if not entries:
        return layout
    given = {entry.key: entry for entry in entries}
    kept = [given.pop(entry.key, entry) for entry in layout.entries]
    return replace(layout, entries=(*kept, *given.values()))


def _of_file(file: str | Path | None) -> list[Entry]:
    if file is None:
        return []
    hint = "give a JSON file with keys like general.author"
    path = brought(file)
    if not path.exists():
        raise NotFound(f"{file} does not exist", hint)
    if path.stat().st_size > MOST:
        raise UsageError(f"{file} is too large for metadata", hint)
    said = read_regular(path, MOST, str(file))
    try:
        data = parse_json(said, str(file))
    except CheckpointError as error:
        raise UsageError(f"{file} is not JSON ({error})", 'write it like {"general.author": "..."}') from None
    if not isinstance(data, dict):
        raise UsageError(f"{file} is not an object", 'write it like {"general.author": "..."}')
    return [_of_json(str(file), key, value) for key, value in data.items()]


def _of_json(file: str, key: str, value: Any) -> Entry:
    if not key.startswith("general."):
        raise UsageError(
            f"{file}: '{key}' is no key of general.*", f"give it as {option('override_kv', f'{key}=TYPE:VALUE')}"
        )
    if isinstance(value, bool):
        return boolean(key, value)
    if isinstance(value, str):
        return text(key, value)
    if isinstance(value, int) and 0 <= value < 1 << 32:
        return u32(key, value)
    if isinstance(value, float):
        return f32(key, value)
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return array(key, STRING, value)
    raise UsageError(f"{file}: the value of '{key}' is none that a key can have", "give a text, a number or texts")


def _of_pair(given: str) -> Entry:
    key, equals, typed = given.partition("=")
    kind, colon, value = typed.partition(":")
    if not (key and equals and colon):
        raise UsageError(f"'{given}' is not KEY=TYPE:VALUE", "write it like llama.rope.freq_base=float:500000")
    try:
        if kind == "int":
            return u32(key, _whole(value))
        if kind == "float":
            return f32(key, float(value))
        if kind == "bool":
            return boolean(key, {"true": True, "false": False}[value.lower()])
    except (ValueError, KeyError, OverflowError):
        raise UsageError(f"'{value}' in '{given}' is no {kind}", "correct it") from None
    if kind == "str":
        return text(key, value)
    raise UsageError(f"'{kind}' in '{given}' is no type of a key", "use int, float, bool or str")


def _whole(value: str) -> int:
    found = int(value)
    if not 0 <= found < 1 << 32:
        raise ValueError(value)
    return found


def read_pairs(file: str | Path) -> tuple[tuple[str, str], ...]:
    """``REGEX=TYPE`` in lines or between spaces, as llama-quantize reads ``--tensor-type-file``.

    Raises:
        NotFound: there is no such file.
        UsageError: one that is not of that form, or no such type.
    """
    from adapterkit.gguf.quantize import parse_tensor_type

    hint = "give a file of lines like attn_v=Q8_0"
    try:
        said = read_regular(brought(file), MOST, str(file)).decode("utf-8")
    except NotFound:
        raise NotFound(f"{file} does not exist", hint) from None
    except (CheckpointError, ValueError) as error:
        raise UsageError(f"{file} is no file of tensor types ({error})", hint) from None
    return tuple(parse_tensor_type(one) for one in said.split())
