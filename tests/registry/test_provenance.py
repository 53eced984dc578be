"""What a merge writes beside its output: the same bytes for the same inputs, and enough to find back where it came from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from models import plain_adapter, plain_base, read_bytes, read_tensors, write_checkpoint

import adapterkit
from adapterkit.adapters.load import load_adapter
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.errors import CheckFailed, UsageError
from adapterkit.provenance.record import adapter_parent, base_parent, created, label, recorder
from adapterkit.provenance.register import register
from adapterkit.registry import beside, lineage, verbs
from adapterkit.registry.identity import compare
from adapterkit.registry.weights import identity_of


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "base-7b", shards=2)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return plain_adapter(tmp_path / "adapter", base)


def record_of(folder: Path) -> Any:
    return json.loads((folder / "adapterkit.json").read_text())


def content_of(folder: Path) -> str:
    """The published rule: sha256 over the sorted sha256 of the files, cards and records left out."""
    digests = sorted(
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name not in ("adapterkit.json", "README.md")
    )
    return hashlib.sha256(json.dumps({"files": digests}, separators=(",", ":")).encode()).hexdigest()


def test_merge_says_what_it_did_to_what(base: Path, adapter: Path, tmp_path: Path, home: Path) -> None:
    other = plain_adapter(tmp_path / "other", base, seed=3)
    adapterkit.merge(base, [adapter, other], tmp_path / "out", weights=[0.5, -1], dtype="f32")
    record = record_of(tmp_path / "out")
    schema = json.loads((Path(adapterkit.__file__).parent / "registry/record.schema.json").read_text())
    jsonschema.validate(record, schema)
    assert (record["kind"], record["name"], record["version"]) == ("merged", "", 0)
    assert record["operation"]["name"] == "merge"
    assert record["operation"]["tool_version"] == adapterkit.__version__
    assert record["operation"]["parameters"]["dtype"] == "f32"
    assert [(p["role"], p["label"]) for p in record["parents"]] == [
        ("base", "base-7b"),
        ("adapter", "adapter"),
        ("adapter", "other"),
    ]
    assert [p["content"] for p in record["parents"]] == ["", content_of(adapter), content_of(other)]
    assert [p["parameters"] for p in record["parents"]] == [{}, {"weight": 0.5}, {"weight": -1.0}]
    assert str(tmp_path) not in json.dumps(record)
    # The identities are of what lies there, also in other shards.
    again = write_checkpoint(tmp_path / "again", read_tensors(tmp_path / "out"))
    assert record["identity"]["sampled"] == identity_of(open_checkpoint(again), "sampled").sampled
    assert record["base"]["sampled"] == identity_of(open_checkpoint(base), "sampled").sampled
    assert not home.exists()


def test_the_same_merge_elsewhere_writes_the_same_record(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapterkit.merge(base, [adapter], tmp_path / "one", jobs=1)
    monkeypatch.chdir(tmp_path)
    adapterkit.merge("base-7b", ["./adapter"], "two", jobs=3)
    assert read_bytes(tmp_path / "one", record=True) == read_bytes(tmp_path / "two", record=True)
    assert record_of(tmp_path / "one")["created"] == "1970-01-01T00:00:00Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1767225600")
    adapterkit.merge(base, [adapter], tmp_path / "three")
    assert record_of(tmp_path / "three")["created"] == "2026-01-01T00:00:00Z"
    weights = [path.name for path in (tmp_path / "one").glob("*.safetensors")]
    assert all((tmp_path / "one" / n).read_bytes() == (tmp_path / "three" / n).read_bytes() for n in weights)


@pytest.mark.parametrize("text", ["yesterday", "-5", "253402300800", "1e9", "٣"])
def test_a_time_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        created()


def test_full_record_names_every_byte(base: Path, adapter: Path, tmp_path: Path) -> None:
    adapterkit.merge(base, [adapter], tmp_path / "out", full_record=True)
    record = record_of(tmp_path / "out")
    assert {file["path"]: file["sha256"] for file in record["files"]} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "out").iterdir()
        if path.name != "adapterkit.json"
    }
    assert set(record["base"]["files"].values()) == {
        hashlib.sha256(path.read_bytes()).hexdigest() for path in base.glob("*.safetensors")
    }
    assert record["identity"]["merkle"] != record["base"]["merkle"]


def test_lineage_from_records_alone(base: Path, adapter: Path, tmp_path: Path, home: Path) -> None:
    """Merged before anything was registered, registered later, in another order."""
    adapterkit.merge(base, [adapter], tmp_path / "out")
    merged = register(tmp_path / "out", "merged").record
    register(adapter, "mine", base=base)
    register(base, "base", kind="base")
    assert merged.created > "2026"
    assert merged.kind == "merged"
    found = lineage.lineage("merged")
    labels = {node.label for node in found.nodes}
    assert labels == {"merged@1", "mine@1", "base@1"}
    edges = {(edge.parent, edge.child): edge.role for edge in found.edges}
    contents = {name: verbs.show(name).record.content for name in ("merged", "mine", "base")}
    assert edges[contents["mine"], contents["merged"]] == "adapter"
    assert edges[contents["base"], contents["merged"]] == "base"
    assert {node.label for node in lineage.lineage("mine", up=False).nodes} == {"mine@1", "merged@1"}


def test_registered_parents_are_named_by_version(base: Path, adapter: Path, tmp_path: Path, home: Path) -> None:
    register(adapter, "mine", base=base)
    register(base, "llama", kind="merged")
    adapterkit.merge("llama", ["mine@1"], tmp_path / "out")
    parents = record_of(tmp_path / "out")["parents"]
    assert [p["label"] for p in parents] == ["llama@1", "mine@1"]
    assert [p["content"] for p in parents] == [verbs.show(name).record.content for name in ("llama", "mine")]
    assert [p["record"] for p in parents] == [verbs.show(name).record.digest for name in ("llama", "mine")]


def test_weights_that_are_not_those_of_the_record_are_not_registered(
    base: Path, adapter: Path, tmp_path: Path, home: Path
) -> None:
    adapterkit.merge(base, [adapter], tmp_path / "out")
    shard = next((tmp_path / "out").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckFailed, match="other weights"):
        register(tmp_path / "out", "merged")
    assert register(tmp_path / "out", "merged", ignore_record=True).record.parents == ()


def test_records_of_adapters_hash_their_files(base: Path, adapter: Path) -> None:
    parents = [base_parent(open_checkpoint(base)), adapter_parent(load_adapter(adapter), weight=2.0)]
    write = recorder(
        "resize", "adapter", {"rank": 2}, parents, method="lora", evidence=lambda: {"fidelity": {"kl": 0.5}}
    )
    (adapter / "adapterkit.json").write_bytes(write(adapter)["adapterkit.json"])
    record = beside.read_beside(adapter)
    assert record is not None
    assert record.content == content_of(adapter)
    assert record.evidence["fidelity"]["kl"] == 0.5
    assert record.identity is None
    assert compare(record.base, identity_of(open_checkpoint(base), "probe")).verdict == "likely"


def test_labels_hold_no_paths(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    assert label(str(tmp_path / "x")) == "x"
    assert label("org/name@main", "0123456789" * 4) == "org/name@0123456"
    assert label("org/name") == "org/name"
    assert label("mine@3") == "mine@3"
    assert label(str(tmp_path / "a\nb")) == "a?b"


def test_a_gguf_file_has_its_record_beside_it(base: Path, tmp_path: Path, home: Path) -> None:
    import gguf
    import numpy as np

    def write(path: Path, seed: int) -> None:
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("token_embd.weight", np.random.default_rng(seed).normal(size=(4, 32)).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    staging = tmp_path / "staging"
    staging.mkdir()
    write(staging / "model.gguf", 1)
    made = recorder("merge", "merged", {}, [base_parent(open_checkpoint(base))])(staging)
    (staging / "model.gguf").rename(tmp_path / "model.gguf")
    (tmp_path / "model.gguf.adapterkit.json").write_bytes(made["adapterkit.json"])
    record = register(tmp_path / "model.gguf", "mine").record
    assert (record.kind, record.operation.name) == ("merged", "merge")
    assert record.identity.sampled
    assert [file.path for file in record.files] == ["model.gguf"]
    write(tmp_path / "model.gguf", 2)
    with pytest.raises(CheckFailed, match="other weights"):
        register(tmp_path / "model.gguf", "mine")


def test_fidelity_goes_into_the_record(base: Path, adapter: Path, tmp_path: Path, home: Path) -> None:
    report = adapterkit.merge(base, [adapter], tmp_path / "out", fidelity=True)
    found = record_of(tmp_path / "out")["evidence"]["fidelity"]
    assert report.fidelity is not None
    assert report.fidelity.worst is not None
    assert found["retention"] == pytest.approx(report.fidelity.retention, rel=1e-5)
    assert (found["format"], found["worst"]) == ("bf16", report.fidelity.worst.name)
    # Any number of threads gives the same bytes.
    adapterkit.merge(base, [adapter], tmp_path / "again", fidelity=True, jobs=3)
    assert record_of(tmp_path / "again") == record_of(tmp_path / "out")
    assert register(tmp_path / "out", "merged").record.evidence["fidelity"]["format"] == "bf16"


def test_a_base_may_be_named_when_the_record_knows_its_weights(
    base: Path, adapter: Path, tmp_path: Path, home: Path
) -> None:
    adapterkit.merge(base, [adapter], tmp_path / "out")
    named = register(tmp_path / "out", "merged", base_id="org/base").record.base
    assert named is not None
    assert named.id == "org/base"
    assert named.sampled == identity_of(open_checkpoint(base), "sampled").sampled
    with pytest.raises(UsageError, match="nothing says which weights"):
        register(adapter, "alone", base_id="org/base")


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_an_adapter_that_is_folded_a_second_time_is_named(
    quant: str | None, base: Path, adapter: Path, tmp_path: Path
) -> None:
    """It is computed as asked; the report says that the base holds it already, before and after the work."""
    first = adapterkit.merge(base, [adapter], tmp_path / "merged", quant=quant)
    assert not any("already" in note for note in first.notes)
    said = f"{adapter} is in {tmp_path / 'merged'} already"
    for dry in (True, False):
        again = adapterkit.merge(tmp_path / "merged", [adapter], tmp_path / "twice", dry_run=dry)
        assert any(note.startswith(said) for note in again.notes), again.notes
    other = plain_adapter(tmp_path / "other", base, seed=5)
    assert not any(
        "already" in note for note in adapterkit.merge(tmp_path / "merged", [other], tmp_path / "third").notes
    )


def test_an_adapter_is_named_through_records_of_records(base: Path, adapter: Path, tmp_path: Path, home: Path) -> None:
    """The base is a conversion of a merge into a merge: only the registry's records say what is in it."""
    more = plain_adapter(tmp_path / "more", base, seed=5)
    adapterkit.merge(base, [adapter], tmp_path / "one")
    adapterkit.merge(tmp_path / "one", [more], tmp_path / "two")
    adapterkit.convert(tmp_path / "two", tmp_path / "three", to="f32")

    def said() -> list[str]:
        notes = adapterkit.merge(tmp_path / "three", [adapter, more], tmp_path / "out", dry_run=True).notes
        return [note.partition(" is in ")[0] for note in notes if " already, as " in note]

    assert said() == []  # nobody knows
    register(tmp_path / "two", "two")
    assert said() == [str(more)]
    register(tmp_path / "one", "one")
    assert said() == [str(adapter), str(more)]
    (home / "format").write_text("a newer one")  # a registry that cannot be read is no reason to stop
    assert said() == []
