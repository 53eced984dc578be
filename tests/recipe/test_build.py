"""A recipe carried out: what is made, what is left alone, and that the bytes are the same however it is done."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from models import edit_config, plain_adapter, plain_base, read_bytes, read_tensors

from adapterkit import packages
from adapterkit.cli import main
from adapterkit.errors import CheckFailed, CheckpointError, MissingPackage, NotFound, OutputError, RecipeError
from adapterkit.recipe import state
from adapterkit.recipe.report import AGAIN, NEW, UNCHANGED
from adapterkit.recipe.run import build, plan_build
from adapterkit.verbs.merge import merge

RECIPE = """\
base = "base"

[adapters]
style = "style"
facts = {ref = "facts", weight = 0.5}

[outputs.merged]
path = "build/merged"
adapters = ["style"]

[outputs.half]
path = "build/half"
dtype = "f16"
adapters = ["style"]

[outputs.both]
path = "build/both"
to = "adapter"
rank = 6

[outputs.on-a-mac]
path = "build/mac"
to = "mlx"
from = "both"
"""


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "home"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A folder with a base, two adapters and a recipe of four outputs."""
    folder = tmp_path / "work"
    base = plain_base(folder / "base", shards=2)
    plain_adapter(folder / "style", base, base_model_name_or_path="someone/base")
    plain_adapter(folder / "facts", base, seed=9, base_model_name_or_path="someone/base")
    (folder / "adapterkit.toml").write_text(RECIPE)
    return folder / "adapterkit.toml"


def states(report: Any) -> dict[str, str]:
    return {row.name: row.state for row in report.outputs}


def digests(report: Any) -> dict[str, str]:
    return {row.name: row.digest for row in report.outputs}


def clone(recipe: Path, where: Path) -> Path:
    """A fresh clone: inputs and recipe (and its lock), nothing that was made."""
    shutil.copytree(recipe.parent, where, ignore=shutil.ignore_patterns("build", ".adapterkit"))
    return where / recipe.name


def test_what_a_recipe_makes(recipe: Path, tmp_path: Path) -> None:
    report = build(recipe)
    folder = recipe.parent
    assert states(report) == dict.fromkeys(("merged", "half", "both", "on-a-mac"), NEW)
    assert report.passes == 3  # merged and half have the same fold
    # Each output is what its own verb gives, to the byte.
    merge(folder / "base", [folder / "style"], tmp_path / "merged")
    merge(folder / "base", [folder / "style"], tmp_path / "half", dtype="f16")
    for name in ("merged", "half"):
        assert read_bytes(folder / "build" / name, record=True) == read_bytes(tmp_path / name, record=True)
    assert json.loads((folder / "build/both/adapter_config.json").read_text())["r"] == 6
    assert (folder / "build/mac/adapters.safetensors").is_file()


def test_digests_are_those_of_sha256sum(recipe: Path) -> None:
    row = build(recipe).outputs[0]
    folder = recipe.parent / "build/merged"
    names = sorted(path.name for path in folder.iterdir())
    lines = subprocess.check_output(["sha256sum", *names], cwd=folder, text=True)
    assert hashlib.sha256(lines.encode()).hexdigest() == row.digest
    assert lines.splitlines() == [f"{digest}  {name}" for name, digest in sorted(row.files.items())]


def test_a_second_run_does_nothing(recipe: Path) -> None:
    first = build(recipe)
    before = {path: path.stat().st_mtime_ns for path in recipe.parent.rglob("*") if path.is_file()}
    second = build(recipe)
    assert set(states(second).values()) == {UNCHANGED}
    assert (second.changed, second.passes, second.lock_written) == (0, 0, False)
    assert digests(second) == digests(first)
    after = {path: path.stat().st_mtime_ns for path in recipe.parent.rglob("*") if path.is_file()}
    remembered = recipe.parent / ".adapterkit"
    assert {p: t for p, t in after.items() if remembered not in p.parents} == {
        p: t for p, t in before.items() if remembered not in p.parents
    }
    assert {row.state for row in plan_build(recipe).outputs} == {UNCHANGED}


