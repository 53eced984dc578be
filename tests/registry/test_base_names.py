"""A name that a config claims for its base is held against the weights: those of the base that is registered so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import plain_adapter, plain_base, read_tensors
from safetensors.torch import save_file

from adapterkit.provenance.register import register
from adapterkit.registry.listing import listing
from adapterkit.verbs.check import check


@pytest.fixture
def siblings(home: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Two bases of the same shapes, the first registered as acme/house, and an adapter whose config claims that name."""
    house, garden = plain_base(tmp_path / "house"), plain_base(tmp_path / "garden")
    moved = {name: tensor + 1 for name, tensor in read_tensors(garden).items()}
    save_file(moved, garden / "model.safetensors", metadata={"format": "pt"})
    register(house, name="house", kind="base", base_id="acme/house", home=home)
    register(garden, name="garden", kind="base", home=home)
    adapter = plain_adapter(tmp_path / "tone", house, base_model_name_or_path="acme/house")
    return house, garden, adapter


def test_a_claim_that_the_weights_contradict(siblings: tuple[Path, Path, Path], home: Path) -> None:
    _, garden, adapter = siblings
    found = register(adapter, name="tone", base=str(garden), home=home)
    (warning,) = found.warnings
    assert "names acme/house" in warning
    assert "house@1" in warning
    assert found.record.base is not None
    assert found.record.base.id == ""
    assert [row.base for row in listing(name="tone", home=home).rows] == [found.record.base.label]
    assert listing(base="acme/house", kind="adapter", home=home).rows == ()
    assert [row.name for row in listing(base="garden", kind="adapter", home=home).rows] == ["tone"]


def test_a_claim_that_holds(siblings: tuple[Path, Path, Path], home: Path) -> None:
    house, _, adapter = siblings
    found = register(adapter, name="tone", base=str(house), home=home)
    assert found.warnings == ()
    assert found.record.base is not None
    assert found.record.base.id == "acme/house"


def test_a_name_that_nobody_registered_is_believed(siblings: tuple[Path, Path, Path], home: Path) -> None:
    _, garden, adapter = siblings
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "acme/barn"}))
    found = register(adapter, name="tone", base=str(garden), home=home)
    assert found.warnings == ()
    assert found.record.base is not None
    assert found.record.base.id == "acme/barn"


def test_check_says_it_too(siblings: tuple[Path, Path, Path], home: Path, tmp_path: Path) -> None:
    """Also where the folder is called like the base that is claimed."""
    house, garden, adapter = siblings
    house.rename(tmp_path / "was")
    garden.rename(house)
    found = [one for one in check(house, [adapter]).findings if one.code == "other-base"]
    assert len(found) == 1
    assert "registered as house@1" in found[0].message
    assert [one for one in check(tmp_path / "was", [adapter]).findings if "registered as" in one.message] == []


def _claiming(adapter: Path, name: str) -> None:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": name}))


def test_registered_names_and_folders_are_held_against_the_weights(
    siblings: tuple[Path, Path, Path], home: Path, tmp_path: Path
) -> None:
    """The config claims a base by its registered name, by a version of it, or by its folder; no Hub id is anywhere."""
    house, garden, adapter = siblings
    register(house, name="garden", kind="base", home=home)  # garden@2 has the weights of the house
    register(house, name="loft", kind="base", home=home)
    claims = {"loft": "loft@1", "garden@2": "garden@2", str(house): "the folder"}
    for number, (name, said) in enumerate(claims.items()):
        _claiming(adapter, name)
        found = register(adapter, name=f"tone-{number}", base=str(garden), home=home)
        (warning,) = found.warnings
        assert f"names {name} as its base" in warning
        assert said in warning
        assert found.record.base is not None
        assert found.record.base.id == ""
        (finding,) = [one for one in check(garden, [adapter]).findings if "has other weights than" in one.message]
        assert said in finding.message
        # A record that knows the weights does not silence what its config says.
        assert [one.level for one in check(garden, [f"tone-{number}"]).findings if said in one.message] == ["warning"]
        assert register(adapter, name=f"right-{number}", base=str(house), home=home).warnings == ()
        assert [one for one in check(house, [adapter]).findings if "has other" in one.message] == []
    # A name whose versions have both weights, a version that is not here, a folder without a model: no contradiction.
    (tmp_path / "empty").mkdir()
    quiet = ("garden", "loft@9", str(tmp_path / "empty"), "tone-0", "~nobody-here/x", "loft@@", "loft@a b")
    for number, name in enumerate(quiet):
        _claiming(adapter, name)
        assert register(adapter, name=f"quiet-{number}", base=str(garden), home=home).warnings == (), name


def test_a_base_with_an_id_and_a_config_that_claims_another(siblings: tuple[Path, Path, Path], home: Path) -> None:
    _, garden, adapter = siblings
    register(garden, name="named", kind="base", base_id="acme/garden", home=home)
    found = register(adapter, name="tone", base="named", home=home)
    assert "names acme/house as its base" in found.warnings[0]
    assert found.record.base is not None
    assert found.record.base.id == "acme/garden"


def test_list_and_show_call_a_base_by_its_name(home: Path, make) -> None:  # type: ignore[no-untyped-def]
    from click.testing import CliRunner

    from adapterkit.cli import app
    from adapterkit.registry import register, verbs
    from adapterkit.registry.identity import Identity

    weights = Identity(shapes="1" * 64, sampled="2" * 64)
    register.register(make(content=b"1"), "tone", base=weights)
    register.register(make(content=b"2"), "other", base=Identity(sampled="3" * 64))
    assert verbs.show("tone").base.startswith("sampled 2222")
    register.register_base(Identity("org/base", "", (), shapes="1" * 64, sampled="2" * 64), "house-base")
    listed = CliRunner().invoke(app, ["list"]).output
    assert "house-base" in next(line for line in listed.splitlines() if line.startswith("tone"))
    assert "sampled 3333" in next(line for line in listed.splitlines() if line.startswith("other"))
    assert "house-base (sampled 2222" in CliRunner().invoke(app, ["show", "tone"]).output
    verbs.remove("house-base@1")
    assert "house-base" not in CliRunner().invoke(app, ["list"]).output
