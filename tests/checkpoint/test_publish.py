"""Targets: refused before the first byte, replaced in one step, and nothing left behind when a run is stopped."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from children import fork, run, wait
from models import plain_adapter, plain_base, read_bytes

import adapterkit
from adapterkit import disk
from adapterkit.checkpoint.publish import check_target, partial_folder, staging
from adapterkit.disk import calls
from adapterkit.errors import OutputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("inputs")
    base = plain_base(folder / "base", layers=3, width=64, shards=2)
    return base, [plain_adapter(folder / "adapter", base)]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block takes a moment, so that a run can be met in the middle."""
    from adapterkit.checkpoint import sink

    compute = sink.Sink._compute

    def wait_and_compute(*arguments: Any) -> int:
        time.sleep(0.05)
        return compute(*arguments)

    monkeypatch.setattr(sink.Sink, "_compute", wait_and_compute)


def until(condition: Any, timeout: float = 60.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


# ------------------------------------------------------------------ refused


def test_existing_target(inputs: tuple[Path, list[Path]], tmp_path: Path) -> None:
    for name in ("folder", "file", "dead"):
        out = tmp_path / name
        if name == "folder":
            out.mkdir()
        elif name == "file":
            out.write_text("mine")
        else:
            out.symlink_to("nowhere")
        with pytest.raises(OutputError, match="exists"):
            adapterkit.merge(*inputs, out)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["dead", "file", "folder"]


@pytest.mark.parametrize("inside", ["", "out", "a/b/out"])
@pytest.mark.parametrize("force", [False, True])
def test_target_inside_an_input(inside: str, force: bool, tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", base)
    before = read_bytes(tmp_path)
    for folder in (base, adapter):
        with pytest.raises(UsageError, match="lies in or over the input"):
            adapterkit.merge(base, [adapter], folder / inside if inside else folder, force=force)
    (tmp_path / "link").symlink_to(base)
    with pytest.raises(UsageError):
        adapterkit.merge(base, [adapter], tmp_path / "link" / "out", force=force)
    with pytest.raises(UsageError):
        adapterkit.merge(base, [adapter], tmp_path / "base" / ".." / "base" / "x", force=force)
    (tmp_path / "link").unlink()
    assert read_bytes(tmp_path) == before


def test_target_over_an_input(tmp_path: Path) -> None:
    """``--force`` on a folder that holds the base would remove the base."""
    base = plain_base(tmp_path / "all" / "base")
    adapter = plain_adapter(tmp_path / "adapter", base)
    with pytest.raises(UsageError, match="in or over"):
        adapterkit.merge(base, [adapter], tmp_path / "all", force=True)


@pytest.mark.parametrize("out", [".", "..", "/", "a/.."])
def test_target_without_a_name(
    out: str, inputs: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UsageError, OutputError)):
        adapterkit.merge(*inputs, out, force=True)
    assert list(tmp_path.iterdir()) == []


def test_parent_is_a_file(inputs: tuple[Path, list[Path]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be written to"):
        adapterkit.merge(*inputs, tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


def test_file_system_that_takes_no_folders(inputs: tuple[Path, list[Path]]) -> None:
    with pytest.raises(OutputError, match="cannot be written to"):
        adapterkit.merge(*inputs, "/proc/self/out")


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_read_only_target(inputs: tuple[Path, list[Path]], public: Path) -> None:
    """As a user whom permissions bind: root is let through everywhere."""
    for source in (inputs[0], *inputs[1]):
        shutil.copytree(source, public / source.name)
        for path in (public / source.name).iterdir():
            path.chmod(0o644)
    base, adapter = public / "base", public / "adapter"
    closed = public / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    messages = public / "message"
    messages.mkdir()
    messages.chmod(0o777)

    def work() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            adapterkit.merge(base, [adapter], closed / "out")
        except OutputError as error:
            (messages / "text").write_text(str(error))
            raise

    assert run(work) == OutputError.exit_code
    assert "cannot be written to" in (messages / "text").read_text()
    assert list(closed.iterdir()) == []


def test_too_little_room_is_said_before_the_first_byte(
    inputs: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "free", lambda path: 50)
    with pytest.raises(OutputError, match=r"needs [0-9.]+ kB and .* has 50 B free"):
        adapterkit.merge(*inputs, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_room_that_an_interrupted_run_holds_counts_as_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "free", lambda path: 1000)
    (tmp_path / "held").write_bytes(b"x" * 100_000)
    check_target(tmp_path / "out", [], 90_000, force=False, held=[tmp_path / "held"])
    with pytest.raises(OutputError, match=r"has 1\.00 kB free"):
        check_target(tmp_path / "out", [], 90_000, force=False)


def test_unsloth_534_disk_that_fills_up(inputs: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """A limit of the kernel's, in a process of its own, met in the middle of the run."""

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        adapterkit.merge(*inputs, tmp_path / "deep" / "out")

    assert run(work) == OutputError.exit_code
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ replaced


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_force_replaces(kind: str, inputs: tuple[Path, list[Path]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    if kind == "folder":
        (out / "deep").mkdir(parents=True)
        (out / "old.txt").write_text("old")
    elif kind == "file":
        out.write_text("old")
    else:
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "mine").write_text("mine")
        out.symlink_to("kept")
    adapterkit.merge(*inputs, out, force=True)
    adapterkit.merge(*inputs, tmp_path / "plain")
    assert read_bytes(out) == read_bytes(tmp_path / "plain")
    assert not out.is_symlink()
    assert {"kept"} >= {path.name for path in tmp_path.iterdir()} - {"out", "plain"}
    if kind == "link":
        assert (tmp_path / "kept" / "mine").read_text() == "mine"


def test_force_is_never_seen_half_done(inputs: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """A reader that looks all the time finds a whole folder every time: the old one, then the new one."""
    out = tmp_path / "out"
    adapterkit.merge(*inputs, out)
    names = set(os.listdir(out))
    (out / "old.txt").write_text("old")
    looks, stop = [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            fd = os.open(out, os.O_RDONLY)
            looks.append(frozenset(os.listdir(fd)))
            os.close(fd)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for _ in range(5):
            adapterkit.merge(*inputs, out, force=True)
    finally:
        stop.set()
        reader.join()
    # An old folder that is being emptied may be met by a reader who opened it before the exchange.
    assert all(names <= set(seen) or seen < names | {"old.txt"} for seen in looks)
    assert set(os.listdir(out)) == names
    assert len(looks) > 20


def test_force_where_names_cannot_be_exchanged(
    inputs: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import types

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: types.SimpleNamespace())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    adapterkit.merge(*inputs, tmp_path / "out", force=True)
    assert os.listdir(tmp_path) == ["out"]
    assert "old" not in os.listdir(tmp_path / "out")


def test_target_that_appears_during_the_run(inputs: tuple[Path, list[Path]], tmp_path: Path, slow: None) -> None:
    def appear(done: int, total: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)

    with pytest.raises(OutputError, match="appeared"):
        adapterkit.merge(*inputs, tmp_path / "out", progress=appear)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == []


# ------------------------------------------------------------------ interrupted


@pytest.mark.parametrize("resume", [False, True])
def test_interrupt_in_the_middle(resume: bool, inputs: tuple[Path, list[Path]], tmp_path: Path, slow: None) -> None:
    out = tmp_path / "deep" / "out"
    pid = fork(lambda: adapterkit.merge(*inputs, out, resume=resume, jobs=2))
    journal = partial_folder(out) / ".journal.jsonl"
    until(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 3)
    os.kill(pid, signal.SIGINT)
    assert wait(pid) == 130
    if not resume:
        assert list(tmp_path.iterdir()) == []
        return
    assert not out.exists()
    assert partial_folder(out).is_dir()
    report = adapterkit.merge(*inputs, out, resume=True)
    assert report.reused >= 2
    adapterkit.merge(*inputs, tmp_path / "whole")
    assert read_bytes(out) == read_bytes(tmp_path / "whole")
    assert os.listdir(tmp_path / "deep") == ["out"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_command_line_that_is_told_to_stop(
    how: signal.Signals, inputs: tuple[Path, list[Path]], tmp_path: Path, slow: None
) -> None:
    from adapterkit.cli import main

    out = tmp_path / "out"
    pid = fork(lambda: main(["merge", str(inputs[0]), str(inputs[1][0]), "-o", str(out), "--json", "--jobs", "1"]))
    until(lambda: (partial_folder(out) / ".journal.jsonl").exists())
    os.kill(pid, how)
    assert wait(pid) == 130
    assert list(tmp_path.iterdir()) == []


def test_two_runs_on_one_target(inputs: tuple[Path, list[Path]], tmp_path: Path, slow: None) -> None:
    out = tmp_path / "out"
    first = fork(lambda: adapterkit.merge(*inputs, out, jobs=1))
    until(lambda: (partial_folder(out) / ".journal.jsonl").exists())
    for resume in (False, True):
        with pytest.raises(OutputError, match="another run is writing"):
            adapterkit.merge(*inputs, out, resume=resume)
    assert wait(first) == 0
    adapterkit.merge(*inputs, tmp_path / "whole")
    assert read_bytes(out) == read_bytes(tmp_path / "whole")


def test_many_runs_at_once_leave_one_whole_result(inputs: tuple[Path, list[Path]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    codes = [wait(pid) for pid in [fork(lambda: adapterkit.merge(*inputs, out, jobs=1)) for _ in range(6)]]
    assert 0 in codes
    assert set(codes) <= {0, 1}
    adapterkit.merge(*inputs, tmp_path / "whole")
    assert read_bytes(out) == read_bytes(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


def test_lock_of_a_run_that_is_just_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder goes between opening its lock and getting it; the lock then guards nothing."""
    out = tmp_path / "out"
    flock = calls.fcntl.flock

    def late(lock: int, how: int) -> None:
        shutil.rmtree(partial_folder(out))
        flock(lock, how)

    monkeypatch.setattr(calls.fcntl, "flock", late)
    with pytest.raises(OutputError, match="another run"), staging(out, resume=False):
        pass


def test_leftovers_of_a_killed_run_go_with_the_next(inputs: tuple[Path, list[Path]], tmp_path: Path) -> None:
    partial = partial_folder(tmp_path / "out")
    disk.own_folder(partial)
    (partial / "sub").mkdir()
    (partial / "model-00001-of-00002.safetensors").write_bytes(b"half")
    (partial / "stray").write_bytes(b"x" * 10_000)
    (partial / ".journal.jsonl").write_bytes(b"torn")
    adapterkit.merge(*inputs, tmp_path / "out")
    adapterkit.merge(*inputs, tmp_path / "whole")
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
