"""Real processes, killed for real. The full-size run is ``bench/speed/registry.py kill``."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from adapterkit.errors import CheckFailed
from adapterkit.registry import fsck, gc, index, listing, register
from adapterkit.registry.home import Home


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    from bench.speed import registry

    return registry


def test_eight_processes_killed_at_random_lose_nothing(bench: ModuleType, tmp_path: Path) -> None:
    figures = bench.killed_run(tmp_path / "home", processes=8, count=40, seed=1, pause=0.1)
    assert figures["failed"] == 0
    assert figures["kills"] >= 3
    assert figures["records"] == figures["acknowledged"] == 320


def test_the_kill_run_would_notice_a_lost_record(bench: ModuleType, tmp_path: Path) -> None:
    bench.killed_run(tmp_path / "home", processes=2, count=3, seed=1)
    lines = [["record", "1", "0" * 64]]
    with pytest.raises(AssertionError, match="lost"):
        bench.checked(Home(tmp_path / "home"), lines, 6)
    (tmp_path / "home/records/model/3.json").unlink()
    with pytest.raises(AssertionError, match="contiguous"):
        bench.checked(Home(tmp_path / "home"), [], 6)


@pytest.mark.parametrize("step", range(12))
def test_a_registration_killed_at_any_step_leaves_a_clean_registry(home: Path, make: Any, step: int) -> None:
    """The child dies at its n-th rename, link, fsync or unlink; afterwards the same registration succeeds."""
    register.register(make("first", b"first"), "a")
    folder = make("second", b"second" * 1000)
    child = os.fork()
    if child == 0:
        left = step

        def dying(real: Any) -> Any:
            def call(*args: Any, **more: Any) -> Any:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return real(*args, **more)

            return call

        for name in ("replace", "link", "fsync", "unlink", "fchmod", "mkdir"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            register.register(folder, "a")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert fsck.fsck().clean
    assert len(listing.listing().rows) in (1, 2)
    found = register.register(folder, "a")
    assert found.record.version == 2
    assert fsck.fsck().clean
    assert [row.version for row in listing.listing().rows] == [1, 2]


@pytest.mark.parametrize("there", [0, 1])
def test_gc_tells_a_killed_registration_from_a_lost_record(
    home: Path, make: Any, there: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both leave a journal with one line more than records; only the killed one left its record in staging."""
    for number in range(there):
        register.register(make(content=b"%d" % number), "a")
    register.register(make(content=b"else"), "else")
    folder = make("second", b"second" * 1000)
    child = os.fork()
    if child == 0:
        real = os.link

        def dying(source: Any, target: Any, **more: Any) -> None:
            if str(target).endswith(f"records/a/{there + 1}.json"):
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target, **more)

        os.link = dying  # type: ignore[assignment]
        try:
            register.register(folder, "a")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (home / "journal/a").read_bytes().count(b"\n") == there + 1
    assert fsck.fsck().clean
    later = time.time() + 20 * 86400
    with monkeypatch.context() as patched:
        patched.setattr(gc.time, "time", lambda: later)
        gc.gc(apply=True)
        gc.gc(apply=True)  # what tells it is not swept
    assert fsck.fsck().clean
    assert register.register(folder, "a").record.version == there + 1
    with monkeypatch.context() as patched:
        patched.setattr(gc.time, "time", lambda: later)
        gc.gc(apply=True)
    (home / f"records/a/{there + 1}.json").unlink()
    assert [problem.kind for problem in fsck.fsck().problems if not problem.repaired] == ["record"]
    with pytest.raises(CheckFailed, match="a record of a is missing"):
        gc.gc(apply=True, keep_days=-1)


def test_an_index_whose_writer_is_killed_is_right_again(home: Path, make: Any) -> None:
    for number in range(30):
        register.register(make(content=b"%d" % number), "a")
    for delay in (0.0, 0.002, 0.005, 0.01, 0.02, 0.03):
        (home / "index.db").unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            try:
                index.reindex(Home(home))
            finally:
                os._exit(0)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert len(listing.listing().rows) == 30
        assert fsck.fsck().clean
