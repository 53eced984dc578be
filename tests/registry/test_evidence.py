"""Evidence that is attached later: to a version, to an output; what `list`, `show` and the card make of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from models import plain_adapter, plain_base

import adapterkit
from adapterkit.cli import app
from adapterkit.errors import NotFound, RegistryError, UsageError
from adapterkit.hub.card import card
from adapterkit.registry import fsck, index, lineage, listing, register, store, verbs
from adapterkit.registry.beside import read_beside
from adapterkit.registry.checkout import checkout
from adapterkit.registry.evidence import attach_evidence, attach_verification
from adapterkit.registry.home import Home
from adapterkit.registry.record import Record
from adapterkit.registry.verification import Verification, read

TENSOR = Verification("tensor", True, {"tensors": 42, "max_abs": 0.0}, {}, "2026-01-31T23:59:59Z")
MODEL = Verification("model", True, {"kl": 0.00123456, "top1": 0.998}, {"max_kl": 0.01, "min_top1": 0.99})
FAILED = Verification("model", False, {"kl": 0.5}, {"max_kl": 0.01})
SCHEMA = json.loads((Path(adapterkit.__file__).parent / "registry/record.schema.json").read_text())


def listed(**filters: str) -> list[str]:
    return [f"{row.name}@{row.version}" for row in listing.listing(**filters).rows]  # type: ignore[arg-type]


def test_a_version_gets_it_as_a_new_version_of_the_same_artefact(home: Path, make) -> None:  # type: ignore[no-untyped-def]
    first = register.register(make(), "math").record
    verbs.tag("math@1", "prod")
    attached = attach_verification("math@prod", [TENSOR, MODEL])
    assert (attached.ref, attached.new, attached.path) == ("math@2", True, None)
    found = verbs.show("math@2")
    assert found.record.content == first.content
    assert found.missing == ()
    assert read(found.record.evidence) == (MODEL, TENSOR)
    jsonschema.validate(found.record.to_json(), SCHEMA)
    # Nothing moved: the old version is what it was, and prod is decided upon by its owner.
    assert verbs.show("math@prod").record == first
    assert listed(evidence="verification") == ["math@2"]
    assert fsck.fsck(home=home).clean
    # One artefact, so one node.
    assert len([node for node in lineage.lineage("math@2").nodes if node.refs]) == 1


def test_saying_the_same_again_changes_nothing(home: Path, make) -> None:  # type: ignore[no-untyped-def]
    register.register(make(), "math")
    assert attach_evidence("math", "fidelity", {"kept": 0.99}).new
    again = attach_evidence("math", "fidelity", {"kept": 0.99})
    assert (again.ref, again.new) == ("math@2", False)


def test_a_level_replaces_itself_and_keeps_the_others(home: Path, make) -> None:  # type: ignore[no-untyped-def]
    register.register(make(), "math", evidence={"fidelity": {"kept": 0.99}})
    attach_verification("math", [TENSOR, MODEL])
    attach_verification("math", [FAILED])
    evidence = verbs.show("math").record.evidence
    assert read(evidence) == (FAILED, TENSOR)
    assert evidence["fidelity"]["kept"] == 0.99
    # What did not hold is not evidence that it does.
    assert listed(evidence="verification") == ["math@2"]
    assert listed(evidence="verification-failed") == ["math@3"]
    assert listed(evidence="fidelity") == ["math@1", "math@2", "math@3"]


def test_an_output_gets_it_in_its_record(home: Path, tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapterkit.merge(base, [plain_adapter(tmp_path / "adapter", base)], tmp_path / "out")
    before = read_beside(tmp_path / "out")
    assert before is not None
    attached = attach_verification(tmp_path / "out", [TENSOR])
    assert attached.path == tmp_path / "out" / "adapterkit.json"
    after = read_beside(tmp_path / "out")
    assert after is not None
    assert read(after.evidence) == (TENSOR,)
    assert after.content == before.content
    assert not attach_verification(str(tmp_path / "out"), [TENSOR]).new
    # And from there into the registry.
    assert read(register.register(tmp_path / "out", "merged").record.evidence) == (TENSOR,)


def test_the_folder_of_a_version_is_that_version(home: Path, make) -> None:  # type: ignore[no-untyped-def]
    register.register(make(), "math")
    folder = checkout("math")
    kept = (folder / "adapterkit.json").read_bytes()
    assert attach_verification(folder, [TENSOR]).ref == "math@2"
    assert (folder / "adapterkit.json").read_bytes() == kept


def test_what_cannot_be_attached(home: Path, make) -> None:  # type: ignore[no-untyped-def]
    folder = make()
    register.register(folder, "math")
    with pytest.raises(NotFound, match=r"adapterkit\.json does not exist"):
        attach_verification(folder, [TENSOR])
    with pytest.raises(NotFound, match="'other' is not in the registry"):
        attach_verification("other", [TENSOR])
    with pytest.raises(RegistryError, match="nan, which JSON cannot say"):
        attach_evidence("math", "fidelity", {"kl": float("nan")})
    with pytest.raises(RegistryError, match=r"evidence\.verification\.tensor does not hold exactly"):
        attach_evidence("math", "verification", {"tensor": {"ok": True}})
    with pytest.raises(UsageError, match="kind of evidence"):
        attach_evidence("math", "../x", {})
    verbs.remove("math@1")
    with pytest.raises(UsageError, match="was removed"):
        attach_evidence("math@1", "fidelity", {"kl": 1.0})
    for wrong in ({"level": "a/b"}, {"ok": 1}, {"figures": [1]}, {"when": "yesterday"}, {"tool": "\n"}):
        with pytest.raises(RegistryError, match=r"evidence\.verification"):
            Verification(**{"level": "tensor", "ok": True, "figures": {}, **wrong})  # type: ignore[arg-type]
    assert index.ask(Home(home), lambda found: len(found.rows(hidden=True))) == 1


def test_show_and_the_card_say_it_in_words(home: Path, make) -> None:  # type: ignore[no-untyped-def]
    register.register(make(), "math", evidence={"fidelity": {"kept": 0.987654321}})
    attach_verification("math", [TENSOR, MODEL])
    shown = CliRunner().invoke(app, ["show", "math"]).output
    said = "held: kl 0.001235 (limit 0.01), top1 0.998 (limit 0.99); adapterkit"
    assert said in shown
    assert re.search(r"verification: tensor +held: max_abs 0, tensors 42; 2026-01-31, adapterkit", shown)
    assert "kept 0.9877" in shown
    text = card(verbs.show("math").record, "org/math", None, "README.md").decode()
    assert "| verification: model | held: kl 0.001235 (limit 0.01)" in text
    front = yaml.safe_load(text.split("---")[1])
    assert front["metrics"] == ["kl", "max_abs", "tensors", "top1"]


def test_under_the_lock_only_what_was_added_meanwhile_is_read(  # type: ignore[no-untyped-def]
    home: Path, make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another adds evidence between the first look and the lock: it is kept, and it alone is read under the lock."""
    register.register(make(), "math")
    register.register(make(content=b"other weights"), "math")
    for number in range(3):
        attach_evidence("math@1", f"kind-{number}", {"kept": number})
    real, load, held, under = Home.lock, store.load_known, [0], []

    @contextmanager
    def lock(at: Home, name: str) -> Iterator[None]:
        monkeypatch.setattr(Home, "lock", real)
        attach_evidence("math@1", "meanwhile", {"kept": 7})
        with real(at, name):
            held[0] += 1
            yield
            held[0] -= 1

    def read_record(at: Home, name: str, version: int) -> Record:
        under.extend([version] * held[0])
        return load(at, name, version)

    monkeypatch.setattr(Home, "lock", lock)
    monkeypatch.setattr(store, "load_known", read_record)
    found = attach_evidence("math@1", "last", {"kept": 9})
    assert set(found.record.evidence) == {"kind-0", "kind-1", "kind-2", "meanwhile", "last"}
    assert under == [6]
    assert fsck.fsck(home=home).clean
