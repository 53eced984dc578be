"""Publishing files and folders: no planted link is written through, a killed run is put right, and calls may be missing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from children import fork, wait
from lacking import LACKS
from models import plain_base, read_bytes

import adapterkit
from adapterkit import disk
from adapterkit.disk import calls, folders
from adapterkit.errors import AdapterkitError, NotFound, OutputError, UnsafeError, UsageError
from adapterkit.gguf.projector import Projector
from adapterkit.lint.problems import Problem, sarif
from adapterkit.registry.bundle import export_bundle
from adapterkit.registry.checkout import checkout
from adapterkit.registry.register import register
from adapterkit.verbs.verify import html as page

if TYPE_CHECKING:
    from collections.abc import Callable


def victim(folder: Path) -> Path:
    """A folder that somebody would miss."""
    (folder / "sub").mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    (folder / "sub" / "more.txt").write_text("more")
    return folder


def intact(folder: Path) -> bool:
    return {p.name: p.read_text() for p in folder.rglob("*") if p.is_file()} == {
        "thesis.txt": "years of work",
        "more.txt": "more",
    }


# ------------------------------------------------------------------ planted


WRITERS: dict[str, Callable[[Path, Path, Path], object]] = {
    "merge": lambda base, adapter, out: adapterkit.merge(base, [adapter], out),
    "merge_resume": lambda base, adapter, out: adapterkit.merge(base, [adapter], out, resume=True),
    "merge_force": lambda base, adapter, out: adapterkit.merge(base, [adapter], out, force=True),
    "convert": lambda base, adapter, out: adapterkit.convert(base, to="f16", out=out),
    "combine": lambda base, adapter, out: adapterkit.combine([adapter, adapter], out),
    "resize": lambda base, adapter, out: adapterkit.resize(adapter, out=out, rank=1),
    "peft": lambda base, adapter, out: adapterkit.convert(adapter, to="mlx", out=out),
}


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize("planted", ["link", "dangling", "file", "folder", "pipe"])
def test_nothing_at_the_name_of_a_working_folder_is_touched(
    verb: str, planted: str, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    kept = victim(tmp_path / "kept")
    place = disk.partial_folder(tmp_path / "out")
    if planted == "link":
        place.symlink_to(kept)
    elif planted == "dangling":
        place.symlink_to(tmp_path / "nowhere")
    elif planted == "file":
        place.write_text("mine")
    elif planted == "folder":
        victim(place)
    else:
        os.mkfifo(place)
    before = os.lstat(place)
    with pytest.raises(UnsafeError, match=r"in the way|not a working folder"):
        WRITERS[verb](*inputs, tmp_path / "out")
    assert intact(kept)
    assert os.lstat(place).st_ino == before.st_ino
    assert planted != "folder" or intact(place)
    assert not (tmp_path / "nowhere").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["link", "hardlink", "pipe"])
@pytest.mark.parametrize(
    "name", ["config.json", "adapterkit.json", ".journal.jsonl", "model-00001-of-00002.safetensors"]
)
def test_a_resumed_run_writes_through_nothing(how: str, name: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """The folder is ours; what another put into it since is not."""
    kept = tmp_path / "kept"
    kept.write_text("precious")
    place = disk.partial_folder(tmp_path / "out")
    disk.own_folder(place)
    if how == "link":
        (place / name).symlink_to(kept)
    elif how == "hardlink":
        os.link(kept, place / name)
    else:
        os.mkfifo(place / name)
    adapterkit.merge(inputs[0], [inputs[1]], tmp_path / "out", resume=True)
    adapterkit.merge(inputs[0], [inputs[1]], tmp_path / "whole")
    assert kept.read_text() == "precious"
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "whole")
    assert all(path.is_file() and not path.is_symlink() for path in (tmp_path / "out").rglob("*.*"))


def test_a_folder_inside_a_resumed_run_that_is_a_link(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    kept = victim(tmp_path / "kept")
    place = disk.partial_folder(tmp_path / "out")
    disk.own_folder(place)
    (place / "1_Pooling").symlink_to(kept)
    with pytest.raises(AdapterkitError):
        adapterkit.merge(inputs[0], [inputs[1]], tmp_path / "out", resume=True)
    assert intact(kept)


def test_a_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = disk.partial_folder(tmp_path / "out")
    disk.own_folder(place)
    real = folders._stat

    def of_another(path: Path, fd: int | None) -> Any:
        found = real(path, fd)
        return os.stat_result((*found[:4], 4321, *found[5:]))

    monkeypatch.setattr(folders, "_stat", of_another)
    with pytest.raises(UnsafeError, match="belongs to another user"), disk.staging(tmp_path / "out", resume=True):
        pass


def test_the_mark_does_not_come_with_a_repository(tmp_path: Path) -> None:
    disk.own_folder(tmp_path / "repo")
    disk.own_folder(tmp_path / "repo" / "own")
    (tmp_path / "repo" / "own" / "file").write_text("x")
    assert disk.is_own(tmp_path / "repo" / "own")
    git = ["git", "-C", str(tmp_path / "repo"), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for step in (["init", "-q"], ["add", "-f", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *step], check=True)
    subprocess.run(["git", "clone", "-q", str(tmp_path / "repo"), str(tmp_path / "clone")], check=True)
    assert (tmp_path / "clone" / "own" / "file").exists()
    assert not disk.is_own(tmp_path / "clone" / "own")
    (tmp_path / "link").symlink_to(tmp_path / "repo")
    assert not disk.is_own(tmp_path / "link")


def test_the_mark_in_a_file_names_the_folder(tmp_path: Path, lacking: Callable[[str], None]) -> None:
    lacking("sticky")
    disk.own_folder(tmp_path / "own")
    assert disk.is_own(tmp_path / "own")
    shutil.copytree(tmp_path / "own", tmp_path / "copy")
    assert not disk.is_own(tmp_path / "copy")


def test_small_files_replace_links_and_follow_none(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("precious")
    target = tmp_path / "note"
    target.symlink_to(kept)
    disk.write_file(target, b"new")
    assert (kept.read_text(), target.read_bytes(), target.is_symlink()) == ("precious", b"new", False)
    os.link(kept, tmp_path / "hard")
    disk.write_file(tmp_path / "hard", b"new")
    assert kept.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["hard", "kept", "note"]


def test_temporary_names_cannot_be_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = os.open

    def note(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            seen.append((os.fspath(path), bool(flags & os.O_EXCL), bool(flags & os.O_NOFOLLOW)))
        return real(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", note)
    for _ in range(3):
        disk.write_file(tmp_path / "note", b"x")
        os.close(disk.fresh(tmp_path)[0])
    assert len({name for name, _, _ in seen}) == 6
    assert all(exclusive and unfollowed for _, exclusive, unfollowed in seen)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_not_replaced(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "note"
    target.mkdir() if kind == "folder" else os.mkfifo(target)
    with pytest.raises(UnsafeError, match="is no file"):
        disk.write_file(target, b"x")
    assert not stat.S_ISREG(os.lstat(target).st_mode)


def test_a_device_that_the_user_names_takes_the_bytes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    disk.deliver(tmp_path / "pipe", b"page")
    reader.join(10)
    assert found == [b"page"]
    assert stat.S_ISFIFO(os.lstat(tmp_path / "pipe").st_mode)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a//x", "", ".", "a\\x", "a\0x"])
def test_names_that_lead_out_of_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UnsafeError):
        disk.write_inside(tmp_path / "in", name, b"x")
    assert os.listdir(tmp_path) == ["in"]


def test_pipes_and_folders_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafeError, match="is a pipe"):
        disk.open_regular(tmp_path / "pipe")
    with pytest.raises(UnsafeError, match="is a folder"):
        disk.open_regular(tmp_path)
    with pytest.raises(UnsafeError, match="is a device"):
        disk.open_regular(Path("/dev/zero"))
    with pytest.raises(NotFound):
        disk.open_regular(tmp_path / "none")


def test_strays_of_a_killed_run_go_with_the_next(tmp_path: Path) -> None:
    (tmp_path / ".note.0123456789abcdef.part").write_text("stray")
    (tmp_path / ".note.mine.part").write_text("not ours")
    fd, live = os.open(tmp_path / ".note.fedcba9876543210.part", os.O_RDWR | os.O_CREAT), ".note.fedcba9876543210.part"
    try:
        calls.flock(fd)
        disk.write_file(tmp_path / "note", b"x")
    finally:
        os.close(fd)
    assert sorted(os.listdir(tmp_path)) == sorted([live, ".note.mine.part", "note"])


def test_an_export_or_copy_that_was_killed_leaves_nothing_for_the_next(
    inputs: tuple[Path, Path], tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(inputs[1], "x")
    for name, work in {
        "bundle": lambda out: export_bundle(("x",), out),
        "folder": lambda out: checkout("x", to=out),
    }.items():
        out = tmp_path / name / "out"
        out.parent.mkdir()

        def killed() -> None:
            monkeypatch.setattr(folders, "sync_tree", lambda _: os.kill(os.getpid(), 9))
            monkeypatch.setattr(disk, "publish_files", lambda *_, **__: os.kill(os.getpid(), 9))
            work(out)  # noqa: B023

        assert wait(fork(killed)) == -9
        assert os.listdir(out.parent) == [".out.partial"]
        work(out)
        assert os.listdir(out.parent) == ["out"]


def test_a_projector_is_copied_through_no_link(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("precious")
    source = tmp_path / "in" / "mmproj.gguf"
    source.parent.mkdir()
    source.write_bytes(b"GGUF")
    tower = Projector(None, tmp_path / "model.gguf")
    tower._path, tower._target = source, tmp_path / "mmproj.gguf"
    (tmp_path / ".mmproj.gguf.partial").symlink_to(kept)
    with pytest.raises(UnsafeError):
        tower.copy()
    assert kept.read_text() == "precious"
    (tmp_path / ".mmproj.gguf.partial").unlink()
    tower.copy()
    assert (tmp_path / "mmproj.gguf").read_bytes() == b"GGUF"
    assert sorted(os.listdir(tmp_path)) == ["in", "kept", "mmproj.gguf"]


# ------------------------------------------------------------------ killed while it replaces


@pytest.mark.parametrize("exchange", [False, True])
@pytest.mark.parametrize("at", range(6))
def test_killed_at_any_rename_of_a_replacement(exchange: bool, at: int, tmp_path: Path) -> None:
    """Old or new, whole, at once or after the next run has looked; and nothing beside it."""
    out = tmp_path / "out"
    victim(out)

    def work() -> None:
        count = 0

        def step(real: Any) -> Any:
            def call(*args: Any, **more: Any) -> Any:
                nonlocal count
                count += 1
                if count > at:
                    os.kill(os.getpid(), 9)
                return real(*args, **more)

            return call

        if not exchange:
            calls._renameat2 = lambda *_: False  # type: ignore[assignment]
        os.rename = step(os.rename)
        calls.exchange = step(calls.exchange)
        shutil.rmtree = step(shutil.rmtree)  # type: ignore[assignment]
        with disk.staging(out, resume=True) as folder:
            disk.write_inside(folder, "new.txt", b"new")
            disk.publish(folder, out, keep={"new.txt"}, force=True)

    done = wait(fork(work)) == 0
    disk.recover(out)
    assert intact(out) or os.listdir(out) == ["new.txt"]
    assert not done or os.listdir(out) == ["new.txt"]
    with disk.staging(out, resume=True) as folder:
        disk.write_inside(folder, "new.txt", b"new")
        disk.publish(folder, out, keep={"new.txt"}, force=True)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == ["new.txt"]


def test_a_folder_that_looks_like_a_replacement_is_left_alone(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    aside = victim(tmp_path / ".out.replaced" / "old").parent
    adapterkit.merge(inputs[0], [inputs[1]], tmp_path / "out")
    assert intact(aside / "old")


# ------------------------------------------------------------------ file systems that lack calls


@pytest.mark.parametrize("what", LACKS)
def test_a_disk_without(
    what: str, inputs: tuple[Path, Path], tmp_path: Path, home: Path, lacking: Callable[[str], None]
) -> None:
    """The same bytes, nothing left beside them, by every verb that writes."""
    base, adapter = inputs
    adapterkit.merge(base, [adapter], tmp_path / "right")
    lacking(what)
    out = tmp_path / "made" / "out"
    for _ in range(2):
        adapterkit.merge(base, [adapter], out, force=True)
        assert read_bytes(out) == read_bytes(tmp_path / "right")
        assert os.listdir(out.parent) == ["out"]
    assert not out.stat().st_mode & stat.S_ISVTX
    with pytest.raises(OutputError, match="exists"):
        adapterkit.merge(base, [adapter], out)
    adapterkit.combine([adapter, adapter], out.parent / "both")
    adapterkit.convert(base, to="f16", out=out.parent / "half")
    register(out, "x")
    register(adapter, "y")
    export_bundle(("x", "y"), out.parent / "bundle")
    checkout("x", to=out.parent / "copy")
    assert sorted(os.listdir(out.parent)) == ["both", "bundle", "copy", "half", "out"]
    assert (out.parent / "copy" / "model-00001-of-00002.safetensors").read_bytes() == (
        out / "model-00001-of-00002.safetensors"
    ).read_bytes()


def test_two_runs_without_locks(tmp_path: Path, lacking: Callable[[str], None]) -> None:
    lacking("flock")
    out = tmp_path / "out"
    with disk.staging(out, resume=False) as folder:
        disk.write_inside(folder, "a", b"first")

        def other() -> None:
            with disk.staging(out, resume=False):
                pass

        assert wait(fork(other)) == OutputError.exit_code
        assert os.listdir(folder / "..") == [folder.name]
        disk.publish(folder, out, keep={"a"}, force=False)
    assert os.listdir(out) == ["a"]
    assert os.listdir(tmp_path) == ["out"]


def test_the_lock_file_of_a_killed_run_is_taken_over_once(tmp_path: Path, lacking: Callable[[str], None]) -> None:
    lacking("flock")
    out = tmp_path / "out"

    def killed() -> None:
        with disk.staging(out, resume=True):
            os.kill(os.getpid(), 9)

    assert wait(fork(killed)) == -9
    assert [name for name in os.listdir(disk.partial_folder(out)) if name.startswith(".lock")] == [".lock.1"]
    with (
        disk.staging(out, resume=True),
        pytest.raises(OutputError, match="another run"),
        disk.staging(out, resume=True),
    ):
        pass


def test_the_lock_file_of_another_machine_is_believed(
    tmp_path: Path, lacking: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterkit.disk import locks

    lacking("flock")
    with monkeypatch.context() as there:
        there.setattr(locks, "_host", lambda: "elsewhere")
        holder = disk.staging(tmp_path / "out", resume=True)
        holder.__enter__()
    with pytest.raises(OutputError, match=r"remove .*\.lock\.1"), disk.staging(tmp_path / "out", resume=True):
        pass


@pytest.mark.parametrize("code", ["EIO", "ENOSPC", "EDQUOT"])
def test_a_disk_that_fails_ends_the_run(
    code: str, inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def fail(fd: int) -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError):
        adapterkit.merge(inputs[0], [inputs[1]], tmp_path / "deep" / "out")
    assert os.listdir(tmp_path) == []


def test_every_folder_of_an_output_is_on_disk_before_it_has_its_name(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    sync, rename = os.fsync, calls.rename_new

    def note_sync(fd: int) -> None:
        order.append(("sync", os.readlink(f"/proc/self/fd/{fd}")))
        sync(fd)

    def note_rename(one: Any, other: Any) -> None:
        order.append(("rename", str(other)))
        rename(one, other)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(calls, "rename_new", note_rename)
    out = tmp_path / "out"
    adapterkit.merge(inputs[0], [inputs[1]], out)
    at = order.index(("rename", str(out)))
    before = {path for what, path in order[:at] if what == "sync"}
    partial = str(disk.partial_folder(out))
    for path in (out, *out.rglob("*")):
        assert str(path).replace(str(out), partial) in before, path
    assert ("sync", str(tmp_path)) in order[at:]


def test_long_names(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("o" * 250, "é" * 127):
        adapterkit.merge(inputs[0], [inputs[1]], tmp_path / name)
        shutil.rmtree(tmp_path / name)
    assert disk.partial_folder(tmp_path / ("o" * 250)) != disk.partial_folder(tmp_path / ("o" * 249 + "x"))
    assert os.listdir(tmp_path) == []


def test_a_system_that_calls_every_folder_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(calls.fcntl, "flock", busy)
    with pytest.raises(OutputError, match="another run"), disk.staging(tmp_path / "new" / "out", resume=False):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("held", [True, False])
def test_a_folder_that_another_run_took_in_between(held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was made here, and locked and marked there: it is the other run's, also while that one has nothing in it."""
    folder, real = disk.partial_folder(tmp_path / "out"), folders._make
    other: list[int] = []

    def taken(path: Path) -> bool:
        made = real(path)
        other.append(os.open(path, os.O_RDONLY))
        calls.fcntl.flock(other[0], calls.fcntl.LOCK_EX)
        if held:
            folders._mark(path, other[0])
        return made

    monkeypatch.setattr(folders, "_make", taken)
    with pytest.raises(OutputError, match="another run"), disk.staging(tmp_path / "out", resume=False):
        pass
    assert folder.exists() == held
    os.close(other[0])


