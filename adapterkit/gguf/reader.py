"""GGUF headers, read without the tensors and without trust.

Layout: docs/gguf.md of ggml (version 2 and 3): magic, version, two counts, key-values, tensor infos, padding, data. Every
count and length is checked against what is left of the file before anything is read or made for it, so that a header of
a few bytes cannot ask for time or memory. Values stay bytes until they are asked for; nothing heavy is imported.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.header import check_name
from adapterkit.errors import CheckpointError, UnsafeError
from adapterkit.gguf.types import BY_ID, GGMLType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

MAGIC = b"GGUF"
MAX_HEADER = 64 << 20  # bytes; the largest published vocabularies take about 20 MB
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_KEY = 1 << 16  # bytes, from the format's document
MAX_ALIGNMENT = 1 << 20
MAX_DIMS = 4
# `general.architecture` of image and video models, as ComfyUI-GGUF writes and reads them; kernels over time, height and
# width have 5 dimensions there (its fix_5d_tensors.py), which ggml has not.
DIFFUSION = frozenset(
    {"flux", "sd1", "sdxl", "sd3", "aura", "hidream", "cosmos", "ltxv", "hyvid", "wan", "lumina2", "qwen_image"}
)
MAX_ELEMENTS = (1 << 63) - 1
ALIGNMENT = 32

U8, U16, U32, I32, F32, BOOL, STRING, ARRAY = 0, 2, 4, 5, 6, 7, 8, 9
# Value type: (name, struct code); strings and arrays have codes of their own.
SCALARS = {
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    6: ("float32", "f"),
    7: ("bool", "?"),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
# Types that ggml once had; a file that uses one must be made again.
RETIRED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8"}
RETIRED[38] = "IQ4_NL_8_8"

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_AGAIN = "download or convert it again"


@dataclass(frozen=True)
class KeyValue:
    """One key and where its bytes lie in the file: ``start`` at the key's length, ``value`` at the value itself."""

    key: str
    type: int
    start: int
    value: int
    stop: int
    item_type: int | None = None
    count: int = 1


