"""The index: right after every change, whoever made it, and never believed over the files."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from adapterkit.registry import fsck, gc, index, listing, register, scan, schema, verbs
from adapterkit.registry.home import Home
from adapterkit.registry.identity import Identity
from adapterkit.registry.record import Parent


def refs(**filters: Any) -> list[str]:
    return [f"{row.name}@{row.version}" for row in listing.listing(**filters).rows]


def settle(home: Path) -> None:
    """Makes every folder look old, so that the index may believe their times."""
    old = time.time() - 10
    for folder in ("records", "refs", "hidden", "staging"):
        for path in [home / folder, *(home / folder).iterdir()]:
            os.utime(path, (old, old))
    listing.listing()


@pytest.fixture
def filled(home: Path, make: Any) -> Path:
    for name, content, config in (
        ("chat", b"1", {}),
        ("chat", b"2", {"revision": "a" * 40}),
        ("code", b"3", {"use_dora": True, "base": "org/other"}),
    ):
        register.register(make(name + content.decode(), content, **config), name)
    verbs.tag("chat@1", "prod")
    return home


def test_lists_follow_every_change(filled: Path, make: Any) -> None:
    assert refs() == ["chat@1", "chat@2", "code@1"]
    for _ in range(2):
        settle(filled)
        assert refs(alias="prod") == ["chat@1"]
        verbs.tag("chat@2", "prod")
        assert refs(alias="prod") == ["chat@2"]
        settle(filled)
        verbs.untag("chat", "prod")
        assert refs(alias="prod") == []
        settle(filled)
        verbs.remove("chat@2")
        assert refs() == ["chat@1", "code@1"]
        settle(filled)
        verbs.restore("chat@2")
        assert refs() == ["chat@1", "chat@2", "code@1"]
        verbs.tag("chat@1", "prod")
    settle(filled)
    register.register(make("new", b"4"), "new")
    assert refs(name="n*") == ["new@1"]


def test_an_index_that_is_right_is_answered_without_a_look_at_the_records(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(filled)
    monkeypatch.setattr(scan, "catch_up", lambda *_: pytest.fail("the index was brought up to date"))
    assert len(refs()) == 3


def test_a_young_folder_is_never_believed(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two changes within one tick of the clock: the second leaves all times as they are, and is seen all the same."""
    refs()
    times = {path: path.stat() for path in (filled / "staging", filled / "records/chat", filled / "refs/chat")}
    verbs.tag("chat@2", "prod")
    for path, info in times.items():
        os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert refs(alias="prod") == ["chat@2"]


def test_a_writer_at_work_keeps_the_index_from_being_believed(filled: Path) -> None:
    settle(filled)
    (filled / "staging/somebody").write_text("")
    os.utime(filled / "staging", (1, 1))
    refs()
    with sqlite3.connect(filled / "index.db") as db:
        assert db.execute("select value from facts where key = 'clean'").fetchone() == ("",)
    db.close()


def test_a_record_that_is_put_there_by_hand_or_vanishes_is_noticed(filled: Path, tmp_path: Path) -> None:
    refs()
    moved = filled / "records/code"
    shutil.move(moved, tmp_path / "code")
    (filled / "staging/x").touch()
    (filled / "staging/x").unlink()
    assert refs() == ["chat@1", "chat@2"]
    shutil.move(tmp_path / "code", moved)
    (filled / "staging/x").touch()
    (filled / "staging/x").unlink()
    assert refs() == ["chat@1", "chat@2", "code@1"]


def damage_header(path: Path) -> None:
    path.write_bytes(b"not a database" * 100)


def damage_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    for page in range(4096, len(data), 4096):
        data[page : page + 200] = os.urandom(200)
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def future(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("insert into migrations values ('m999_from_the_future')")
        db.execute("drop table records")
    db.close()


def half_migrated(path: Path) -> None:
    """Killed between the tables of a step and the note that it was applied."""
    with sqlite3.connect(path) as db:
        db.execute("delete from migrations where name = ?", (schema.MIGRATIONS[-1].__name__,))
    db.close()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [damage_header, damage_middle, truncate, empty, future, half_migrated, folder, Path.unlink]
)
def test_a_damaged_or_future_index_is_built_again(filled: Path, damage: Any) -> None:
    settle(filled)
    wanted = refs()
    damage(filled / "index.db")
    assert refs() == wanted
    assert refs(alias="prod") == ["chat@1"]
    assert verbs.show("sha256:" + verbs.show("code").record.digest[:12]).record.name == "code"


