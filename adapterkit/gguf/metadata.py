"""Key-values of GGUF as bytes, for writing."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.gguf.reader import ARRAY, BOOL, F32, MAGIC, SCALARS, STRING, U16, U32

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from adapterkit.gguf.reader import GGUFHeader
    from adapterkit.gguf.types import GGMLType

VERSION = 3


@dataclass(frozen=True)
class Entry:
    """One key-value to write: its bytes, or where they stand in the header of the input file."""

    key: str
    data: bytes
    start: int | None = None

    @property
    def nbytes(self) -> int:
        return len(self.data)


def entry(key: str, kind: int, value: Any) -> Entry:
    """A key-value of a scalar type or a string."""
    return Entry(key, _string(key) + struct.pack("<I", kind) + _value(kind, value))


def array(key: str, kind: int, values: Sequence[Any]) -> Entry:
    """A key-value that is an array of ``kind``."""
    head = struct.pack("<IIQ", ARRAY, kind, len(values))
    return Entry(key, _string(key) + head + b"".join(_value(kind, value) for value in values))


def text(key: str, value: str) -> Entry:
    return entry(key, STRING, value)


def u32(key: str, value: int) -> Entry:
    return entry(key, U32, value)


def u16(key: str, value: int) -> Entry:
    return entry(key, U16, value)


def f32(key: str, value: float) -> Entry:
    return entry(key, F32, value)


def boolean(key: str, value: bool) -> Entry:
    return entry(key, BOOL, value)


def kept(header: GGUFHeader, without: Iterable[str] = ()) -> list[Entry]:
    """The key-values of a file as they stand in it, byte for byte, but some."""
    left_out = frozenset(without)
    return [Entry(key, header.bytes_of(key), header.keys[key].start) for key in header.keys if key not in left_out]


def file_start(n_tensors: int, n_keys: int) -> bytes:
    """Magic, version and counts."""
    return MAGIC + struct.pack("<IQQ", VERSION, n_tensors, n_keys)


def tensor_info(name: str, kind: GGMLType, shape: Sequence[int], offset: int) -> bytes:
    """The info of one tensor; ``shape`` has the slowest dimension first, ``offset`` counts from the start of the data."""
    dims = tuple(reversed(shape)) or (1,)
    return _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind.id, offset)


def _value(kind: int, value: Any) -> bytes:
    return _string(value) if kind == STRING else struct.pack("<" + SCALARS[kind][1], value)


def _string(value: str) -> bytes:
    data = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data
