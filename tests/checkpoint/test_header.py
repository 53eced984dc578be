"""Safetensors headers: what is refused, and that the rest is read exactly as the safetensors library reads it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes

from adapterkit.checkpoint.files import BytesFile
from adapterkit.checkpoint.header import MAX_HEADER, Header, build_header, check_name, parse_header
from adapterkit.checkpoint.tensor import Stored
from adapterkit.dtypes import DTYPES
from adapterkit.errors import AdapterkitError, CheckpointError, UnsafeError

if TYPE_CHECKING:
    from collections.abc import Callable

quick = settings(max_examples=150)


def parse(data: bytes) -> Header:
    source = BytesFile("file", data)
    return parse_header(source.read, source.size, "file")


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


GOOD = save_bytes(
    {
        "a.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "c.bias": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 7),
    },
    metadata={"format": "pt", "note": "ünïcode"},
)

BAD: dict[str, tuple[bytes, type[AdapterkitError], str]] = {
    "empty file": (b"", CheckpointError, "too short"),
    "seven bytes": (b"\0" * 7, CheckpointError, "too short"),
    "huge length": ((1 << 63).to_bytes(8, "little") + b"{}", CheckpointError, "claims"),
    "over the limit": ((MAX_HEADER + 1).to_bytes(8, "little") + b"{}", CheckpointError, "claims"),
    "length past the end": (file_of({})[:-1], CheckpointError, "claims"),
    "no header": ((0).to_bytes(8, "little"), CheckpointError, "brace"),
    "leading space": (file_of(b" {}"), CheckpointError, "brace"),
    "an array": (file_of(b"[]"), CheckpointError, "brace"),
    "not JSON": (file_of(b"{nope}"), CheckpointError, "JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), CheckpointError, "JSON"),
    "deeply nested": (file_of(b'{"a":' + b"[" * 200_000), CheckpointError, "JSON"),
    "number of many digits": (file_of(b'{"a":' + b"9" * 100_000 + b"}"), CheckpointError, "JSON"),
    "duplicate tensor": (
        file_of(b'{"a":%s,"a":%s}' % ((b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}',) * 2), b"x"),
        CheckpointError,
        "'a' appears twice",
    ),
    "duplicate field": (
        file_of(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        CheckpointError,
        "'dtype' appears twice",
    ),
    "overlap": (file_of({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12), CheckpointError, "overlaps"),
    "gap": (file_of({"a": entry(0, 4), "b": entry(8, 12)}, b"x" * 12), CheckpointError, "gap"),
    "gap at the start": (file_of({"a": entry(4, 8)}, b"x" * 8), CheckpointError, "gap"),
    "truncated": (file_of({"a": entry(0, 8)}, b"x" * 7), CheckpointError, "truncated"),
    "longer": (file_of({"a": entry(0, 8)}, b"x" * 9), CheckpointError, "longer"),
    "wrong size": (file_of({"a": entry(0, 8, [3])}, b"x" * 8), CheckpointError, "takes 12 bytes, not 8"),
    "backwards": (file_of({"a": entry(8, 0, [])}, b""), CheckpointError, "malformed"),
    "negative": (file_of({"a": entry(0, 4, [-1])}, b"x" * 4), CheckpointError, "not a size"),
    "float": (file_of({"a": entry(0, 4, [1.0])}, b"x" * 4), CheckpointError, "whole number"),
    "boolean": (file_of({"a": entry(0, 4, [True])}, b"x" * 4), CheckpointError, "malformed"),
    "shape is a map": (file_of({"a": {**entry(0, 4), "shape": {}}}, b"x" * 4), CheckpointError, "malformed"),
    "three offsets": (file_of({"a": {**entry(0, 4), "data_offsets": [0, 4, 4]}}, b"x" * 4), CheckpointError, "malformed"),
    "a field more": (file_of({"a": {**entry(0, 4), "scale": 1}}, b"x" * 4), CheckpointError, "malformed"),
    "entry is a list": (file_of({"a": [1]}), CheckpointError, "malformed"),
    "unknown dtype": (file_of({"a": entry(0, 4, dtype="F128")}, b"x" * 4), CheckpointError, "F128"),
    "half a byte": (file_of({"a": entry(0, 1, [3], "F4")}, b"x"), CheckpointError, "malformed"),
    "overflow": (file_of({"a": entry(0, 0, [0, 1 << 62, 4])}), CheckpointError, "malformed"),
    "many dimensions": (file_of({"a": entry(0, 4, [1] * 100_000)}, b"x" * 4), CheckpointError, "malformed"),
    "product of many numbers": (file_of({"a": entry(0, 4, [1 << 60] * 300_000)}, b"x" * 4), CheckpointError, "malformed"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), CheckpointError, "strings"),
    "metadata of half a character": (file_of(b'{"__metadata__":{"a":"\\ud800"}}'), CheckpointError, "strings"),
    "name of a path": (file_of({"../../etc/x": entry(0, 0)}), UnsafeError, "plain name"),
    "absolute name": (file_of({"/etc/x": entry(0, 0)}), UnsafeError, "plain name"),
    "name with a newline": (file_of({"a\nb": entry(0, 0)}), UnsafeError, r"a\\nb"),
    "name with NUL": (file_of({"a\0b": entry(0, 0)}), UnsafeError, r"a\\x00b"),
    "name with an escape": (file_of({"\x1b[2Ja": entry(0, 0)}), UnsafeError, r"\\x1b"),
    "name with half a character": (file_of(b'{"\\ud800":1}'), UnsafeError, "plain name"),
    "name written right to left": (file_of({"a\u202eb": entry(0, 0)}), UnsafeError, "plain name"),
    "no name": (file_of({"": entry(0, 0)}), UnsafeError, "plain name"),
    "long name": (file_of({"a" * 5000: entry(0, 0)}), UnsafeError, "plain name"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    data, error, words = BAD[name]
    started = time.process_time()
    with pytest.raises(error, match=words) as caught:
        parse(data)
    assert time.process_time() - started < 1
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def same_as_library(data: bytes) -> None:
    """Refused with our own error, or read exactly as the safetensors library reads it."""
    started = time.process_time()
    refused, header = None, None
    try:
        header = parse(data)
    except AdapterkitError as error:
        refused = str(error)
    assert time.process_time() - started < 1
    if header is None:
        assert refused is not None
        assert refused.isprintable()
        return
    theirs = load_bytes(data)  # raises when the library refuses what was read
    assert set(header.tensors) == set(theirs)
    source = BytesFile("file", data)
    for name, info in header.tensors.items():
        ours = Stored(name, info.dtype, info.shape, source, info.start)
        tensor = theirs[name]
        assert (ours.dtype.torch, ours.shape) == (tensor.dtype, tuple(tensor.shape))
        mine = ours.read(0, ours.numel)
        assert torch.equal(mine.view(torch.uint8), tensor.flatten().view(torch.uint8))


def test_a_good_file_is_read() -> None:
    header = parse(GOOD)
    assert set(header.tensors) == {"a.weight", "b", "c.bias", "empty"}
    assert header.metadata == {"format": "pt", "note": "ünïcode"}
    same_as_library(GOOD)


@quick
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
    same_as_library(bytes(data))


@quick
@given(st.integers(0, len(GOOD)), st.binary(max_size=24), st.integers(0, 24))
def test_spliced_bytes(at: int, put: bytes, cut: int) -> None:
    data = GOOD[:at] + put + GOOD[at + cut :]
    same_as_library(data)
    length = int.from_bytes(GOOD[:8], "little") + len(put) - cut
    if at >= 8 and length >= 0:
        same_as_library(length.to_bytes(8, "little") + data[8:])


sizes = st.one_of(
    st.integers(-2, 20),
    st.sampled_from([1 << 31, 1 << 32, 1 << 60, 1 << 63, 1 << 64, (1 << 64) - 1]),
    st.sampled_from([1.0, None, True, "1", [], 1e300]),
)
entries = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from([*DTYPES, "F31", "", None, 3]),
            "shape": st.one_of(st.lists(sizes, max_size=4), st.just({}), st.just("12"), st.none()),
            "data_offsets": st.one_of(st.lists(sizes, max_size=3), st.none()),
            "extra": st.just(1),
        },
    ),
    st.none(),
    st.integers(),
    st.text(max_size=3),
)


@quick
@given(st.dictionaries(st.text(max_size=6), entries, max_size=4), st.integers(0, 40))
def test_headers_of_all_kinds(header: dict[str, Any], size: int) -> None:
    same_as_library(file_of(header, bytes(size)))


@quick
@given(
    st.dictionaries(
        st.from_regex(r"[a-z_.0-9]{1,12}", fullmatch=True).filter(lambda name: ".." not in name),
        st.tuples(
            st.sampled_from(["F32", "BF16", "I8", "F64", "BOOL", "F16"]), st.lists(st.integers(0, 4), max_size=3)
        ),
        max_size=6,
    ),
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=5), st.text(st.characters(codec="utf-8"), max_size=5), max_size=3
    ),
)
def test_what_we_write_the_library_reads(tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]) -> None:
    rows = [(name, DTYPES[code], tuple(shape)) for name, (code, shape) in tensors.items()]
    header, offsets = build_header(rows, metadata)
    data = header + bytes(sum(dtype.nbytes(shape) for _, dtype, shape in rows))
    assert len(header) % 8 == 0
    found = parse(data)
    assert dict(found.metadata) == metadata
    assert {name: info.start for name, info in found.tensors.items()} == offsets
    theirs = load_bytes(data)
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == {n: s for n, _, s in rows}


def test_the_same_name_in_metadata_and_tensors_is_no_tensor() -> None:
    assert parse(file_of({"__metadata__": {"a": "b"}, "a": entry(0, 4)}, b"x" * 4)).metadata == {"a": "b"}


@pytest.mark.parametrize("name", ["model.layers.0.weight", "a", "x-y_z.1", "Ünïcode.weight", "a/b"])
def test_plain_names(name: str) -> None:
    assert check_name(name, "file") == name


def test_library_refuses_what_we_call_corrupt() -> None:
    """The oracle is alive: it refuses the structural damage in the table above, too."""
    refused = 0
    for data, error, _ in BAD.values():
        if error is CheckpointError:
            try:
                load_bytes(data)
            except (SafetensorError, RuntimeError, ValueError, OverflowError, KeyError):
                refused += 1
    assert refused > 20


def reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: data[offset : offset + length]


def test_a_file_that_shrinks_while_it_is_read() -> None:
    with pytest.raises(CheckpointError, match="JSON"):
        parse_header(reader(GOOD[:40]), len(GOOD), "file")


def test_null_metadata_as_mlx_writes_it() -> None:
    data = file_of({"__metadata__": None, "a": entry(0, 8)}, b"\0" * 8)
    assert parse(data).metadata == {}
    assert load_bytes(data)["a"].tolist() == [0.0, 0.0]
