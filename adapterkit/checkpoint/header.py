"""Safetensors headers, read and written without the tensors.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the data (README of
huggingface/safetensors, "Format"). The reader trusts nothing: it also refuses what the reference implementation lets
through, duplicate keys (the last would win) and names that would be dangerous to hand on.
"""

from __future__ import annotations

import json
from dataclasses import field
from functools import lru_cache
from math import prod
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from adapterkit.checkpoint.slices import current
from adapterkit.dtypes import DTYPES, DType
from adapterkit.errors import CheckpointError, UnsafeError
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from adapterkit.checkpoint.slices import Slice

MAX_HEADER = 100_000_000  # bytes, the limit of the reference implementation
MAX_NAME = 4096  # characters
MAX_DIMS = 32
MAX_NUMEL = 1 << 63  # also of the dimensions that are not zero: torch multiplies them all
MODEL, LEGACY, SPEC = "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"
HASHES = {MODEL: "0" * 64, LEGACY: "0" * 8, SPEC: "0x" + "0" * 64}
"""Hashes that metadata state of the file itself, and what a plan has in their place; see `adapterkit.checkpoint.hashes`."""
TRAINING = "ss_"
_SPEC = "modelspec."


class TensorInfo(NamedTuple):
    """What a header says of one tensor; ``start`` and ``stop`` are absolute byte offsets in the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Header:
    """A validated header: tensors in the order of their bytes, and the file's string metadata."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    data_start: int = 0


def check_name(name: str, where: str) -> str:
    """A tensor name that is safe to print and to pass on, or `UnsafeError`."""
    if (
        not name
        or len(name) > MAX_NAME
        or not name.isprintable()
        or name.startswith("/")
        or ".." in name
        or "\\" in name
    ):
        shown = name[:60].encode("unicode_escape").decode()
        raise UnsafeError(f"{where}: tensor name '{shown}' is not a plain name", "do not use this file")
    return name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:60]!r} appears twice")
    return found


def _count(text: str) -> int:
    if text.startswith("-") or len(text) > 20:
        raise ValueError(f"{text[:20]} is not a size")
    return int(text)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text[:20]} is not a whole number")


_STRICT: Any = {
    "object_pairs_hook": _unique,
    "parse_int": _count,
    "parse_float": _no_number,
    "parse_constant": _no_number,
}
_ENTRY = {"dtype", "shape", "data_offsets"}


def parse_header(read: Callable[[int, int], bytes], size: int, where: str) -> Header:
    """Parse and check the header of a safetensors file.

    Args:
        read: ``read(offset, length)`` gives that many bytes of the file, or fewer at its end.
        size: length of the file in bytes.
        where: what to call the file in an error.

    Raises:
        CheckpointError: truncated, corrupt, overlapping, with gaps, or of an unknown dtype.
        UnsafeError: a name with control characters or a path in it.
    """
    again = "download or save it again"
    if size < 8:
        raise CheckpointError(f"{where} is {size} bytes, too short for a safetensors file", again)
    length = int.from_bytes(read(0, 8), "little")
    if length > MAX_HEADER or length > size - 8:
        raise CheckpointError(f"{where}: its header claims {length} bytes of a file of {size}", again)
    raw = read(8, length)
    try:
        if raw[:1] != b"{":
            raise ValueError("it does not start with a brace")
        found = json.loads(raw.decode("utf-8"), **_STRICT)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: its header is not valid JSON ({error})", again) from None
    metadata = found.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null where it has none
    if not isinstance(metadata, dict) or not all(map(_is_text, (*metadata, *metadata.values()))):
        raise CheckpointError(f"{where}: its __metadata__ is not a map of strings", again)
    start = 8 + length
    some = current()
    if some is not None and where in some.inputs:  # of a header that was checked whole when the plan was made
        found = {name: entry for name, entry in found.items() if _is_in(some, where, entry, start)}
        infos = sorted(
            (_info(name, entry, start, where) for name, entry in found.items()), key=attrgetter("start", "stop")
        )
        return Header({info.name: info for info in infos}, metadata, start)
    tensors = sorted(
        (_info(name, entry, start, where) for name, entry in found.items()), key=attrgetter("start", "stop")
    )
    position = start
    for info in tensors:
        if info.start != position:
            kind = "overlaps the one before" if info.start < position else "leaves a gap before it"
            raise CheckpointError(f"{where}: tensor '{info.name}' {kind}", again)
        position = info.stop
    if position != size:
        kind = "truncated" if position > size else "longer than its header says"
        raise CheckpointError(f"{where} is {kind}: {size} bytes where the header needs {position}", again)
    return Header({info.name: info for info in tensors}, metadata, start)


def _is_in(some: Slice, where: str, entry: Any, data_start: int) -> bool:
    try:
        return some.holds(where, data_start + entry["data_offsets"][0])
    except (TypeError, LookupError):
        return True  # `_info` says what is wrong


def _is_text(value: Any) -> bool:
    """A string that can be written again: JSON allows half a surrogate pair, UTF-8 does not."""
    try:
        return isinstance(value, str) and value.encode("utf-8") is not None
    except UnicodeEncodeError:
        return False


def _info(name: str, entry: Any, data_start: int, where: str) -> TensorInfo:
    check_name(name, where)
    try:
        if set(entry) != _ENTRY or not isinstance(entry["shape"], list) or len(entry["shape"]) > MAX_DIMS:
            raise ValueError
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if {*map(type, shape), type(begin), type(end)} != {int} or end < begin:
            raise ValueError
        nbytes = _nbytes(dtype.code, shape)
    except KeyError as error:
        raise CheckpointError(
            f"{where}: tensor '{name}' has the unknown dtype {str(error)[:40]}", "update adapterkit"
        ) from None
    except (TypeError, ValueError):
        raise CheckpointError(f"{where}: tensor '{name}' has a malformed entry", "download or save it again") from None
    if nbytes != end - begin:
        raise CheckpointError(
            f"{where}: tensor '{name}' of shape {list(shape)} and dtype {dtype} takes {nbytes} bytes, "
            f"not {end - begin}",
            "download or save it again",
        )
    return TensorInfo(name, dtype, shape, data_start + begin, data_start + end)


@lru_cache(1024)  # a model has few shapes and many tensors
def _nbytes(code: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor.

    Raises:
        ValueError: too many elements, or not whole bytes.
    """
    dtype = DTYPES[code]
    if prod(size or 1 for size in shape) >= MAX_NUMEL or prod(shape) * dtype.bits % 8:
        raise ValueError
    return dtype.nbytes(shape)


def build_header(
    tensors: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The bytes of a header for tensors laid end to end, padded to 8 bytes, and each tensor's absolute offset."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position, offsets = 0, {}
    for name, dtype, shape in tensors:
        end = position + dtype.nbytes(shape)
        entries[name] = {"dtype": dtype.code, "shape": list(shape), "data_offsets": [position, end]}
        offsets[name] = position
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in offsets.items()}


def with_room(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata with room for the hashes that go with them; what they stated of another file's bytes is gone."""
    kept = {name: value for name, value in metadata.items() if name not in HASHES}
    asked = [MODEL, LEGACY] if any(name.startswith(TRAINING) for name in kept) else []
    asked += [SPEC] if any(name.startswith(_SPEC) for name in kept) else []
    return kept | {name: HASHES[name] for name in asked}