@dataclass(frozen=True)
class GGUFTensor:
    """What a header says of one tensor; ``start`` is an absolute offset, ``shape`` has the slowest dimension first."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def stop(self) -> int:
        return self.start + self.nbytes


@dataclass(frozen=True)
class GGUFHeader:
    """A validated header. Metadata is decoded on demand: ``header["general.architecture"]``.

    Attributes:
        version: 2 or 3.
        keys: key-values in the order of the file.
        tensors: tensors in the order of the file.
        data_start: where tensor data begins.
        raw: the bytes of the file up to the tensor infos.
    """

    version: int
    keys: Mapping[str, KeyValue]
    tensors: Mapping[str, GGUFTensor]
    alignment: int
    data_start: int
    raw: bytes = field(repr=False)

    def __getitem__(self, key: str) -> Any:
        """The value of ``key``: a number, a bool, a string, or a list of them.

        Raises:
            KeyError: there is no such key.
        """
        entry = self.keys[key]
        if entry.type == ARRAY:
            assert entry.item_type is not None
            return _array(self.raw, entry.value + 12, entry.item_type, entry.count)
        if entry.type == STRING:
            return _text(self.raw[entry.value + 8 : entry.stop])
        return struct.unpack_from("<" + SCALARS[entry.type][1], self.raw, entry.value)[0]

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self.keys else default

    def bytes_of(self, key: str) -> bytes:
        """A key-value as it stands in the file, key and type included."""
        entry = self.keys[key]
        return self.raw[entry.start : entry.stop]


def parse_gguf(read: Callable[[int, int], bytes], size: int, where: str) -> GGUFHeader:
    """Parse and check the header of a GGUF file.

    Args:
        read: ``read(offset, length)`` gives that many bytes of the file, or fewer at its end.
        size: length of the file in bytes.
        where: what to call the file in an error.

    Raises:
        CheckpointError: truncated, corrupt, overlapping, of another byte order, or of an unknown version or type.
        UnsafeError: a name with control characters or a path in it.
    """
    cursor = _Cursor(read, size, where)
    version = _version(cursor)
    n_tensors, n_keys = cursor.u64(), cursor.u64()
    cursor.limit(n_keys, MAX_KEYS, 13, "keys")
    cursor.limit(n_tensors, MAX_TENSORS, 24, "tensors")
    keys: dict[str, KeyValue] = {}
    for _ in range(n_keys):
        entry = _key_value(cursor)
        if entry.key in keys:
            raise cursor.error(f"key '{entry.key}' appears twice")
        keys[entry.key] = entry
    raw = cursor.seen()
    alignment = _alignment(keys, raw, cursor)
    most = MAX_DIMS + (_architecture(keys, raw) in DIFFUSION)
    found: dict[str, tuple[GGMLType, tuple[int, ...], int]] = {}
    for _ in range(n_tensors):
        name, kind, shape, offset = _tensor_info(cursor, most)
        if name in found:
            raise cursor.error(f"tensor '{name}' appears twice")
        if offset % alignment:
            raise cursor.error(f"tensor '{name}' starts at {offset}, which is no multiple of {alignment}")
        found[name] = (kind, shape, offset)
    data_start = cursor.position + -cursor.position % alignment
    tensors = {
        name: GGUFTensor(name, kind, shape, data_start + offset, prod(shape) // kind.block * kind.size)
        for name, (kind, shape, offset) in found.items()
    }
    _check_places(tensors, size, cursor)
    return GGUFHeader(version, keys, tensors, alignment, data_start, raw)


class _Cursor:
    """Reads a header front to back; the file is fetched in pieces that double, never past its end or the limit."""

    def __init__(self, read: Callable[[int, int], bytes], size: int, where: str) -> None:
        self._read, self._size, self.where = read, size, where
        self._data = b""
        self.position = 0

    def error(self, what: str, hint: str = _AGAIN) -> CheckpointError:
        return CheckpointError(f"{self.where}: {what}", hint)

    def limit(self, count: int, most: int, least_bytes: int, what: str) -> None:
        """Refuse a count that the rest of the file cannot hold."""
        if count > most or count * least_bytes > self._size - self.position:
            raise self.error(f"its header claims {count} {what} at byte {self.position} of {self._size}")

    def fill(self, stop: int) -> None:
        """Have the bytes up to ``stop`` at hand."""
        if stop <= len(self._data):
            return
        if stop > self._size:
            raise self.error(f"its header runs past the end of the file ({self._size} bytes)")
        if stop > MAX_HEADER:
            raise self.error(f"its header is longer than {MAX_HEADER >> 20} MB", "use a file with a smaller header")
        wanted = min(max(stop, 2 * len(self._data), 1 << 16), self._size, MAX_HEADER)
        self._data += self._read(len(self._data), wanted - len(self._data))
        if stop > len(self._data):
            raise self.error(f"it ended at byte {len(self._data)} while its header was read")

    def seen(self) -> bytes:
        return self._data[: self.position]

    def take(self, count: int) -> bytes:
        start = self.position
        self.fill(start + count)
        self.position = start + count
        return self._data[start : self.position]

    def skip(self, count: int) -> None:
        self.fill(self.position + count)
        self.position += count

    def u32(self) -> int:
        return int(_U32.unpack(self.take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack(self.take(8))[0])

    def string(self, what: str, most: int) -> str:
        length = self.u64()
        if length > most or length > self._size - self.position:
            raise self.error(f"{what} at byte {self.position} claims {length} bytes")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{what} before byte {self.position} is not UTF-8") from None

    def skip_string(self) -> None:
        length = self.u64()
        if length > self._size - self.position:
            raise self.error(f"a string at byte {self.position} claims {length} bytes of a file of {self._size}")
        self.skip(length)

    def skip_strings(self, count: int) -> None:
        # The one loop that real files make long: a vocabulary of a quarter of a million tokens, twice.
        at, unpack, size = self.position, _U64.unpack_from, self._size
        data = self._data
        for _ in range(count):
            if at + 8 > len(data):
                self.fill(at + 8)
                data = self._data
            at += 8 + unpack(data, at)[0]
            if at > size:
                raise self.error(f"a string before byte {size} runs past the end of the file")
        self.fill(at)
        self.position = at


def _version(cursor: _Cursor) -> int:
    if cursor.take(4) != MAGIC:
        raise cursor.error("it does not begin with GGUF", "give a GGUF file")
    version = cursor.u32()
    if version and version & 0xFFFF == 0:
        raise cursor.error("it is a big-endian GGUF file", "convert it with gguf-convert-endian of the package gguf")
    if version == 1:
        raise cursor.error("it is GGUF version 1, which nothing reads any more", "convert the model again")
    if version not in (2, 3):
        raise cursor.error(f"it is GGUF version {version}, not 2 or 3", "update adapterkit, or " + _AGAIN)
    return version


def _key_value(cursor: _Cursor) -> KeyValue:
    start = cursor.position
    key = cursor.string("a key", MAX_KEY)
    if not key or not key.isprintable():
        raise UnsafeError(f"{cursor.where}: the key before byte {cursor.position} is not a plain name", "do not use it")
    kind = cursor.u32()
    value = cursor.position
    item_type, count = None, 1
    if kind == STRING:
        cursor.skip_string()
    elif kind == ARRAY:
        item_type, count = cursor.u32(), cursor.u64()
        if item_type == STRING:
            cursor.limit(count, MAX_ELEMENTS, 8, f"strings in '{key}'")
            cursor.skip_strings(count)
        elif item_type in SCALARS:
            width = struct.calcsize(SCALARS[item_type][1])
            cursor.limit(count, MAX_ELEMENTS, width, f"values in '{key}'")
            cursor.skip(count * width)
        else:
            raise cursor.error(f"'{key}' is an array of items of type {item_type}", "update adapterkit, or " + _AGAIN)
    elif kind in SCALARS:
        cursor.skip(struct.calcsize(SCALARS[kind][1]))
    else:
        raise cursor.error(f"'{key}' has value type {kind}", "update adapterkit, or " + _AGAIN)
    return KeyValue(key, kind, start, value, cursor.position, item_type, count)


def _alignment(keys: Mapping[str, KeyValue], raw: bytes, cursor: _Cursor) -> int:
    entry = keys.get("general.alignment")
    if entry is None:
        return ALIGNMENT
    if entry.type != U32:
        raise cursor.error("general.alignment is not a uint32")
    value = int(_U32.unpack_from(raw, entry.value)[0])
    if value == 0 or value & (value - 1) or value > MAX_ALIGNMENT:
        raise cursor.error(f"general.alignment is {value}, not a power of two up to {MAX_ALIGNMENT}")
    return value


def _architecture(keys: Mapping[str, KeyValue], raw: bytes) -> str:
    entry = keys.get("general.architecture")
    if entry is None or entry.type != STRING:
        return ""
    return raw[entry.value + 8 : entry.stop].decode("utf-8", "replace")


def _tensor_info(cursor: _Cursor, most: int) -> tuple[str, GGMLType, tuple[int, ...], int]:
    name = check_name(cursor.string("a tensor name", 4096), cursor.where)
    n_dims = cursor.u32()
    if not 1 <= n_dims <= most:
        raise cursor.error(f"tensor '{name}' has {n_dims} dimensions, not 1 to {most}")
    shape = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims))[::-1]
    number, offset = cursor.u32(), cursor.u64()
    if not all(shape) or prod(shape) > MAX_ELEMENTS:
        raise cursor.error(f"tensor '{name}' has the shape {list(shape)}")
    kind = BY_ID.get(number)
    if kind is None:
        was = f"{RETIRED[number]}, which ggml has given up" if number in RETIRED else "not known here"
        hint = "convert the model again" if number in RETIRED else "update adapterkit"
        raise cursor.error(f"tensor '{name}' has type {number}, {was}", hint)
    if shape[-1] % kind.block:
        raise cursor.error(f"tensor '{name}' has rows of {shape[-1]}, no multiple of the {kind.block} of {kind.name}")
    return name, kind, shape, offset


def _check_places(tensors: Mapping[str, GGUFTensor], size: int, cursor: _Cursor) -> None:
    before: GGUFTensor | None = None
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.stop)):
        if tensor.stop > size:
            raise cursor.error(
                f"tensor '{tensor.name}' ends at byte {tensor.stop} of a file of {size}; the file is truncated or corrupt"
            )
        if before is not None and tensor.start < before.stop:
            if before.type.name == "Q2_0":
                hint = (
                    "some forks of llama.cpp write Q2_0 in groups of 128 under the same number; convert the model again"
                )
                raise cursor.error(f"tensor '{tensor.name}' overlaps '{before.name}', which is in Q2_0", hint)
            raise cursor.error(f"tensor '{tensor.name}' overlaps '{before.name}'")
        before = tensor


def _array(raw: bytes, at: int, item_type: int, count: int) -> list[Any]:
    if item_type == STRING:
        return list(_strings(raw, at, count))
    return list(struct.unpack_from(f"<{count}{SCALARS[item_type][1]}", raw, at))


def _strings(raw: bytes, at: int, count: int) -> Iterator[str]:
    for _ in range(count):
        stop = at + 8 + _U64.unpack_from(raw, at)[0]
        yield _text(raw[at + 8 : stop])
        at = stop


def _text(data: bytes) -> str:
    """Values may hold pieces of characters (tokens do); those survive as surrogates."""
    return data.decode("utf-8", "surrogateescape")