def test_a_stale_journal_of_a_killed_writer_does_not_reach_a_new_index(filled: Path) -> None:
    refs()
    (filled / "index.db-journal").write_bytes(os.urandom(5000))
    (filled / "index.db").write_bytes(b"x" * 5000)
    assert len(refs()) == 3
    assert fsck.fsck().clean


def test_reindex_builds_what_the_files_say(filled: Path) -> None:
    assert index.reindex(Home(filled)) == 3
    with sqlite3.connect(filled / "index.db") as db:
        db.execute("update records set method = 'lie'")
    db.close()
    settle(filled)
    assert refs(method="lie")
    report = fsck.fsck()
    assert [problem.kind for problem in report.problems] == ["index"]
    assert fsck.fsck(repair=True).clean
    assert not refs(method="lie")
    assert fsck.fsck().problems == ()


def test_unreadable_and_future_records_are_told_and_the_rest_listed(filled: Path) -> None:
    (filled / "records/chat/1.json").write_bytes(b"{")
    index.reindex(Home(filled))
    found = listing.listing()
    assert [row.version for row in found.rows if row.name == "chat"] == [2]
    assert [(row.name, row.version) for row in found.unreadable] == [("chat", 1)]


def test_filters(home: Path, make: Any) -> None:
    base = Identity("org/base", "b" * 40, shapes="1" * 64, skeleton="2" * 64, sampled="3" * 64)
    sibling = Identity("org/sibling", "c" * 40, shapes="1" * 64, skeleton="2" * 64, sampled="4" * 64)
    register.register_base(base, "the-base")
    register.register(make("a", b"a"), "a", base=base, evidence={"fidelity": {"kl": 1e-6}})
    register.register(make("b", b"b"), "b", base=sibling, method="dora")
    register.register(make("b", b"bb"), "b", base=sibling, kind="combined", parents=[Parent("adapter", "9" * 64)])
    assert refs(base="org/base") == ["a@1"]
    assert refs(base="org/*") == ["a@1", "b@1", "b@2"]
    assert refs(base="the-base") == ["a@1"]
    assert refs(base="4444444") == ["b@1", "b@2"]
    assert refs(base="org/base@bbbbbb") == ["a@1"]
    assert refs(base="nothing") == []
    assert refs(fits=Identity(skeleton="2" * 64, shapes="1" * 64, sampled="3" * 64)) == ["a@1"]
    assert refs(fits=Identity("org/sibling", "c" * 40)) == ["b@1", "b@2"]
    assert refs(fits=Identity(skeleton="2" * 64)) == []
    assert refs(method="dora") == ["b@1"]
    assert refs(kind="combined") == ["b@2"]
    assert refs(kind="base") == ["the-base@1"]
    assert refs(evidence="fidelity") == ["a@1"]
    assert refs(latest=True) == ["a@1", "b@2", "the-base@1"]
    assert refs(name="?") == ["a@1", "b@1", "b@2"]
    assert refs(name="'; drop table records; --") == []


def test_an_empty_or_missing_home_lists_nothing_and_is_not_made(home: Path) -> None:
    assert listing.listing().rows == ()
    assert gc.gc().blobs == ()
    assert fsck.fsck().clean
    assert not home.exists()


def test_a_home_on_a_read_only_disk_can_be_read(filled: Path, make: Any, tmp_path: Path) -> None:
    view = tmp_path / "view"
    view.mkdir()
    (filled / "index.db").unlink(missing_ok=True)
    if subprocess.run(["mount", "--bind", str(filled), str(view)], capture_output=True).returncode:
        pytest.skip("no permission to mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(view)], check=True)
        assert [row.name for row in listing.listing(home=view).rows] == ["chat", "chat", "code"]
        assert verbs.show("chat@prod", home=view).record.version == 1
        assert fsck.fsck(home=view).clean
    finally:
        subprocess.run(["umount", "-l", str(view)], check=True)


def test_reading_verbs_import_nothing_heavy(filled: Path) -> None:
    code = """
import sys
from adapterkit.registry import bundle, checkout, fsck, gc, lineage, listing, register, verbs
listing.listing(); verbs.show('chat@prod'); lineage.tree_text(lineage.lineage('code')); fsck.fsck(); gc.gc()
heavy = {'torch', 'numpy', 'transformers', 'huggingface_hub', 'safetensors', 'gguf', 'click', 'asyncio', 'ssl'}
print(sorted(heavy & set(sys.modules)))
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert (found.stdout, found.stderr) == ("[]\n", "")
