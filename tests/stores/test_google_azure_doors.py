"""Recipes, versions, statements and signatures whose files lie in Google's or Azure's stores."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from models import plain_adapter, plain_base, read_bytes

import adapterkit
from adapterkit.errors import CheckFailed, UnsafeError
from adapterkit.provenance.attest import attest
from adapterkit.provenance.register import register
from adapterkit.provenance.signing import sign, verify
from adapterkit.recipe.run import build
from adapterkit.registry.evidence import attach_evidence
from adapterkit.stores.store import Store

BUCKET = "models"
RECIPE = """
    base = "{there}/base"
    adapters.one = "{there}/adapter"
    [outputs.merged]
    path = "{there}/out/merged"
    verify = "tensors"
    [outputs.kohya]
    to = "kohya"
    path = "{there}/out/one.safetensors"
    """


@pytest.fixture
def there(store: Store, place: str, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a folder with a base, an adapter and a merge, which lie in ``in`` here too."""
    monkeypatch.chdir(tmp_path)
    base = plain_base(tmp_path / "in" / "base", shards=2)
    plain_adapter(tmp_path / "in" / "adapter", base)
    adapterkit.merge(base, tmp_path / "in" / "adapter", tmp_path / "in" / "merged")
    for name, data in read_bytes(tmp_path / "in", record=True).items():
        store.put(f"{place}/{name}", data)
    return f"{store.root.scheme}://{BUCKET}/{place}"


@pytest.fixture
def got(store: Store) -> Callable[[str], bytes]:
    """The bytes at an address."""

    def one(at: str) -> bytes:
        found = store.head(at.removeprefix(f"{store.root.scheme}://{BUCKET}/"))
        assert found is not None, at
        return store.read(found.key, 0, found.size, found.etag)

    return one


def test_a_recipe_from_a_store_into_it(
    store: Store, there: str, got: Callable[[str], bytes], place: str, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("{there}", there))
    with pytest.raises(UnsafeError, match=r"outputs\.merged\.path lies outside"):
        build(recipe)
    made = build(recipe, outside=True)
    assert [row.state for row in made.outputs] == ["new"] * 2
    names = [name for name in read_bytes(tmp_path / "in" / "merged") if name.endswith(".safetensors")]
    assert len(names) == 2
    for name in names:
        assert got(f"{there}/out/merged/{name}") == (tmp_path / "in" / "merged" / name).read_bytes()
    assert got(f"{there}/out/one.safetensors")
    assert build(recipe, outside=True).changed == 0
    assert build(recipe, outside=True, locked=True).changed == 0
    assert not store.entries(f"{place}/out/.")

    name = "adapter/adapter_model.safetensors"  # trained again: another object of the same name
    plain_adapter(tmp_path / "again", tmp_path / "in" / "base", seed=7)
    store.put(f"{place}/{name}", (tmp_path / "again" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(CheckFailed, match=r"recipe\.lock"):
        build(recipe, outside=True, locked=True)
    assert {row.state for row in build(recipe, outside=True).outputs} == {"again"}


def test_versions_come_from_a_store(store: Store, there: str, place: str, home: Path) -> None:
    here = register("in/adapter", "here", base="in/base").record
    stored = register(f"{there}/adapter", "there", base=f"{there}/base").record
    assert (stored.content, stored.base, stored.kind) == (here.content, here.base, here.kind)
    assert stored.meta["from"] == f"{there}/adapter"
    merged = register(f"{there}/merged", "merged").record
    assert merged.operation is not None
    assert merged.operation.name == "merge"
    (name,) = [name for name in read_bytes(Path("in/base")) if "00001" in name]
    store.put(f"{place}/merged/{name}", Path("in/base", name).read_bytes())
    with pytest.raises(CheckFailed, match=rf"{re.escape(there)}/merged.* describes other weights"):
        register(f"{there}/merged", "merged")


def test_outputs_in_a_store_are_attested_signed_and_get_evidence(
    store: Store, there: str, got: Callable[[str], bytes], place: str, tmp_path: Path
) -> None:
    found = attach_evidence(f"{there}/merged", "tried", {"by": "us"})
    assert str(found.path) == f"{there}/merged/adapterkit.json"
    assert json.loads(got(f"{there}/merged/adapterkit.json"))["evidence"] == {"tried": {"by": "us"}}
    attach_evidence("in/merged", "tried", {"by": "us"})

    made = attest(f"{there}/merged", [f"{there}/base"])
    attest("in/merged", ["in/base"])
    assert str(made.path) == f"{there}/merged/adapterkit.intoto.json"
    assert got(str(made.path)) == Path("in/merged/adapterkit.intoto.json").read_bytes()

    pytest.importorskip("model_signing")
    from test_signing import key_pair

    private, public = key_pair(tmp_path)
    assert str(sign(f"{there}/merged", private).signature) == f"{there}/merged/model.sig"
    sign("in/merged", private)
    assert verify(f"{there}/merged", public).files == verify("in/merged", public).files
    store.put(f"{place}/merged/config.json", b"{}")
    with pytest.raises(CheckFailed, match=re.escape(f"{there}/merged")):
        verify(f"{there}/merged", public)
