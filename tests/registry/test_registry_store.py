"""The store: versions, idempotence, blobs, aliases, removal, full disks."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import stat
import subprocess
import sys
import textwrap
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapterkit import disk
from adapterkit.disk import copying, locks
from adapterkit.errors import CheckFailed, NotFound, OutputError, RegistryError, UnsafeError, UsageError
from adapterkit.registry import checkout, fsck, listing, refs, register, store, verbs
from adapterkit.registry.home import Home
from adapterkit.registry.identity import Identity
from adapterkit.registry.record import Record

FORK = get_context("fork")


def blobs_in(home: Path) -> list[Path]:
    return [path for path in (home / "objects").rglob("*") if path.is_file()]


def test_registering_stores_each_file_once_under_its_sha256(home: Path, make: Any) -> None:
    first = register.register(make("a"), "one")
    second = register.register(make("b"), "two")
    assert first.new
    assert second.new
    assert (first.stored, second.stored) == (first.record.size, 0)
    for path in blobs_in(home):
        assert disk.hash_file(path)[0] == path.name
        assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert len(blobs_in(home)) == 2


def test_what_the_folder_says_is_recorded_and_what_it_should_not_is_left_out(home: Path, make: Any) -> None:
    folder = make(revision="a" * 40, use_dora=True)
    for junk in (".env", "optimizer.pt", "rng_state_0.pth", ".git/config", "checkpoint-10/adapter_model.safetensors"):
        (folder / junk).parent.mkdir(exist_ok=True)
        (folder / junk).write_text("secret")
    found = register.register(folder, "a")
    assert (found.record.kind, found.record.method) == ("adapter", "dora")
    assert found.record.base == Identity("org/base", "a" * 40)
    assert [file.path for file in found.record.files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert set(found.skipped) == {".env", "optimizer.pt", "rng_state_0.pth", ".git/", "checkpoint-10/"}


def test_a_local_base_path_is_never_recorded(home: Path, make: Any, tmp_path: Path) -> None:
    assert register.register(make(base=str(tmp_path)), "a").record.base is None
    assert str(tmp_path).encode() not in (home / "records/a/1.json").read_bytes()


def test_registering_again_gives_the_version_that_exists(home: Path, make: Any) -> None:
    folder = make()
    first = register.register(folder, "a")
    again = register.register(folder, "a")
    assert (again.record, again.new) == (first.record, False)
    assert register.register(folder, "a", meta={"note": "x"}).record.version == 2
    assert register.register(folder, "a").record.version == 1
    forced = register.register(folder, "a", new_version=True)
    assert (forced.record.version, forced.new, forced.stored) == (3, True, 0)
    verbs.remove("a@1")
    assert register.register(folder, "a").record.version == 3


def test_a_journal_that_is_lost_or_torn_costs_nothing(home: Path, make: Any) -> None:
    folder = make()
    for number in range(3):
        register.register(folder, "a", meta={"n": str(number)})
    journal = home / "journal/a"
    whole = journal.read_bytes()
    for damage in (
        b"",
        whole[:-40],
        whole[:200],
        whole + b"4 " + b"0" * 30,
        whole.replace(b"\n2 ", b"\n9 "),
        b"\0" * 400,
    ):
        journal.write_bytes(damage)
        assert register.register(folder, "a", meta={"n": "1"}).record.version == 2
        assert journal.read_bytes().startswith(whole) or b"\n9 " in damage
        journal.unlink()
        assert register.register(folder, "a", meta={"n": "2"}).record.version == 3
    assert register.register(folder, "a", meta={"n": "3"}).record.version == 4
    assert fsck.fsck().clean


def test_the_line_of_a_killed_registration_is_cut_off(home: Path, make: Any) -> None:
    register.register(make(), "a")
    journal = home / "journal/a"
    journal.write_bytes(journal.read_bytes() + b"2 %s %s\n" % (b"a" * 64, b"b" * 64))
    assert register.register(make(content=b"x"), "a").record.version == 2
    assert journal.read_bytes().count(b"\n") == 2
    assert b"a" * 64 not in journal.read_bytes()
    assert fsck.fsck().clean


def test_a_registration_that_fails_leaves_no_line(home: Path, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    register.register(make(), "a")
    before = (home / "journal/a").read_bytes()

    def refuse(*_: Any) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store.disk, "publish_new", refuse)
        with pytest.raises(OutputError):
            store.add_record(Home(home), replace(verbs.show("a@1").record, meta={"n": "2"}), "a")
    assert (home / "journal/a").read_bytes() == before
    assert fsck.fsck().clean


def test_records_that_cannot_be_read_are_never_written_over(home: Path, make: Any) -> None:
    register.register(make(), "a")
    (home / "records/a/2.json").write_bytes(b'{"type":"adapterkit.record","schema":7}')
    (home / "records/a/3.json").write_bytes(b"")
    assert register.register(make(content=b"x"), "a").record.version == 4
    assert (home / "records/a/3.json").read_bytes() == b""
    with pytest.raises(RegistryError):
        verbs.show("a@3")


def test_a_record_in_the_wrong_place_is_refused(home: Path, make: Any) -> None:
    register.register(make(), "a")
    os.link(home / "records/a/1.json", home / "records/a/2.json")
    with pytest.raises(RegistryError, match="a@1"):
        verbs.show("a@2")


def test_links_that_leave_the_folder_are_refused_and_those_of_a_hub_cache_followed(
    home: Path, make: Any, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    folder = make()
    (folder / "link").symlink_to(secret)
    with pytest.raises(UnsafeError):
        register.register(folder, "a")
    (folder / "link").unlink()
    (folder / "sub").symlink_to(tmp_path)
    with pytest.raises(UnsafeError):
        register.register(folder, "a")
    (folder / "sub").unlink()
    os.mkfifo(folder / "pipe")
    with pytest.raises(UnsafeError):
        register.register(folder, "a")
    snapshot = tmp_path / "hub/models--org--a/snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "hub/models--org--a/blobs").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).rename(tmp_path / "hub/models--org--a/blobs" / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert len(register.register(snapshot, "a").record.files) == 2


def test_a_hard_link_is_made_only_when_asked_for_and_protects_the_file(home: Path, make: Any) -> None:
    folder = make("copied")
    register.register(folder, "a")
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_nlink == 1
    weights.write_bytes(b"changed in place")
    assert fsck.fsck().clean
    folder = make("linked", content=b"linked")
    register.register(folder, "b", link=True)
    weights = folder / "adapter_model.safetensors"
    assert weights.stat().st_nlink == 2
    assert stat.S_IMODE(weights.stat().st_mode) & 0o222 == 0


def test_a_source_that_changes_while_it_is_read_gives_a_blob_that_is_what_it_says(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(os.urandom(9 << 20))
    reader, writer = os.open(source, os.O_RDWR), os.open(target, os.O_RDWR | os.O_CREAT)
    digest, size = disk.copy_and_hash(reader, writer)
    assert (digest, size) == disk.hash_file(target) == disk.hash_file(source)
    for wrong in (reader, writer):
        os.close(wrong)


def test_a_file_without_a_size_of_its_own_is_copied_whole(tmp_path: Path) -> None:
    source = os.open("/proc/self/status" if os.path.exists("/proc/self/status") else __file__, os.O_RDONLY)
    target = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    digest, size = disk.copy_and_hash(source, target)
    assert size > 0
    assert disk.hash_file(tmp_path / "target") == (digest, size)
    os.close(source)
    os.close(target)


def test_aliases_move_with_history_and_only_from_where_they_are_expected(home: Path, make: Any) -> None:
    for content in (b"1", b"2", b"3"):
        register.register(make(content=content), "a")
    assert verbs.tag("a@1", "prod").before == 0
    assert not verbs.tag("a@1", "prod").moved
    assert verbs.tag("a@2", "prod", expected=1).before == 1
    with pytest.raises(CheckFailed, match="version 2, not at version 1"):
        verbs.tag("a@3", "prod", expected=1)
    with pytest.raises(CheckFailed, match="no version"):
        verbs.tag("a@3", "prod", expected=0)
    assert verbs.untag("a", "prod", expected=2).before == 2
    with pytest.raises(NotFound):
        verbs.untag("a", "prod")
    with pytest.raises(NotFound):
        verbs.show("a@prod")
    assert verbs.tag("a@3", "prod", expected=0).moved
    assert [move.version for move in verbs.history("a", "prod")] == [1, 2, 0, 3]
    assert [move.seq for move in verbs.history("a", "prod")] == [1, 2, 3, 4]
    assert fsck.fsck().clean


def test_a_move_that_was_killed_before_it_took_effect_leaves_no_trace(home: Path, make: Any) -> None:
    for content in (b"1", b"2"):
        register.register(make(content=content), "a")
    verbs.tag("a@1", "prod")
    verbs.tag("a@2", "prod")
    path = home / "history/a/prod"
    whole = path.read_bytes()
    ref = home / "refs/a/prod"
    ref.write_bytes(whole.splitlines(keepends=True)[0])
    assert verbs.show("a@prod").record.version == 1
    assert [move.version for move in verbs.history("a", "prod")] == [1]
    assert fsck.fsck().clean
    verbs.untag("a", "prod")
    assert [move.version for move in verbs.history("a", "prod")] == [1, 0]
    path.write_bytes(path.read_bytes() + whole[:50])
    verbs.tag("a@2", "prod")
    assert [move.version for move in verbs.history("a", "prod")] == [1, 0, 2]


def racer(root: str, version: int, expected: int, results: Any) -> None:
    try:
        results.put(verbs.tag(f"a@{version}", "prod", expected=expected, home=Path(root)).version)
    except CheckFailed:
        results.put(0)


def test_of_two_writers_that_expect_the_same_one_wins(home: Path, make: Any) -> None:
    for content in range(9):
        register.register(make(content=b"%d" % content), "a")
    verbs.tag("a@1", "prod")
    at = 1
    for _ in range(5):
        results = FORK.Queue()
        workers = [FORK.Process(target=racer, args=(str(home), n, at, results)) for n in range(2, 8) if n != at]
        for worker in workers:
            worker.start()
        wins = [found for found in (results.get(timeout=900) for _ in workers) if found]
        for worker in workers:
            worker.join()
        assert len(wins) == 1
        assert verbs.show("a@prod").record.version == wins[0]
        at = wins[0]
    assert [move.seq for move in verbs.history("a", "prod")] == list(range(1, 7))


def adder(root: str, results: Any) -> None:
    at = Home(Path(root))
    found = [store.add_record(at, Record("adapter", identity=Identity("org/x", "a" * 40)), "a") for _ in range(5)]
    results.put([(added.record.version, added.new) for added in found])


def test_the_same_body_from_many_processes_becomes_one_version(home: Path) -> None:
    Home(home).create()
    results = FORK.Queue()
    workers = [FORK.Process(target=adder, args=(str(home), results)) for _ in range(6)]
    for worker in workers:
        worker.start()
    found = [row for _ in workers for row in results.get(timeout=900)]
    for worker in workers:
        worker.join()
    assert {version for version, _ in found} == {1}
    assert sum(new for _, new in found) == 1


def test_removed_versions_are_out_of_sight_and_come_back(home: Path, make: Any) -> None:
    for content in (b"1", b"2"):
        register.register(make(content=content), "a")
    verbs.tag("a@2", "prod")
    with pytest.raises(UsageError, match="prod"):
        verbs.remove("a@2")
    with pytest.raises(UsageError, match="names none"):
        verbs.remove("a")
    verbs.untag("a", "prod")
    assert verbs.remove("a@2", reason="bad data").changed
    assert not verbs.remove("a@2").changed
    assert verbs.show("a").record.version == 1
    assert verbs.show("a@2").hidden
    assert [row.version for row in listing.listing().rows] == [1]
    assert [row.version for row in listing.listing(hidden=True).rows] == [1, 2]
    with pytest.raises(UsageError):
        verbs.tag("a@2", "prod")
    assert verbs.restore("a@2").changed
    assert not verbs.restore("a@2").changed
    assert verbs.show("a").record.version == 2
    assert [row.version for row in listing.listing().rows] == [1, 2]
    with pytest.raises(NotFound):
        verbs.remove("a@3")


def test_checkout_gives_the_files_their_names_back(home: Path, make: Any, tmp_path: Path) -> None:
    folder = make()
    (folder / "sub").mkdir()
    (folder / "sub/notes.txt").write_text("x")
    register.register(folder, "a")
    for where in (checkout.checkout("a"), checkout.checkout("a"), checkout.checkout("a", to=tmp_path / "out")):
        for inside in ("adapter_config.json", "adapter_model.safetensors", "sub/notes.txt"):
            assert (where / inside).read_bytes() == (folder / inside).read_bytes()
        assert register.register(where, "again").record.content == verbs.show("a").record.content
    with pytest.raises(OutputError):
        checkout.checkout("a", to=tmp_path / "out")
    blob = Home(home).blob(verbs.show("a").record.files[0].sha256)
    blob.unlink()
    with pytest.raises(NotFound):
        checkout.checkout("a", to=tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert verbs.show("a").missing == ("adapter_config.json",)


def test_a_missing_blob_is_healed_by_registering_again(home: Path, make: Any) -> None:
    folder = make()
    record = register.register(folder, "a").record
    blob = Home(home).blob(record.files[1].sha256)
    blob.unlink()
    assert not fsck.fsck().clean
    assert not register.register(folder, "a").new
    assert fsck.fsck().clean
    blob.chmod(0o644)
    blob.write_bytes(b"truncat")
    blob.write_bytes(b"t")
    register.register(folder, "a")
    assert fsck.fsck().clean


def limited(home: Path, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a process that may write no file of more than 64 KiB."""
    start = "import pathlib\nfrom adapterkit.registry import register, verbs\n" + textwrap.dedent(code)
    return subprocess.run(
        [sys.executable, "-c", start, str(folder)],
        env={**os.environ, "ADAPTERKIT_HOME": str(home), "PYTHONPATH": os.getcwd()},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
        capture_output=True,
        text=True,
    )