def test_a_folder_that_exists_is_not_made_again(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that became read-only nothing is left undone without a word, and no call is made for nothing."""
    made: list[str] = []
    real = os.mkdir
    monkeypatch.setattr(os, "mkdir", lambda path, *more, **k: (made.append(str(path)), real(path, *more, **k))[1])
    adapterkit.merge(inputs[0], [inputs[1]], tmp_path / "out")
    assert str(tmp_path) not in made


def test_the_package_is_imported_where_there_is_no_fcntl() -> None:
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "import adapterkit.cli, adapterkit.registry.blobs, adapterkit.checkpoint.write, adapterkit.verbs.merge\n"
        "from adapterkit.disk import calls; print(calls.fcntl)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], timeout=900).strip() == b"None"


def test_names_that_differ_in_case_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a disk takes two spellings for one name, the target is there already."""
    base = plain_base(tmp_path / "base", layers=1)
    real = os.path.lexists
    monkeypatch.setattr(os.path, "lexists", lambda path: real(path) or real(str(path).lower()))
    with pytest.raises((OutputError, AdapterkitError)):
        adapterkit.convert(base, to="f16", out=tmp_path / "BASE")


@pytest.mark.parametrize("write", [disk.open_appended, lambda path: disk.deliver(path, b"new")], ids=["added", "new"])
def test_a_pipe_that_nobody_reads_is_not_waited_for(write: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "events")
    with pytest.raises(OutputError, match="nobody reads"):
        write(tmp_path / "events")
    reading = os.open(tmp_path / "events", os.O_RDONLY | os.O_NONBLOCK)
    try:
        disk.deliver(tmp_path / "events", b"read")
        assert os.read(reading, 9) == b"read"
    finally:
        os.close(reading)


def test_nothing_is_added_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "events").symlink_to("victim")
    with pytest.raises(OutputError, match="is a link"):
        disk.open_appended(tmp_path / "events")
    (tmp_path / "dangling").symlink_to("made")
    with pytest.raises(OutputError, match="is a link"):
        disk.open_appended(tmp_path / "dangling")
    assert not (tmp_path / "made").exists()
    (tmp_path / "out").symlink_to("/dev/null")
    os.close(disk.open_appended(tmp_path / "out"))
    for text in ("one", "two"):
        with open(disk.open_appended(tmp_path / "victim"), "a") as file:
            file.write(f" {text}")
    assert (tmp_path / "victim").read_text() == "precious one two"


def test_names_that_are_not_utf8(tmp_path: Path, inputs: tuple[Path, Path]) -> None:
    """Linux takes any bytes as a name; what prints, hashes or serves it as JSON has to as well."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/raw\xff"))
    for one, name in zip(inputs, ("base", "adapter"), strict=True):
        shutil.copytree(one, folder / name)
    base, adapter, out = (folder / name for name in ("base", "adapter", "out"))
    adapterkit.merge(base, adapter, out, jobs=1)
    report = adapterkit.verify(out, base=base, adapters=[adapter], level="tensors")
    assert report.ok
    assert "raw\\udcff" in page(report)
    page(report).encode()
    with pytest.raises(UsageError, match="not UTF-8"):
        adapterkit.merge(base, adapter, folder / "other", save_plan=folder / "plan.json")
    problem = Problem("error", "x", "text", "hint", f"{adapter}/adapter_config.json", 1)
    assert "raw%FF/adapter" in json.dumps(sarif([problem], {}))
    json.dumps(sarif([problem], {}), ensure_ascii=False).encode()
