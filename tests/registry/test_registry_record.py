"""Records: one spelling, three digests, strict reading, newer schemas kept as they are."""

from __future__ import annotations

import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterkit.errors import AdapterkitError, CheckFailed, RegistryError
from adapterkit.registry import register
from adapterkit.registry.beside import read_beside, write_beside
from adapterkit.registry.canonical import canonical, freeze, parse, thaw
from adapterkit.registry.identity import Identity
from adapterkit.registry.record import FileEntry, OpaqueRecord, Operation, Origin, Parent, Record, read

HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=4)
WORD = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+ -]{0,20}", fullmatch=True)
IDENTITY = st.builds(
    Identity,
    id=st.sampled_from(["", "org/base", "gpt2"]),
    commit=st.sampled_from(["", "a" * 40]),
    files=st.dictionaries(st.sampled_from(["a.safetensors", "b/c.gguf"]), HEX).map(lambda d: tuple(d.items())),
    shapes=HEX | st.just(""),
    merkle=HEX | st.just(""),
)
FILES = st.lists(
    st.builds(FileEntry, st.sampled_from(["a", "b/ü.bin", "c c"]), st.integers(0, 2**40), HEX, st.booleans()),
    min_size=1,
    max_size=3,
    unique_by=lambda file: file.path,
).map(tuple)
RECORDS = st.builds(
    Record,
    kind=st.sampled_from(["adapter", "merged", "base"]),
    files=FILES,
    name=st.just("name"),
    version=st.integers(1, 10**6),
    method=WORD,
    parameters=OBJECT,
    base=st.none() | IDENTITY,
    identity=st.none() | IDENTITY,
    operation=st.none() | st.builds(Operation, WORD, OBJECT, WORD, WORD),
    parents=st.lists(
        st.builds(Parent, role=WORD, content=HEX, identity=st.none() | IDENTITY, record=HEX, parameters=OBJECT),
        max_size=2,
    ).map(tuple),
    evidence=st.dictionaries(TEXT, OBJECT, max_size=2),
    meta=st.dictionaries(TEXT, TEXT, max_size=3),
    origin=st.none() | st.just(Origin("org/model", "b" * 40)),
    created=st.just("2026-01-31T23:59:59Z"),
)


def record(**fields: Any) -> Record:
    given_ = {"kind": "adapter", "files": (FileEntry("a.safetensors", 3, "a" * 64),), "created": "2026-01-31T23:59:59Z"}
    return Record(**{**given_, **fields})


@given(JSON)
def test_canonical_bytes_read_back_to_the_same_value_and_do_not_depend_on_key_order(value: Any) -> None:
    data = canonical(thaw(freeze(value, "value")))
    again = parse(data, "value")
    assert again == value
    assert canonical(again) == data == json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    if isinstance(value, dict):
        assert canonical(dict(reversed(value.items()))) == data


@given(RECORDS)
@settings(max_examples=60)
def test_a_record_reads_back_and_its_digest_is_the_sha256_of_the_rest(wanted: Record) -> None:
    assert read(wanted.data, "record") == wanted
    plain = json.loads(wanted.data)
    digest = plain.pop("digest")
    spelled = json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
    assert hashlib.sha256(spelled).hexdigest() == digest == wanted.digest


@given(RECORDS, st.data())
@settings(max_examples=60)
def test_no_flipped_bit_of_a_record_is_read(wanted: Record, data: st.DataObject) -> None:
    damaged = bytearray(wanted.data)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(RegistryError):
        read(bytes(damaged), "record")