CHILD = """
import sys
from adapterkit.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print([name for name in ("torch", "numpy", "transformers", "numba", "peft") if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["build"], ["build", "--plan"], ["build", "--locked"], ["build", "--help"]])
def test_without_work_nothing_heavy_is_imported(arguments: list[str], recipe: Path) -> None:
    build(recipe)
    command = [sys.executable, "-c", CHILD, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=recipe.parent, timeout=900, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_plan_of_what_is_not_made_imports_nothing_heavy(recipe: Path) -> None:
    command = [sys.executable, "-c", CHILD, "build", "--plan"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=recipe.parent, timeout=900, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
    assert "in one pass with half" in done.stdout
    assert not (recipe.parent / "build").exists()
    assert not (recipe.parent / ".adapterkit").exists()


def test_a_plan_says_bytes_and_passes(recipe: Path) -> None:
    planned = plan_build(recipe, jobs=1)
    assert (planned.passes, states(planned)["merged"]) == (3, NEW)
    built = build(recipe)
    rows, made = {row.name: row for row in planned.outputs}, {row.name: row for row in built.outputs}
    for name in ("merged", "half"):
        files = [recipe.parent / "build" / name / file for file in rows[name].files or ()]
        assert sum(file.stat().st_size for file in files) == rows[name].nbytes
        assert rows[name].touched == (made[name].report or {})["touched"] == 6
    assert rows["merged"].abreast == ("half",)
    both = recipe.parent / "build/both/adapter_model.safetensors"
    assert both.stat().st_size <= (
        rows["both"].nbytes or 0
    )  # its rank decides, and no header has that: the most it can be
    assert planned.nbytes == sum(rows[name].nbytes or 0 for name in ("merged", "half", "both"))
    assert planned.peak_memory >= (rows["merged"].peak_memory or 0)


def test_only_what_an_input_changes_is_made_again(recipe: Path) -> None:
    build(recipe)
    plain_adapter(recipe.parent / "facts", recipe.parent / "base", seed=11, base_model_name_or_path="someone/base")
    planned = plan_build(recipe)
    # what is made of a combination waits for it: it may come out as before
    assert states(planned) == {"merged": UNCHANGED, "half": UNCHANGED, "both": AGAIN, "on-a-mac": AGAIN}
    assert states(build(recipe)) == states(planned)
    assert set(states(build(recipe)).values()) == {UNCHANGED}


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (('dtype = "f16"', 'dtype = "f32"'), {"half"}),
        (("weight = 0.5", "weight = 0.25"), {"both", "on-a-mac"}),
        (('base = "base"', '# a comment\nbase = "./base"'), set()),
        (('path = "build/half"', 'path = "build/other"'), {"half"}),
        (("rank = 6", "rank = 5"), {"both", "on-a-mac"}),
    ],
)
def test_only_what_the_recipe_changes_is_made_again(recipe: Path, change: tuple[str, str], again: set[str]) -> None:
    build(recipe)
    recipe.write_text(recipe.read_text().replace(*change))
    assert {name for name, state in states(build(recipe)).items() if state != UNCHANGED} == again


def test_a_touched_file_is_hashed_and_found_the_same(recipe: Path) -> None:
    build(recipe)
    for path in (recipe.parent / "base").iterdir():
        os.utime(path)
    assert set(states(build(recipe)).values()) == {UNCHANGED}


def test_what_was_made_elsewhere_is_not_replaced(recipe: Path) -> None:
    (recipe.parent / "build/merged").mkdir(parents=True)
    (recipe.parent / "build/merged/mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"adapterkit.toml:7: .*merged exists"):
        build(recipe)
    assert (recipe.parent / "build/merged/mine.txt").read_text() == "mine"
    assert not (recipe.parent / "build/half").exists()
    assert states(build(recipe, force=True))["merged"] == NEW


@pytest.mark.parametrize("how", ["edited", "added", "gone"])
def test_what_was_changed_since_is_not_replaced_unasked(recipe: Path, how: str) -> None:
    build(recipe)
    config = recipe.parent / "build/merged/config.json"
    if how == "edited":
        config.write_text("{}")
    elif how == "added":
        config.with_name("notes.txt").write_text("mine")
    else:
        config.unlink()
    with pytest.raises(OutputError, match="merged exists"):
        build(recipe)
    done = build(recipe, force=True)
    assert [name for name, state in states(done).items() if state != UNCHANGED] == ["merged"]
    assert set(states(build(recipe)).values()) == {UNCHANGED}


def test_without_its_memory_a_build_starts_over(recipe: Path) -> None:
    first = build(recipe)
    shutil.rmtree(recipe.parent / "build")
    (recipe.parent / ".adapterkit/adapterkit.json").write_text("{broken")
    again = build(recipe)
    assert digests(again) == digests(first)
    assert not again.lock_written


# ------------------------------------------------------------------ the same bytes


def test_two_clones_and_other_threads_give_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    first = build(recipe, jobs=1)
    twin = clone(recipe, tmp_path / "a" / "longer" / "path")
    second = build(twin, jobs=4, locked=True)
    assert digests(second) == digests(first)
    one, other = recipe.parent / "build", twin.parent / "build"
    assert read_bytes(one, record=True) == read_bytes(other, record=True)
    assert recipe.with_name("adapterkit.lock").read_bytes() == twin.with_name("adapterkit.lock").read_bytes()


def test_a_group_that_is_made_in_parts_gives_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    together = build(recipe)
    twin = clone(recipe, tmp_path / "twin")
    text = twin.read_text()
    twin.write_text(text.replace('[outputs.half]\npath = "build/half"\ndtype = "f16"\nadapters = ["style"]\n', ""))
    build(twin)
    twin.write_text(text)
    assert digests(build(twin)) == digests(together)


def test_an_interrupted_build_goes_on(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit.adapters.merged import Merged

    whole = digests(build(clone(recipe, tmp_path / "twin")))
    read, calls = Merged.read, []

    def failing(self: Merged, start: int, stop: int) -> Any:
        calls.append(self.name)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return read(self, start, stop)

    with monkeypatch.context() as patched:
        patched.setattr(Merged, "read", failing)
        with pytest.raises(KeyboardInterrupt):
            build(recipe, resume=True, jobs=1)
    assert (recipe.parent / "build/.merged.partial").is_dir()
    assert (recipe.parent / "build/.half.partial").is_dir()
    assert not (recipe.parent / "build/merged").exists()
    report = build(recipe, resume=True)
    assert digests(report) == whole
    reused = [(row.report or {}).get("reused", 0) for row in report.outputs[:2]]
    assert sum(reused) >= 4
    assert not list((recipe.parent / "build").glob(".*"))


def test_an_interrupted_build_without_resume_leaves_nothing(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit.adapters.merged import Merged

    def failing(self: Merged, start: int, stop: int) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Merged, "read", failing)
    with pytest.raises(KeyboardInterrupt):
        build(recipe)
    assert not (recipe.parent / "build").exists()


# ------------------------------------------------------------------ the lock


def test_a_lock_says_what_everything_meant(recipe: Path) -> None:
    build(recipe)
    lock = json.loads(recipe.with_name("adapterkit.lock").read_text())
    weights = recipe.parent / "style/adapter_model.safetensors"
    said = lock["inputs"]["adapters.style.ref"]
    assert said["files"][weights.name] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert set(lock["inputs"]) == {"base.ref", "adapters.style.ref", "adapters.facts.ref"}
    import torch

    assert (
        lock["versions"]["torch"] == torch.__version__.partition("+")[0]
        or lock["versions"]["torch"] == torch.__version__
    )
    assert lock["outputs"]["merged"]["path"] == "build/merged"
    assert str(recipe.parent) not in json.dumps(lock)


def test_locked_holds(recipe: Path) -> None:
    build(recipe)
    assert set(states(build(recipe, locked=True)).values()) == {UNCHANGED}
    assert plan_build(recipe, locked=True).locked


def test_locked_without_a_lock(recipe: Path) -> None:
    with pytest.raises(NotFound, match=r"adapterkit\.lock does not exist"):
        build(recipe, locked=True)


def test_a_lock_that_is_none(recipe: Path) -> None:
    recipe.with_name("adapterkit.lock").write_text("[1, 2")
    with pytest.raises(RecipeError, match="is not a lock file"):
        build(recipe, locked=True)


def test_locked_fails_when_an_input_moved(recipe: Path) -> None:
    build(recipe)
    lock = recipe.with_name("adapterkit.lock").read_bytes()
    edit_config(recipe.parent / "style", lora_alpha=9)
    with pytest.raises(CheckFailed, match=r"style/adapter_config.json changed \([0-9a-f]{12} -> [0-9a-f]{12}\)"):
        build(recipe, locked=True)
    assert recipe.with_name("adapterkit.lock").read_bytes() == lock


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("versions", {"adapterkit": "0.0.9", "torch": "2.6.0", "numpy": "2.0"}, "torch 2.6.0 -> "),
        ("recipe", "0" * 64, "the recipe changed"),
        ("inputs", {}, "adapters.facts.ref is not in it"),
    ],
)
def test_locked_fails_when_anything_else_moved(recipe: Path, field: str, value: Any, said: str) -> None:
    build(recipe)
    path = recipe.with_name("adapterkit.lock")
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(CheckFailed) as caught:
        plan_build(recipe, locked=True)
    assert said in caught.value.message
    assert caught.value.exit_code == 3


def test_locked_fails_when_other_bytes_come_out(recipe: Path) -> None:
    build(recipe)
    path = recipe.with_name("adapterkit.lock")
    data = json.loads(path.read_text())
    data["outputs"]["half"]["digest"] = "0" * 64
    data["outputs"]["half"]["files"]["config.json"] = "0" * 64
    path.write_text(json.dumps(data))
    with pytest.raises(
        CheckFailed, match=r"outputs\.half has other bytes than adapterkit\.lock says, first in config\.json"
    ):
        build(recipe, locked=True)
    shutil.rmtree(recipe.parent / "build")
    for _ in range(2):  # and what the first of them made is no excuse for the second
        with pytest.raises(CheckFailed, match=r"outputs\.half has other bytes"):
            build(recipe, locked=True)
    # On another kind of processor that is no proof of a mistake.
    data["machine"] = "x86_64 SOMETHING"
    path.write_text(json.dumps(data))
    shutil.rmtree(recipe.parent / "build")
    report = build(recipe, locked=True)
    assert any("it was made on x86_64 SOMETHING" in note for note in report.notes)


def test_registry_names_are_pinned_to_their_version(recipe: Path) -> None:
    from adapterkit.provenance.register import register
    from adapterkit.registry import verbs

    folder = recipe.parent
    register(folder / "style", "style")
    verbs.tag("style@1", "prod")
    recipe.write_text(recipe.read_text().replace('style = "style"', 'style = "style@prod"'))
    shutil.move(folder / "style", folder / "elsewhere")
    first = build(recipe)
    lock = json.loads(recipe.with_name("adapterkit.lock").read_text())
    assert lock["inputs"]["adapters.style.ref"]["pin"] == "style@1"
    edit_config(folder / "elsewhere", lora_alpha=32)
    register(folder / "elsewhere", "style")
    verbs.tag("style@2", "prod")
    # The lock stays with the version that it knows; without it, the alias means what it means now.
    assert digests(build(recipe, locked=True)) == digests(first)
    assert states(build(recipe))["merged"] == AGAIN


# ------------------------------------------------------------------ what follows


def test_a_threshold_that_does_not_hold_stops_what_follows(recipe: Path) -> None:
    from adapterkit.registry import verbs

    text = recipe.read_text() + '[outputs.merged.register]\nname = "demo"\n'
    recipe.write_text(text + "[outputs.merged.verify]\nmin-retention = 1.0\n")
    with pytest.raises(
        CheckFailed, match=r"outputs.merged does not verify: .* asks for 100\.0%"
    ) as caught:  # bf16 keeps a little less
        build(recipe)
    assert caught.value.place is not None
    assert (recipe.parent / "build/merged").is_dir()
    with pytest.raises(NotFound):
        verbs.show("demo")
    shutil.rmtree(recipe.parent / "build")
    recipe.write_text(text + "[outputs.merged.verify]\nmin-retention = 0.9\n")
    report = build(recipe)
    # three layers of two linears are changed; the embedding, the head and three norms are the base's
    assert report.outputs[0].after["verify"]["summary"].startswith("tensors: 11 equal; ")
    record = verbs.show("demo").record
    assert record.version == 1
    found = record.evidence["verification"]["tensor"]
    assert found["ok"] is True
    assert found["figures"]["touched"] == 6
    assert found["thresholds"] == {"min_retention": 0.9}


def test_the_evidence_is_a_page_too(recipe: Path) -> None:
    text = recipe.read_text()
    recipe.write_text(text + '[outputs.merged.verify]\nhtml = "pages/merged.html"\nmin-retention = 1.0\n')
    page = recipe.parent / "pages/merged.html"
    with pytest.raises(CheckFailed):
        build(recipe)
    assert "<html" in page.read_text()  # it says why
    recipe.write_text(text + '[outputs.merged.verify]\nhtml = "pages/merged.html"\n')
    build(recipe)
    page.unlink()
    build(recipe)
    assert page.is_file()


def test_every_merge_is_verified_once(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe.write_text(recipe.read_text() + '[verify]\nlevel = "tensors"\n')
    first = build(recipe)
    assert {row.name for row in first.outputs if "verify" in row.after} == {"merged", "half"}
    with monkeypatch.context() as patched:
        patched.delattr(sys.modules["adapterkit.verbs.verify"], "verify")
        second = build(recipe)
    assert [row.after for row in second.outputs] == [row.after for row in first.outputs]
    # Only in the recipe's memory: the bytes of an output do not depend on what was found about it.
    assert [row.digest for row in second.outputs] == [row.digest for row in first.outputs]


def test_an_output_is_registered_once(recipe: Path) -> None:
    from adapterkit.registry import verbs

    register = '[outputs.merged.register]\nname = "demo"\nalias = "prod"\nmeta = {run = "7"}\n'
    recipe.write_text(recipe.read_text() + register)
    report = build(recipe)
    assert report.outputs[0].after["register"]["ref"] == "demo@1"
    assert verbs.show("demo@prod").record.meta == {"run": "7"}
    assert build(recipe).outputs[0].after["register"]["ref"] == "demo@1"
    plain_adapter(recipe.parent / "style", recipe.parent / "base", seed=21, base_model_name_or_path="someone/base")
    assert build(recipe).outputs[0].after["register"]["ref"] == "demo@2"
    assert verbs.show("demo@prod").record.version == 2


def test_a_conversion_is_registered_with_its_kind(recipe: Path) -> None:
    from adapterkit.registry import verbs

    recipe.write_text(recipe.read_text() + 'register = "on-a-mac"\n')
    build(recipe)
    assert verbs.show("on-a-mac").record.kind == "adapter"


# ------------------------------------------------------------------ the command line


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def test_what_the_command_line_prints(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(recipe.parent)
    assert run("build", "--plan") == 0
    out = capsys.readouterr().out
    assert "merged: merge to folder, build/merged\n  new: not made yet\n  reads base, style\n" in out
    assert "would make 4 outputs in 3 passes" in out
    assert run("build", "--plan", "--json") == 0
    assert json.loads(capsys.readouterr().out)["passes"] == 3
    assert run("build") == 0
    out, err = capsys.readouterr()
    assert "merged, half: not made yet" in err
    assert "4 of 4 outputs made" in out
    assert run("build", "adapterkit.toml", "--json") == 0
    out, err = capsys.readouterr()
    assert (json.loads(out)["changed"], err) == (0, "")
    assert run("build", "--plan") == 0
    assert capsys.readouterr().out.endswith("nothing to do\n")


def test_what_an_interruption_says(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from adapterkit.adapters.merged import Merged

    def failing(self: Merged, start: int, stop: int) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Merged, "read", failing)
    monkeypatch.chdir(recipe.parent)
    assert run("build") == 130
    assert "outputs that were finished stay" in capsys.readouterr().err


def test_a_pyproject_holds_a_recipe(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    recipe.unlink()
    text = '[project]\nname = "x"\n[tool.adapterkit]\nbase = "base"\nadapters.style = "style"\noutputs.merged = "out/merged"\n'
    (recipe.parent / "pyproject.toml").write_text(text)
    assert run("build") == 0
    assert read_tensors(recipe.parent / "out/merged")
    assert (recipe.parent / "adapterkit.lock").is_file()


def test_hashes_are_not_trusted_while_a_clock_tick_could_hide_a_change(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("one")
    memory = state.State(tmp_path / "adapterkit.toml")
    first = memory.sha256(file)
    memory.save()
    assert json.loads(memory.path.read_text())["hashes"] == {}
    time.sleep(0.15)
    assert memory.sha256(file) == first
    memory.save()
    assert list(json.loads(memory.path.read_text())["hashes"]) == [str(file)]


def test_what_verifies_an_output_is_looked_for_before_it_is_made(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = packages.find_spec
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == "gguf" else found(name))
    head = 'base = "base"\nadapters.style = "style"\noutputs.q = {path = "q.gguf", quant = "Q8_0"}\n'
    recipe.write_text(f'{head}verify.level = "tensors"\n')
    with pytest.raises(MissingPackage, match="gguf is not installed"):
        build(recipe)
    assert not (recipe.parent / "q.gguf").exists()
    recipe.write_text(head)  # without a verification it is not asked for; this base is no whole model of GGUF
    with pytest.raises(CheckpointError, match="output_norm"):
        build(recipe)