def test_a_disk_that_fills_up_leaves_the_registry_as_it_was(home: Path, make: Any) -> None:
    register.register(make(), "a")
    folder = make("big", content=b"x" * 1_000_000)
    found = limited(home, folder, "import sys\nregister.register(pathlib.Path(sys.argv[1]), 'a')")
    assert "OutputError: adapter_model.safetensors does not fit on the disk" in found.stderr
    report = fsck.fsck()
    assert report.clean
    assert report.notes == ()
    assert [row.version for row in listing.listing().rows] == [1]
    assert register.register(folder, "a").record.version == 2


def test_a_full_file_system_is_one_sentence_and_harmless(make: Any, tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(mount)], capture_output=True)
    if made.returncode:
        pytest.skip("no permission to mount a small file system")
    try:
        home = mount / "home"
        register.register(make(), "a", home=home)
        with pytest.raises(OutputError, match="free some space"):
            register.register(make("big", content=b"x" * 1_000_000), "b", home=home)
        room = os.statvfs(mount)
        (mount / "filler").write_bytes(b"x" * (room.f_bavail * room.f_frsize - 8192))
        before = len(blobs_in(home))
        with pytest.raises(OutputError, match=r"does not fit|free some space"):
            for number in range(100):
                register.register(make("small", content=b"%d" % number * 3000), "c", home=home)
        with pytest.raises(OutputError, match="does not fit"):
            for number in range(2000):
                verbs.tag("a@1", f"alias-{number}", home=home)
        (mount / "filler").unlink()
        report = fsck.fsck(home=home)
        assert report.clean, report.problems
        assert len(blobs_in(home)) >= before
        assert register.register(make("again", content=b"y"), "c", home=home).new
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_home_that_cannot_be_written_is_one_sentence(make: Any, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OutputError):
        register.register(make(), "a", home=tmp_path / "locked/home")