@given(RECORDS)
@settings(max_examples=40)
def test_the_published_schema_accepts_every_record(wanted: Record) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(resources.files("adapterkit.registry").joinpath("record.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(json.loads(wanted.data))


def test_the_published_schema_names_every_field() -> None:
    schema = json.loads(resources.files("adapterkit.registry").joinpath("record.schema.json").read_text())
    full = record(
        operation=Operation("merge"),
        parents=(Parent("base", "c" * 64),),
        origin=Origin("org/x", "b" * 40),
    ).to_json()
    assert schema["required"] == sorted(schema["properties"]) == sorted(full)
    assert schema["properties"]["schema"]["const"] == full["schema"]
    for key in ("files", "parents"):
        assert sorted(schema["properties"][key]["items"]["properties"]) == sorted(full[key][0])
    for key in ("operation", "origin"):
        assert sorted(schema["properties"][key]["anyOf"][1]["properties"]) == sorted(full[key])


def test_content_is_the_files_without_paths_cards_and_signatures() -> None:
    one = record(meta={"author": "somebody"}, evidence={"fidelity": {"kl": 0.1}})
    other = record(
        files=(FileEntry("renamed.safetensors", 3, "a" * 64), FileEntry("README.md", 9, "d" * 64)),
        name="other",
        version=4,
        origin=Origin("org/x", "b" * 40),
    )
    assert one.content == other.content
    assert one.content == hashlib.sha256(b'{"files":["' + b"a" * 64 + b'"]}').hexdigest()
    assert record(files=(FileEntry("a.safetensors", 3, "b" * 64),)).content != one.content


def test_body_leaves_out_name_version_and_time_only() -> None:
    one = record(name="a", version=1)
    assert one.body == record(name="b", version=7, created="2027-01-01T00:00:00Z").body
    assert one.body != record(name="a", version=1, meta={"note": "x"}).body


BAD = {
    "kind": {"kind": "model"},
    "no file": {"files": ()},
    "name without version": {"name": "a"},
    "version without name": {"version": 3},
    "bool version": {"name": "a", "version": True},
    "case": {"files": (FileEntry("A", 1, "a" * 64), FileEntry("a", 1, "a" * 64))},
    "meta": {"meta": {"a": 1}},
    "evidence": {"evidence": {"kl": 0.1}},
    "nan": {"parameters": {"x": float("nan")}},
    "bytes": {"parameters": {"x": b"x"}},
    "key": {"parameters": {1: 2}},
    "surrogate": {"meta": {"a": "\ud800"}},
    "deep": {"parameters": {"x": json.loads("[" * 40 + "]" * 40)}},
    "huge": {"parameters": {"x": 1 << 70}},
    "method": {"method": "lora\n"},
    "created": {"created": "yesterday"},
}


@pytest.mark.parametrize("fields", BAD.values(), ids=BAD)
def test_a_record_that_breaks_a_rule_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RegistryError):
        record(**fields)


def test_parts_that_break_a_rule_are_refused() -> None:
    for wrong in (
        lambda: FileEntry("../x", 1, "a" * 64),
        lambda: FileEntry("/x", 1, "a" * 64),
        lambda: FileEntry("a/./b", 1, "a" * 64),
        lambda: FileEntry("a\\b", 1, "a" * 64),
        lambda: FileEntry("a\x00b", 1, "a" * 64),
        lambda: FileEntry("a\u202eb", 1, "a" * 64),
        lambda: FileEntry("e\u0301", 1, "a" * 64),
        lambda: FileEntry("x", -1, "a" * 64),
        lambda: FileEntry("x", 1, "A" * 64),
        lambda: FileEntry("x", 1, "a" * 64 + "\n"),
        lambda: Parent("base"),
        lambda: Parent("base", label="two\nlines", content="a" * 64),
        lambda: Origin("org/x", "main"),
        lambda: Origin("/local/path", "b" * 40),
        lambda: Identity("/models/base"),
        lambda: Identity("../base"),
        lambda: Identity(merkle="x"),
    ):
        with pytest.raises(RegistryError):
            wrong()


def resealed(change: dict[str, Any]) -> bytes:
    """A record file with changed fields and a digest that holds."""
    plain = {**json.loads(record(name="a", version=1).data), **change}
    plain.pop("digest")
    digest = hashlib.sha256(canonical(plain)).hexdigest()
    return canonical({**plain, "digest": digest}) + b"\n"


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"type": "other"},
        {"schema": "1"},
        {"files": "x"},
        {"files": [{"path": "x"}]},
        {"files": [{"path": "../x", "size": 1, "sha256": "a" * 64, "stored": True}]},
        {"parents": [{"role": "base"}]},
        {"base": {"id": "org/x", "extra": "y"}},
        {"base": {"id": 3}},
        {"name": "../x"},
        {"name": 5},
        {"kind": []},
        {"meta": {"a": None}},
        {"parameters": []},
        {"operation": {"name": "merge"}},
    ],
)
def test_a_well_sealed_record_with_wrong_fields_is_refused_in_one_sentence(change: dict[str, Any]) -> None:
    with pytest.raises(RegistryError) as caught:
        read(resealed(change), "r.json")
    assert "r.json" in caught.value.message
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b"\xff", b'{"a":1,"a":2}', b"[" * 100_000, b'{"type":NaN}', b"1" * 5000]
)
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(RegistryError):
        read(data, "r.json")


def test_a_record_of_a_newer_schema_is_opaque_and_still_checked() -> None:
    data = resealed({"schema": 9, "kind": "hologram", "new_field": {"x": 1}})
    found = read(data, "r.json")
    assert isinstance(found, OpaqueRecord)
    assert (found.schema, found.name, found.version, found.data) == (9, "a", 1, data)
    with pytest.raises(RegistryError):
        read(data.replace(b"hologram", b"holograM"), "r.json")


def test_fields_cannot_be_changed() -> None:
    found = record(parameters={"a": {"b": [1]}})
    with pytest.raises(AttributeError):
        found.kind = "merged"  # type: ignore[misc]
    with pytest.raises(TypeError):
        found.parameters["a"]["b"] = 2
    assert found.parameters["a"]["b"] == (1,)


def test_the_record_beside_an_output_is_used_and_must_describe_its_files(home: Path, make: Any) -> None:
    folder = make()
    first = register.register(folder, "one", meta={"run": "7"}, evidence={"fidelity": {"kl": 1e-5}}).record
    write_beside(folder, first.registered("", 0))
    assert read_beside(folder) == first.registered("", 0)
    other = register.register(folder, "two").record
    assert (other.body, other.content) == (first.body, first.content)
    (folder / "adapter_model.safetensors").write_bytes(b"trained on")
    with pytest.raises(CheckFailed, match="adapter_model"):
        register.register(folder, "two")
    assert register.register(folder, "two", ignore_beside=True).record.evidence == {}
    (folder / "adapterkit.json").write_bytes(b"{}")
    with pytest.raises(AdapterkitError):
        register.register(folder, "two")
