"""Locks go from one process to the next: nobody is overtaken, and nobody gives up while others get their turn."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from adapterkit import disk
from adapterkit.disk import locks
from adapterkit.errors import OutputError

LONG = 60.0


class Holder(threading.Thread):
    """Waits for a lock, says so, and keeps it until it is told to let go."""

    def __init__(self, path: Path, shared: bool = False) -> None:
        super().__init__(daemon=True)
        self.waits, self.holds, self._end = threading.Event(), threading.Event(), threading.Event()
        self._path, self._shared = path, shared
        self.start()

    def run(self) -> None:
        with disk.locked(self._path, shared=self._shared):
            self.holds.set()
            assert self._end.wait(LONG)

    def end(self) -> None:
        self._end.set()
        self.join(LONG)
        assert not self.is_alive()


def test_who_waits_behind_others_waits_as_long_as_they_get_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forty times the lock is passed on while a waiter with a hundredth of a second of patience waits behind."""
    path, rounds, waited = tmp_path / "lock", 40, [0.0]
    holders = [Holder(path)]
    assert holders[0].holds.wait(LONG)

    def sleep(seconds: float) -> None:
        if isinstance(one := threading.current_thread(), Holder):
            one.waits.set()
            time.sleep(0.0005)
            return
        waited[0] += seconds  # the waiter: meanwhile the lock goes on to the next, and one more stands before it
        if len(holders) > 1:
            holders[-2].end()
            assert holders[-1].holds.wait(LONG)
        if len(holders) <= rounds:
            holders.append(Holder(path))
            assert holders[-1].waits.wait(LONG)
        else:
            holders[-1].end()

    monkeypatch.setattr(locks, "time", SimpleNamespace(sleep=sleep))
    first = Holder(path)
    holders.append(first)
    assert first.waits.wait(LONG)  # it is next
    with disk.locked(path, timeout=0.01):
        pass
    assert len(holders) > rounds
    assert waited[0] > 0.05


@pytest.mark.parametrize("shared", [False, True])
def test_who_waits_is_not_overtaken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """Whoever lets go and takes again at once stands behind; so does one who would share the lock with its holder."""
    path, go = tmp_path / "lock", threading.Event()

    def sleep(_: float) -> None:
        if isinstance(one := threading.current_thread(), Holder):
            one.waits.set()
            assert go.wait(LONG)

    with ExitStack() as stack:
        stack.enter_context(disk.locked(path, shared=shared))
        monkeypatch.setattr(locks, "time", SimpleNamespace(sleep=sleep))
        waiter = Holder(path)
        assert waiter.waits.wait(LONG)
        if not shared:
            stack.close()
        with pytest.raises(OutputError, match="held"), disk.locked(path, shared=shared, timeout=0.01):
            pass
    go.set()
    assert waiter.holds.wait(LONG)
    waiter.end()
    with disk.locked(path, timeout=0.01):
        pass
