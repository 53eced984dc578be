"""fsck and gc: every flipped bit of every kind of file is found, and nothing else is harmed."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from adapterkit.errors import AdapterkitError, CheckFailed, RegistryError, UsageError
from adapterkit.registry import bundle, fsck, gc, index, lineage, listing, register, store, verbs
from adapterkit.registry.home import Home


@pytest.fixture
def filled(home: Path, make: Any) -> Path:
    """Every kind of file: records, blobs, a journal, aliases with history, a mark of removal, an index."""
    for number in range(4):
        register.register(make(content=b"weights %d" % number), "chat")
    register.register(make("other", b"others"), "other", meta={"author": "somebody"})
    for version in (1, 2, 3):
        verbs.tag(f"chat@{version}", "prod")
    verbs.remove("chat@4", reason="wrong data")
    listing.listing()
    return home


def snapshot(home: Path) -> dict[str, bytes]:
    return {
        path.relative_to(home).as_posix(): path.read_bytes()
        for path in home.rglob("*")
        if path.is_file() and path.parent.name not in ("locks", "staging") and not path.name.startswith("index.db")
    }


KINDS = {
    "format": ("format", "format"),
    "record": ("records/chat/2.json", "record"),
    "blob": ("objects/sha256", "blob"),
    "journal": ("journal/chat", "journal"),
    "ref": ("refs/chat/prod", "ref"),
    "history": ("history/chat/prod", "history"),
    "mark": ("hidden/chat/4", "hidden"),
}


@pytest.mark.parametrize(("where", "kind"), KINDS.values(), ids=KINDS)
def test_a_flipped_bit_is_found_in_every_kind_of_file(filled: Path, where: str, kind: str) -> None:
    path = filled / where
    if path.is_dir():
        path = max((found for found in path.rglob("*") if found.is_file()), key=lambda found: found.stat().st_size)
    path.chmod(0o644)
    good = path.read_bytes()
    before = snapshot(filled)
    rng = random.Random(0)
    bits = range(len(good) * 8) if len(good) <= 30 else sorted(rng.sample(range(len(good) * 8), 60))
    for bit in bits:
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        report = fsck.fsck()
        assert not report.clean
        assert kind in {problem.kind for problem in report.problems}, (bit, report.problems)
        assert path.read_bytes() == damaged, "fsck without repair changed a file"
    path.write_bytes(good)
    assert fsck.fsck().clean
    assert snapshot(filled) == before


def test_a_flipped_bit_in_the_index_is_found_or_changes_no_answer(filled: Path) -> None:
    old = time.time() - 10
    for folder in ("records", "refs", "hidden", "staging"):
        for path in [filled / folder, *(filled / folder).iterdir()]:
            os.utime(path, (old, old))
    wanted = listing.listing(hidden=True)
    path = filled / "index.db"
    good = path.read_bytes()
    rng = random.Random(0)
    found = 0
    # Bits of pages that hold something; the rest of the file is empty space that no query reads.
    used = [place for place, byte in enumerate(good) if byte]
    for place in rng.sample(used, 60):
        damaged = bytearray(good)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        report = fsck.fsck()
        assert path.read_bytes() == damaged
        assert {problem.kind for problem in report.problems} <= {"index"}
        if report.clean:
            assert listing.listing(hidden=True) == wanted
        found += not report.clean
        path.write_bytes(good)
    assert found > 40


def test_repair_moves_a_rotten_blob_and_touches_nothing_else(filled: Path, make: Any) -> None:
    record = verbs.show("chat@2").record
    rotten = Home(filled).blob(record.files[1].sha256)
    rotten.chmod(0o644)
    rotten.write_bytes(b"WEIGHTS 1")
    before = snapshot(filled)
    report = fsck.fsck(repair=True)
    (problem,) = report.problems
    assert (problem.kind, problem.repaired) == ("blob", True)
    assert "chat@2 adapter_model.safetensors is lost here" in problem.sentence
    after = snapshot(filled)
    (moved,) = [name for name in after if name.startswith("quarantine/")]
    assert after.pop(moved) == before.pop(rotten.relative_to(filled).as_posix()) == b"WEIGHTS 1"
    assert after == before
    report = fsck.fsck()
    assert [problem.kind for problem in report.problems] == ["missing"]
    register.register(make(content=b"weights 1"), "chat")
    assert fsck.fsck().clean
    assert verbs.show("chat@2").missing == ()


def test_repair_writes_again_what_other_files_say(filled: Path) -> None:
    good = snapshot(filled)
    for name in ("journal/chat", "refs/chat/prod", "history/chat/prod"):
        damaged = bytearray(good[name])
        damaged[len(damaged) - 5] ^= 4
        (filled / name).write_bytes(damaged)
    (filled / "index.db").write_bytes(b"rotten" * 100)
    report = fsck.fsck(repair=True)
    assert not report.clean  # Ref and history were damaged in the same line: neither can vouch for the other.
    (filled / "history/chat/prod").write_bytes(good["history/chat/prod"])
    assert fsck.fsck(repair=True).clean
    assert fsck.fsck().problems == ()
    after = snapshot(filled)
    assert {name: data for name, data in after.items() if not name.startswith("quarantine/")} == good
    assert sum(name.startswith("quarantine/") for name in after) == 2


def test_repair_keeps_the_sound_lines_of_a_history(filled: Path) -> None:
    path = filled / "history/chat/prod"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0].replace(b"prod", b"pr0d") + lines[1] + lines[2])
    assert not fsck.fsck().clean
    with pytest.raises(RegistryError):
        verbs.history("chat", "prod")
    assert fsck.fsck(repair=True).clean
    assert [move.version for move in verbs.history("chat", "prod")] == [2, 3]
    verbs.tag("chat@1", "prod", expected=3)
    assert fsck.fsck().problems == ()


def test_missing_and_foreign_files_are_found(filled: Path) -> None:
    shutil.move(filled / "records/chat/2.json", filled / "kept")
    assert {problem.kind for problem in fsck.fsck().problems} == {"record"}
    shutil.move(filled / "kept", filled / "records/chat/2.json")
    (filled / "records/chat/notes.txt").write_text("x")
    (filled / "records/UPPER").mkdir()
    (filled / "hidden/chat/77").write_text("x")
    (filled / "objects/sha256/ab").mkdir(exist_ok=True)
    (filled / "objects/sha256/ab/readme").write_text("x")
    kinds = sorted(problem.kind for problem in fsck.fsck().problems)
    assert kinds == ["blob", "hidden", "stray", "stray"]


def test_the_newest_records_vanishing_is_found_by_the_journal(filled: Path) -> None:
    (filled / "records/chat/3.json").unlink()
    (filled / "records/chat/4.json").unlink()
    assert any("vanished" in problem.sentence for problem in fsck.fsck().problems)


def test_an_alias_of_a_swapped_record_is_found(filled: Path, make: Any, tmp_path: Path) -> None:
    """Somebody rewrote a version, with a digest that holds: the alias and the journal remember another."""
    forged = tmp_path / "forged"
    register.register(make("forged-files", b"forged"), "chat", home=forged)
    for number in (2, 3):
        register.register(make("forged-files", b"forged %d" % number), "chat", home=forged)
    shutil.copy(forged / "records/chat/3.json", filled / "records/chat/3.json")
    kinds = {problem.kind for problem in fsck.fsck().problems}
    assert {"ref", "journal", "missing"} <= kinds
    with pytest.raises(RegistryError, match="another record"):
        verbs.show("chat@prod")


def test_a_damaged_record_is_put_back_by_a_bundle(filled: Path, tmp_path: Path) -> None:
    bundle.export_bundle(("other@1",), tmp_path / "kept.tar")
    path = filled / "records/other/1.json"
    good = path.read_bytes()
    path.write_bytes(good.replace(b"somebody", b"s0mebody"))
    assert not fsck.fsck().clean
    found = bundle.import_bundle(tmp_path / "kept.tar")
    assert found.versions == (("other@1", "other@1", False),)
    assert path.read_bytes() == good
    assert fsck.fsck().clean


def age(home: Path, monkeypatch: pytest.MonkeyPatch, days: float) -> None:
    real = time.time
    monkeypatch.setattr(gc.time, "time", lambda: real() + days * 86400)


def unreferenced(home: Path) -> list[str]:
    """A blob whose registration was killed before its record."""
    from adapterkit.registry import blobs

    source = home.parent / "orphan"
    source.write_bytes(b"orphan")
    return [blobs.put_file(Home(home), source).sha256]


def test_gc_is_dry_and_keeps_what_is_young_or_named(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    orphan = unreferenced(filled)
    before = snapshot(filled)
    report = gc.gc(apply=True)
    assert (report.blobs, report.young) == ((), 1)
    age(filled, monkeypatch, 13)
    assert gc.gc(apply=True).blobs == ()
    age(filled, monkeypatch, 15)
    removed = [file.sha256 for file in verbs.show("chat@4").record.files if file.path == "adapter_model.safetensors"]
    report = gc.gc()
    assert report.blobs == tuple(sorted(orphan + removed))
    assert report.bytes == len(b"orphan") + len(b"weights 4")
    assert snapshot(filled) == before
    assert gc.gc(apply=True).blobs == report.blobs
    gone = set(before) - set(snapshot(filled))
    assert {Path(name).name for name in gone} == set(report.blobs)
    assert fsck.fsck().clean
    assert verbs.show("chat@4").missing == ("adapter_model.safetensors",)


def test_gc_keeps_a_removed_version_for_a_while(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gc.gc(keep_days=14).blobs == ()
    assert len(gc.gc(keep_days=-1).blobs) == 1
    verbs.restore("chat@4")
    assert gc.gc(keep_days=-1).blobs == ()


@pytest.mark.parametrize("damage", ["rotten", "future", "missing"])
def test_gc_refuses_while_a_record_cannot_be_read(filled: Path, damage: str) -> None:
    unreferenced(filled)
    path = filled / "records/chat/2.json"
    if damage == "missing":
        path.unlink()
    elif damage == "rotten":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        import hashlib
        import json

        plain = {**json.loads(path.read_bytes()), "schema": 2, "version": 5}
        del plain["digest"]
        path = path.with_name("5.json")
        spelled = json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
        plain["digest"] = hashlib.sha256(spelled).hexdigest()
        path.write_bytes(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode() + b"\n")
        assert fsck.fsck().clean
        assert any("newer" in note for note in fsck.fsck().notes)
    before = snapshot(filled)
    with pytest.raises(CheckFailed):
        gc.gc(apply=True, keep_days=-1)
    assert snapshot(filled) == before


def test_gc_takes_old_temporary_files_only(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (filled / "incoming/half").write_bytes(b"x")
    (filled / "staging/half").write_bytes(b"x")
    (filled / "pulling/killed").mkdir(parents=True)
    (filled / "pulling/killed/weights").write_bytes(b"x")
    assert len(fsck.fsck().notes) == 2
    assert gc.gc(apply=True).temporary == 0
    age(filled, monkeypatch, 2)
    assert gc.gc(apply=True).temporary == 3
    assert fsck.fsck().notes == ()
    assert not list((filled / "pulling").iterdir())


def test_gc_takes_folders_in_which_a_killed_one_made_versions_again(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (filled / ".remake-abc/model").mkdir(parents=True)
    (filled / ".remake-abc/model/weights").write_bytes(b"x")
    age(filled, monkeypatch, 2)
    (filled / ".remake-now").mkdir()
    os.utime(filled / ".remake-now", (gc.time.time(), gc.time.time()))
    assert gc.gc().temporary == 1
    assert (filled / ".remake-abc/model/weights").exists()
    assert gc.gc(apply=True).temporary == 1
    assert [path.name for path in filled.glob(".remake-*")] == [".remake-now"]


def test_fsck_never_stops_at_what_it_finds(filled: Path) -> None:
    """Random bytes in every file at once: a report, no exception."""
    rng = random.Random(1)
    for path in sorted(filled.rglob("*")):
        if path.is_file() and path.parent.name != "locks":
            path.chmod(0o644)
            path.write_bytes(rng.randbytes(rng.randrange(400)))
    for repair in (False, True, False):
        assert not fsck.fsck(repair=repair).clean
    assert index.ask(Home(filled), lambda found: found.rows()) == []
    assert index.ask(Home(filled), lambda found: found.unreadable())


DAMAGES = {
    "gone": lambda path: shutil.rmtree(path) if path.is_dir() else path.unlink(),
    "file": lambda path: path.write_text("junk"),
    "folder": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to("/nonexistent/place"),
    "pipe": os.mkfifo,
}
PLACES = (
    *(
        "format",
        "index.db",
        "objects",
        "records",
        "journal",
        "refs",
        "history",
        "hidden",
        "trees",
        "staging",
        "incoming",
    ),
    *("locks", "quarantine", "records/desk", "refs/desk", "history/desk", "records/desk/1.json", "journal/desk"),
    *("refs/desk/prod", "history/desk/prod", "hidden/desk/1"),
)
ASKED = {
    "list": lambda: listing.listing(),
    "show": lambda: verbs.show("desk@2"),
    "alias": lambda: verbs.show("desk@prod"),
    "history": lambda: verbs.history("desk", "prod"),
    "digest": lambda: verbs.show("sha256:0000"),
    "lineage": lambda: lineage.lineage("desk@2"),
    "gc": lambda: gc.gc(apply=True, keep_days=0),
    "tag": lambda: verbs.tag("desk@2", "next"),
    "remove": lambda: verbs.remove("desk@3"),
    "register": lambda: register.register(Path(os.environ["ADAPTERKIT_HOME"]).with_name("adapter"), "other"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_home_in_which_something_is_not_what_it_should_be(place: str, make: Any, tmp_path: Path) -> None:
    """Every question ends in an answer or in a sentence; fsck says so, and repairs what other files still say."""
    good, home, adapter = tmp_path / "good", tmp_path / "here", make()
    for meta in ("1", "2", "3"):
        register.register(adapter, "desk", meta={"x": meta}, home=good)
    verbs.tag("desk@2", "prod", home=good)
    verbs.remove("desk@1", home=good)
    listing.listing(home=good)
    kept = {path.name for path in (good / "objects").rglob("*") if path.is_file()}
    for damage, harm in DAMAGES.items():
        records = place.startswith(("records", "journal"))
        for asked in (ASKED, {"gc": ASKED["gc"]}) if records else (ASKED,):
            shutil.rmtree(home, ignore_errors=True)
            shutil.copytree(good, home, symlinks=True)
            DAMAGES["gone"](home / place)
            if damage != "gone":
                harm(home / place)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("ADAPTERKIT_HOME", str(home))
                for question in asked.values():
                    with contextlib.suppress(AdapterkitError):
                        question()
        # The last was gc alone: whatever was damaged, it freed nothing that some record may name.
        left = {path.name for path in (home / "objects").rglob("*") if path.is_file()}
        assert kept == left or not records, (place, damage)
        fsck.fsck(repair=True, home=home)
        again = fsck.fsck(home=home)
        lost = place in ("objects", "records", "records/desk", "records/desk/1.json", "hidden", "hidden/desk/1")
        assert lost or again.clean, (place, damage, again.problems)


def test_parts_together_check_everything(filled: Path, tmp_path: Path) -> None:
    whole = fsck.fsck()
    parts = [fsck.fsck(part=(number, 5)) for number in range(1, 6)]
    for count in ("records", "blobs", "bytes", "aliases"):
        assert sum(getattr(part, count) for part in parts) == getattr(whole, count)
        assert max(getattr(part, count) for part in parts) < getattr(whole, count) or getattr(whole, count) < 2
    assert all(part.clean for part in parts)
    for path in sorted(filled.rglob("*")):
        if path.is_file() and path.parent.name != "locks":
            path.chmod(0o644)
            path.write_bytes(path.read_bytes()[:-1])
    said = {(one.kind, one.path) for part in range(1, 6) for one in fsck.fsck(part=(part, 5)).problems}
    assert said == {(one.kind, one.path) for one in fsck.fsck().problems}
    assert len(said) > 5


@pytest.mark.parametrize("part", [(0, 1), (2, 1), (1, 5000)])
def test_a_part_that_there_is_not(part: tuple[int, int], home: Path) -> None:
    with pytest.raises(UsageError, match="there is no part"):
        fsck.fsck(part=part)


def test_each_record_is_read_once(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing.listing()
    read: list[tuple[str, int]] = []
    real = store.load
    monkeypatch.setattr(
        store, "load", lambda home, name, version: (read.append((name, version)), real(home, name, version))[1]
    )
    found = fsck.fsck()
    aliases = found.aliases  # an alias is held against the record that it means
    assert found.clean
    assert len(read) <= found.records + aliases
