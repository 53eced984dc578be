"""Recipes and the Hub: what a branch meant is pinned, and what was made is pushed once, after it was verified."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_writes import TOKEN, WritableHub, writable_hub  # noqa: F401  (the fixture hub)
from models import plain_adapter, plain_base, read_bytes

import adapterkit
from adapterkit.errors import AuthError, CheckFailed, NotFound, UsageError
from adapterkit.recipe.report import AGAIN, UNCHANGED
from adapterkit.recipe.run import build, plan_build

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

RECIPE = """\
base = "org/base"
adapters.style = "org/style@v1"

[verify]
level = "tensors"

[outputs.merged]
path = "build/merged"
"""


@pytest.fixture(autouse=True)
def _published(hub: WritableHub, tmp_path: Path) -> None:
    """A base and an adapter on the Hub."""
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "style", base, base_model_name_or_path="org/base")
    hub.add("org/base", base)
    hub.add("org/style", adapter, "main", "v1")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "work/adapterkit.toml"
    path.parent.mkdir()
    path.write_text(RECIPE)
    return path


def lock(recipe: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(recipe.with_name("adapterkit.lock").read_text())
    return found


def test_a_plan_fetches_headers_only(hub: WritableHub, recipe: Path, tmp_path: Path) -> None:
    planned = plan_build(recipe)
    assert planned.outputs[0].nbytes == (tmp_path / "base/model.safetensors").stat().st_size
    assert not [call for call in hub.calls if "safetensors" in call.path and not call.ranged and call.method == "GET"]


def test_branches_and_tags_are_pinned_to_commits(hub: WritableHub, recipe: Path) -> None:
    build(recipe)
    head = hub.repos["org/base"].refs["main"]
    inputs = lock(recipe)["inputs"]
    assert inputs["base.ref"] == {"ref": "org/base", "kind": "hub", "pin": f"org/base@{head}", "files": {}}
    assert inputs["adapters.style.ref"]["pin"].startswith("org/style@")


def test_a_branch_that_moved(hub: WritableHub, recipe: Path, tmp_path: Path) -> None:
    first = build(recipe)
    hub.add("org/base", plain_base(tmp_path / "other", width=16, layers=3, dtype="float32"))
    # With the lock the base is the one of then, also on another machine; without it, it is the one of now.
    shutil.rmtree(recipe.parent / "build")
    shutil.rmtree(recipe.parent / ".adapterkit")
    again = build(recipe, locked=True)
    assert again.outputs[0].digest == first.outputs[0].digest
    moved = build(recipe)
    assert moved.outputs[0].state == AGAIN
    assert moved.outputs[0].digest != first.outputs[0].digest
    assert moved.lock_written


def test_with_a_lock_nothing_is_asked_of_the_hub(hub: WritableHub, recipe: Path) -> None:
    build(recipe)
    hub.calls.clear()
    assert build(recipe, locked=True).outputs[0].state == UNCHANGED
    assert hub.calls == []


def test_a_repository_that_is_not_there(hub: WritableHub, recipe: Path) -> None:
    recipe.write_text(RECIPE.replace('"org/base"', '"org/nothing"'))
    with pytest.raises((NotFound, AuthError)) as caught:
        plan_build(recipe)
    assert caught.value.place == (str(recipe), 1)


def test_what_was_made_is_pushed_once(hub: WritableHub, recipe: Path) -> None:
    recipe.write_text(RECIPE + 'register = "styled"\npush = {repo = "hf://me/styled", private = true, tag = "v1"}\n')
    report = build(recipe)
    after = report.outputs[0].after
    assert list(after) == ["verify", "register", "push"]
    assert (after["register"]["ref"], after["push"]["new"]) == ("styled@1", True)
    head = hub.repos["me/styled"].refs["main"]
    assert after["push"]["commit"] == head
    assert hub.repos["me/styled"].private
    pushed = hub.repos["me/styled"].commits[head]
    made = read_bytes(recipe.parent / "build/merged")
    assert {name: pushed[name] for name in made if name.endswith(".safetensors")} == {
        name: data for name, data in made.items() if name.endswith(".safetensors")
    }
    assert "verification" in json.loads(pushed["adapterkit.json"])["evidence"]
    hub.calls.clear()
    again = build(recipe, locked=True)
    assert [call for call in hub.calls if call.method != "GET"] == []
    assert again.outputs[0].after == after


def test_a_remote_of_another_kind(hub: WritableHub, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a recipe pushes to an OCI registry is what `pull` brings from there."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "oci"))
    from memory_registry import answer_in_memory

    answer_in_memory("127.0.0.1:5000", monkeypatch)
    there = "oci://127.0.0.1:5000/team/styled:v1"
    recipe.write_text(RECIPE + f'register = "styled"\npush = {{repo = "{there}", private = true}}\n')
    with pytest.raises(UsageError, match=r"private=True is for the Hub, and oci://.* is not"):
        plan_build(recipe)
    recipe.write_text(RECIPE + f'register = "styled"\npush = "{there}"\n')
    done = build(recipe).outputs[0].after["push"]
    assert done["url"] == f"{there}@sha256:{done['digest']}"
    home = recipe.parent / "elsewhere"
    pulled = adapterkit.pull(done["url"], home=home).record
    made = read_bytes(recipe.parent / "build/merged")
    assert {file.sha256 for file in pulled.files} >= {
        hashlib.sha256(data).hexdigest() for name, data in made.items() if name.endswith(".safetensors")
    }


def test_what_does_not_verify_is_not_pushed(hub: WritableHub, recipe: Path) -> None:
    """A change that is far smaller than a step of bfloat16 is not there any more after the merge."""
    text = RECIPE.replace('"org/style@v1"', '{ref = "org/style@v1", weight = 1e-5}')
    recipe.write_text(text + 'push = "me/styled"\n')
    with pytest.raises(CheckFailed, match=r"outputs\.merged does not verify: .* of the change survives"):
        build(recipe)
    assert "me/styled" not in hub.repos


def test_a_push_that_fails_is_done_by_the_next_build(
    hub: WritableHub, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe.write_text(RECIPE + 'push = "me/styled"\n')
    with monkeypatch.context() as patched:
        patched.setenv("HF_TOKEN", "hf_anotherTokenOfSomebodyElse")
        with pytest.raises(AuthError):
            build(recipe)
    with monkeypatch.context() as patched:
        patched.delenv("HF_TOKEN")
        with pytest.raises(AuthError):
            build(recipe)
    report = build(recipe)
    assert report.outputs[0].state == UNCHANGED
    assert report.outputs[0].after["push"]["repo"] == "me/styled"
