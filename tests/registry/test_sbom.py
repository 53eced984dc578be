"""The bill of materials of a version, held against CycloneDX's own schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import plain_adapter, plain_base

import adapterkit
from adapterkit.cli import main
from adapterkit.provenance.sbom import sbom
from adapterkit.registry.identity import Identity
from adapterkit.registry.record import FileEntry, Operation, Origin, Parent, Record
from adapterkit.registry.register import register

COMMIT = "0123456789" * 4
HASH = "ab" * 32


def checked(made: Any) -> Any:
    """The bill, after CycloneDX's strict JSON schema has taken it, and every reference in it leads somewhere."""
    schema = pytest.importorskip("cyclonedx.schema")
    validation = pytest.importorskip("cyclonedx.validation.json")
    problem = validation.JsonStrictValidator(schema.SchemaVersion.V1_6).validate_str(json.dumps(made))
    assert problem is None, str(problem)[:500]
    refs = [one["bom-ref"] for one in made["components"]] + [made["metadata"]["component"]["bom-ref"]]
    refs += [one["bom-ref"] for one in made["metadata"]["component"].get("pedigree", {}).get("ancestors", [])]
    assert len(set(refs)) == len(refs)
    assert {one["ref"] for one in made["dependencies"]} <= set(refs)
    assert {ref for one in made["dependencies"] for ref in one.get("dependsOn", [])} <= set(refs)
    return made


def full() -> Record:
    base = Identity("org/base-7b", COMMIT, (("model.safetensors", HASH),))
    return Record(
        "merged",
        files=(FileEntry("model.safetensors", 8, HASH), FileEntry("sub/config.json", 2, "cd" * 32)),
        name="desk",
        version=3,
        method="lora",
        parameters={"r": 8, "target_modules": ["q_proj"]},
        base=base,
        operation=Operation("merge", {"dtype": "auto", "weights": [1.0]}, "adapterkit", "9.9"),
        parents=(Parent("base", identity=base), Parent("adapter", HASH, label="support@3", parameters={"weight": 0.5})),
        evidence={"fidelity": {"retention": 0.999, "format": "nf4"}, "eval": {"held": True}},
        meta={"license": "apache-2.0", "dataset": "org/tickets", "run": "https://example.org/1", "description": "x"},
        origin=Origin("org/desk", COMMIT),
        created="2026-01-02T03:04:05Z",
    )


def test_all_that_a_record_says() -> None:
    made = checked(sbom(full()))
    model = made["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == ("machine-learning-model", "desk", "3")
    assert model["purl"] == f"pkg:huggingface/org/desk@{COMMIT}"
    assert model["licenses"] == [{"license": {"name": "apache-2.0"}}]
    card = model["modelCard"]
    assert card["modelParameters"]["datasets"] == [{"type": "dataset", "name": "org/tickets"}]
    figures = {one["type"]: one["value"] for one in card["quantitativeAnalysis"]["performanceMetrics"]}
    assert figures == {"fidelity.retention": "0.999", "eval.held": "true"}
    files = {one["name"]: one["hashes"] for one in made["components"] if one["type"] == "file"}
    assert files["model.safetensors"] == [{"alg": "SHA-256", "content": HASH}]
    base, adapter = (one for one in made["components"] if one["type"] == "machine-learning-model")
    assert base["purl"] == f"pkg:huggingface/org/base-7b@{COMMIT}"
    assert adapter["name"] == "support@3"
    assert {"name": "adapterkit:weight", "value": "0.5"} in adapter["properties"]
    assert made["metadata"]["timestamp"] == "2026-01-02T03:04:05Z"
    assert made["dependencies"][0]["dependsOn"] == [base["bom-ref"], adapter["bom-ref"]]
    assert sbom(full()) == made


@pytest.mark.parametrize(
    "record",
    [
        Record("adapter", files=(FileEntry("a.safetensors", 8, HASH),), created="1970-01-01T00:00:00Z"),
        Record("adapter", files=(FileEntry("a.safetensors", 8, HASH),), name="x", version=1, base=Identity("a/b")),
        Record("base", identity=Identity("a/b", COMMIT), name="b", version=1),
        Record("merged", files=(FileEntry("ä.json", 8, HASH),), meta={"a\nb": "c\x1b"}, evidence={"a": {"b": 1e300}}),
    ],
)
def test_records_that_say_little_or_odd_things(record: Record) -> None:
    checked(sbom(record))


def test_a_merge_by_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "home"))
    base = plain_base(tmp_path / "base")
    adapterkit.merge(base, [plain_adapter(tmp_path / "adapter", base)], tmp_path / "out", fidelity=True)
    register(tmp_path / "out", "desk")
    for arguments, code in ((["show", "desk", "--sbom"], 0), (["show", "desk", "--sbom", "--json"], 2)):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == code
        if not code:
            made = checked(json.loads(capsys.readouterr().out))
            assert str(tmp_path) not in json.dumps(made)
            assert len(made["dependencies"][0]["dependsOn"]) == 2
