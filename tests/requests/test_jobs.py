"""Every verb that writes: a dry run refuses what the run refuses, a plan is carried out, an interrupted run goes on."""

from __future__ import annotations

import io
import json
import os
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models import plain_adapter, plain_base, read_bytes

import adapterkit
from adapterkit.checkpoint.plan import Plan
from adapterkit.cli import main
from adapterkit.errors import AdapterError, UsageError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    base = plain_base(tmp_path / "base")
    for number, name in enumerate(("a", "b")):
        plain_adapter(tmp_path / name, base, seed=number)
    adapterkit.merge(base, tmp_path / "a", tmp_path / "tuned")
    return tmp_path


VERBS: dict[str, tuple[str, ...]] = {
    "merge": ("base", "a"),
    "convert": ("base", "--to", "f16"),
    "combine": ("a", "b", "--rank", "3"),
    "extract": ("base", "tuned", "--rank", "2"),
    "resize": ("a", "--rank", "2"),
}


def run(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line as a shell would run it in a folder, without a process of its own."""
    out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(place)
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            main(list(arguments))
    finally:
        os.chdir(before)
    return subprocess.CompletedProcess(arguments, int(ended.value.code or 0), out.getvalue(), err.getvalue())


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_writes_nothing_and_says_the_size(verb: str, place: Path) -> None:
    before = sorted(place.rglob("*"))
    done = run(place, verb, *VERBS[verb], "-o", "out", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["dry_run"]
    assert sorted(place.rglob("*")) == before
    made = run(place, verb, *VERBS[verb], "-o", "out")
    assert made.returncode == 0, made.stderr
    weights = sum(file.stat().st_size for file in (place / "out").glob("*.safetensors"))
    assert 0 < weights <= report["nbytes"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_dry_run_refuses_what_the_run_refuses(verb: str, place: Path) -> None:
    """A folder that exists, a place in an input, and a place below a file."""
    (place / "there").mkdir()
    (place / "file").write_text("")
    for out in ("there", f"{VERBS[verb][0]}/inside", "file/out"):
        dry = run(place, verb, *VERBS[verb], "-o", out, "--dry-run")
        real = run(place, verb, *VERBS[verb], "-o", out)
        assert (dry.returncode, dry.stderr) == (real.returncode, real.stderr), out
        assert real.returncode in (1, 2), out


@pytest.mark.parametrize("verb", VERBS)
def test_a_saved_plan_gives_the_same_bytes(verb: str, place: Path) -> None:
    assert run(place, verb, *VERBS[verb], "-o", "whole").returncode == 0
    done = run(place, verb, *VERBS[verb], "--save-plan", "plan.json")
    assert done.returncode == 0, done.stderr
    assert not (place / "later").exists()
    done = run(place, "execute", "plan.json", "-o", "later")
    assert done.returncode == 0, done.stderr
    assert read_bytes(place / "later", record=True) == read_bytes(place / "whole", record=True)


def test_a_plan_without_parts_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    run(place, "convert", "base", "--to", "f16", "--save-plan", "plan.json")
    plan = Plan.from_json((place / "plan.json").read_bytes())
    plan = replace(plan, request={**plan.request, "staged": True})  # as of an adapter whose factors are computed first
    with pytest.raises(UsageError, match="no parts"):
        adapterkit.execute(plan, place / "out", part=0)
    # Whoever has no llm-compressor is not sent to install it: it would not help.
    for many in ({"on": "local", "out": "q"}, {"workers": 2, "dry_run": True}):
        with pytest.raises(UsageError, match="awq is written by llm-compressor") as refused:
            adapterkit.convert("base", to="awq", compressor="nowhere", **many)
        assert next(iter(many)) in refused.value.hint


@pytest.mark.parametrize("verb", ["combine", "resize", "extract"])
def test_an_interrupted_adapter_goes_on_where_it_was(verb: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third layer fails; what is done before it is proved by its hash and used again."""
    import adapterkit.verbs.factors as factors

    given: dict[str, Any] = {
        "combine": {"adapters": [place / "a", place / "b"], "rank": 3},
        "resize": {"adapter": place / "a", "rank": 2},
        "extract": {"base": place / "base", "tuned": place / "tuned", "rank": 2},
    }[verb]
    function = getattr(adapterkit, verb)
    whole = function(**given, out=place / "whole", jobs=1)
    add, calls = factors.FactorStore.add, []

    def failing(self: Any, slot: Any, found: Any, row: Any) -> None:
        calls.append(slot)
        if len(calls) == 3:
            raise AdapterError("interrupted")
        add(self, slot, found, row)

    monkeypatch.setattr(factors.FactorStore, "add", failing)
    with pytest.raises(AdapterError, match="interrupted"):
        function(**given, out=place / "parts", jobs=1, resume=True)
    monkeypatch.undo()
    assert not (place / "parts").exists()
    report = function(**given, out=place / "parts", jobs=1, resume=True)
    assert report.reused == 2
    assert report.modules == whole.modules
    assert read_bytes(place / "parts", record=True) == read_bytes(place / "whole", record=True)


def test_what_a_torn_run_left_is_not_trusted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flipped byte in the factors that wait: they are computed again."""
    import adapterkit.verbs.factors as factors

    add, calls = factors.FactorStore.add, []

    def failing(self: Any, slot: Any, found: Any, row: Any) -> None:
        calls.append(slot)
        if len(calls) == 4:
            raise AdapterError("interrupted")
        add(self, slot, found, row)

    monkeypatch.setattr(factors.FactorStore, "add", failing)
    with pytest.raises(AdapterError):
        adapterkit.resize(place / "a", place / "out", rank=2, jobs=1, resume=True)
    monkeypatch.undo()
    (scratch,) = [path for path in place.glob(".out.partial*/.factors") if path.is_file()]
    data = bytearray(scratch.read_bytes())
    data[5] ^= 1
    scratch.write_bytes(bytes(data))
    report = adapterkit.resize(place / "a", place / "out", rank=2, jobs=1, resume=True)
    adapterkit.resize(place / "a", place / "whole", rank=2, jobs=1)
    assert report.reused == 0
    assert read_bytes(place / "out") == read_bytes(place / "whole")
