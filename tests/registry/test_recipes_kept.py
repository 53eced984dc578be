"""Versions kept as their recipe: large files go, and come back with the same bytes or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from models import plain_adapter, plain_base

import adapterkit
from adapterkit.cli import app
from adapterkit.errors import CheckFailed, NotFound, UsageError
from adapterkit.provenance.register import register
from adapterkit.registry import blobs, fsck, gc, remaking, verbs
from adapterkit.registry.checkout import checkout
from adapterkit.registry.home import Home
from adapterkit.verbs.remake import remake


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remaking, "SMALL", 2000)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "base")


@pytest.fixture
def desk(home: Path, tmp_path: Path, base: Path) -> Path:
    """A base that is known by its identity, an adapter, and their merge, registered with its bytes."""
    register(base, "house", kind="base")
    register(plain_adapter(tmp_path / "adapter", base), "tone", base=base)
    adapterkit.merge(base, ["tone"], tmp_path / "merged")
    register(tmp_path / "merged", "desk")
    return home


def kept(home: Path) -> int:
    return sum(path.stat().st_size for path in (home / "objects").rglob("*") if path.is_file())


def test_a_ladder_costs_what_one_costs(desk: Path, tmp_path: Path) -> None:
    before = kept(desk)
    for word in ("f32", "bf16", "f16"):
        adapterkit.convert("desk", tmp_path / word, to=word)
        found = register(tmp_path / word, f"desk-{word}", as_recipe=True).record
        large = [file for file in found.files if file.path.endswith(".safetensors")]
        assert large
        assert not any(file.stored for file in large)
    assert kept(desk) < before + 10_000  # configs
    assert fsck.fsck().clean
    folder = checkout("desk-f32")  # made again, because somebody wants the bytes
    for path in sorted((tmp_path / "f32").glob("*.safetensors")):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    adapterkit.convert("desk-bf16", tmp_path / "again", to="f32")  # and where a name stands for a path
    assert fsck.fsck().clean
    assert verbs.show("desk-f32").missing == ()


def test_gc_frees_what_was_made_again(desk: Path, tmp_path: Path) -> None:
    adapterkit.convert("desk", tmp_path / "wide", to="f32")
    record = register(tmp_path / "wide", "wide", as_recipe=True).record
    before = kept(desk)
    assert remake("wide") > 0
    assert kept(desk) > before
    assert remake("wide") == 0
    assert gc.gc(apply=True, keep_days=0).bytes > 0
    assert kept(desk) == before
    assert not all(blobs.has(Home(desk), file.sha256, file.size) for file in record.files)
    assert remake("wide") > 0


def test_a_merge_on_a_base_that_is_a_folder_of_ones_own(desk: Path, tmp_path: Path, base: Path) -> None:
    with pytest.raises(NotFound, match="only the identity is here"):
        register(tmp_path / "merged", "again", as_recipe=True)
    register(tmp_path / "merged", "again", as_recipe=True, base=base)
    verbs.remove("desk@1")
    gc.gc(apply=True, keep_days=0)
    with pytest.raises(NotFound, match="only the identity is here"):
        checkout("again")
    assert remake("again", base=base) > 0
    assert checkout("again").is_dir()


def test_other_bytes_are_refused(desk: Path, tmp_path: Path, base: Path) -> None:
    adapterkit.convert("desk", tmp_path / "wide", to="f32")
    record = register(tmp_path / "wide", "wide", as_recipe=True).record
    path = next((tmp_path / "wide").glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    (tmp_path / "wide" / "adapterkit.json").unlink()
    with pytest.raises(UsageError, match="nothing says how"):
        register(tmp_path / "wide", "wide", as_recipe=True)
    # The same operation, said of other bytes.
    from dataclasses import replace

    from adapterkit.registry.beside import write_beside

    write_beside(tmp_path / "wide", replace(record, files=(), name="", version=0))
    with pytest.raises(CheckFailed, match=r"has other bytes than its record says|describes other weights"):
        register(tmp_path / "wide", "wide", as_recipe=True)
    assert verbs.show("wide").versions == (1,)
    assert list(desk.glob(".remake-*")) == []


def test_what_is_not_made_again(desk: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing says how"):
        register(tmp_path / "adapter", "tone", as_recipe=True)
    with pytest.raises(UsageError, match="does not go with"):
        register(tmp_path / "merged", "desk", as_recipe=True, link=True)
    with pytest.raises(UsageError, match="not carried out again"):
        remake("tone")


def test_gc_says_what_would_be_saved(desk: Path, tmp_path: Path) -> None:
    assert gc.recipes() == ()  # the base of the merge is known by its identity alone
    adapterkit.convert("desk", tmp_path / "wide", to="f32")
    register(tmp_path / "wide", "wide")
    (one,) = gc.recipes()
    assert (one.ref, one.operation) == ("wide@1", "convert")
    assert one.bytes == sum(path.stat().st_size for path in (tmp_path / "wide").glob("*.safetensors"))
    said = CliRunner().invoke(app, ["gc", "--recipes"]).output
    assert "wide@1: made by convert" in said
    assert "1 version could be kept as its recipe" in said


def test_adapters_that_are_computed_are_kept_as_recipes_too(desk: Path, tmp_path: Path, base: Path) -> None:
    register(plain_adapter(tmp_path / "other", base, seed=3), "terse", base=base)
    adapterkit.combine(["tone", "terse"], tmp_path / "sum", weights=[0.5, 2.0], method="ties", density=0.5, rank=6)
    adapterkit.resize("tone", tmp_path / "low", rank=2, dtype="bf16")
    register(base, "whole", kind="merged")
    adapterkit.extract("whole", "desk", tmp_path / "change", rank=3)
    for name in ("sum", "low", "change"):
        weights = (tmp_path / name / "adapter_model.safetensors").read_bytes()
        found = register(tmp_path / name, name, as_recipe=True).record
        assert [file.stored for file in found.files if file.path == "adapter_model.safetensors"] == [False]
        assert (checkout(name) / "adapter_model.safetensors").read_bytes() == weights
    assert fsck.fsck().clean


def test_combinations_with_what_they_were_made_with(home: Path, tmp_path: Path, base: Path) -> None:
    """Weights, parameters of a method, a rank; and arrow, whose adapters stay apart and have no weights."""
    given = [plain_adapter(tmp_path / f"a{seed}", base, seed=seed, rank=16) for seed in (1, 2, 3)]
    for number, folder in enumerate(given):
        register(folder, f"tone-{number}")
    ways: list[dict[str, Any]] = [
        {"method": "arrow"},
        {"method": "arrow", "parameters": {"top_k": 1, "temperature": 0.5}},
        {"method": "dare-ties", "weights": [1, 0.5, 1], "rank": 16, "parameters": {"density": 0.6, "seed": 7}},
        {"method": "linear", "weights": [0.3, 0.0, -1.0], "scale": 0.5, "skip": ["*up_proj*"], "dtype": "bf16"},
    ]
    for number, way in enumerate(ways):
        out = tmp_path / f"out-{number}"
        adapterkit.combine(given if number % 2 else ["tone-0", "tone-1", "tone-2"], out, **way)
        record = register(out, f"both-{number}", as_recipe=True).record
        gone = {file.path for file in record.files if not file.stored}
        apart = ("task_0/", "task_1/", "task_2/") if way["method"] == "arrow" else ("",)
        assert {f"{folder}adapter_model.safetensors" for folder in apart} <= gone, way
        assert remake(f"both-{number}") > 0
        folder = checkout(f"both-{number}")
        names = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
        for name in names:
            assert name.name == "adapterkit.json" or (folder / name).read_bytes() == (out / name).read_bytes(), name
        gc.gc(apply=True, keep_days=0)
    assert fsck.fsck().clean