def test_a_lock_that_is_kept_ends_in_a_sentence(tmp_path: Path) -> None:
    with (
        disk.locked(tmp_path / "lock"),
        pytest.raises(OutputError, match="held"),
        disk.locked(tmp_path / "lock", timeout=0.05),
    ):
        pass
    with disk.locked(tmp_path / "lock", shared=True), disk.locked(tmp_path / "lock", shared=True):
        pass


def test_time_that_a_machine_slept_is_not_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every clock jumps an hour at each pause of a waiter with one second of patience, and it goes on waiting."""
    hours = [0.0]
    holder = ExitStack()

    def sleep(_: float) -> None:
        hours[0] += 3600.0
        if hours[0] == 5 * 3600.0:
            holder.close()

    clock = {name: lambda: hours[0] for name in ("time", "monotonic", "perf_counter")}
    with holder:
        holder.enter_context(disk.locked(tmp_path / "lock"))
        monkeypatch.setattr(locks, "time", SimpleNamespace(sleep=sleep, **clock))
        with disk.locked(tmp_path / "lock", timeout=1.0):
            assert hours[0] == 5 * 3600.0


def test_a_waiter_gives_up_after_its_own_pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(locks, "time", SimpleNamespace(sleep=slept.append))
    with (
        disk.locked(tmp_path / "lock"),
        pytest.raises(OutputError, match="1 seconds"),
        disk.locked(tmp_path / "lock", timeout=1.0),
    ):
        pass
    assert 0.5 < sum(slept) < 2.0


def test_a_home_of_another_layout_is_left_alone(home: Path, make: Any) -> None:
    register.register(make(), "a")
    (home / "format").write_bytes(b"adapterkit registry 2\n")
    for attempt in (
        lambda: register.register(make(), "b"),
        lambda: verbs.show("a"),
        lambda: listing.listing(),
        lambda: verbs.tag("a@1", "prod"),
    ):
        with pytest.raises(RegistryError, match="layout"):
            attempt()
    assert not (home / "records/b").exists()


def test_move_needs_no_index(home: Path, make: Any) -> None:
    register.register(make(), "a")
    verbs.tag("a@1", "prod")
    assert refs.get(Home(home), "a", "prod")
    assert not (home / "index.db").exists()


def test_a_large_file_is_flushed_while_it_is_hashed(
    home: Path, make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A disk that refuses a part says so once, to whoever asked then; that must not be lost in the helper."""
    folder = make(content=b"weights" * (3 << 20))
    monkeypatch.setattr(copying, "_PAUSE", 0.0001)

    def refuse(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", refuse)
        with pytest.raises(OutputError, match="does not fit on the disk"):
            register.register(folder, "large")
    assert list((home / "incoming").iterdir()) == []
    record = register.register(folder, "large").record
    weights = folder / "adapter_model.safetensors"
    assert record.files[1].sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert Home(home).blob(record.files[1].sha256).read_bytes() == weights.read_bytes()
