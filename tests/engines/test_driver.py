"""The driver beside workers that do as a test tells them: what is lost is run again, what fails is said, figures add up."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from adapterkit.checkpoint.cut import PlanPart
from adapterkit.checkpoint.plan import PlannedFile
from adapterkit.errors import CheckpointError, OutputError
from adapterkit.verbs.engines.driver import LOSSES, drive, log_to
from adapterkit.verbs.engines.pool import ENDED, FAILED, LOST, MOVED, READY, Message, as_said

FILE = PlannedFile("model.safetensors", 1000, ())
PARTS = [PlanPart(i, FILE, 100 * i, 100 * (i + 1), cost=float(i % 3)) for i in range(10)]


class Told:
    """Workers that answer as ``act`` says; without it they end every part."""

    def __init__(self, act: Callable[[int, int], Message | None] = lambda worker, part: None) -> None:
        self._act = act
        self._said: list[Message] = []
        self.started = 0
        self.alive: set[int] = set()
        self.most = 0
        self.given: list[int] = []
        self.closed = False

    def start(self) -> int:
        self.alive.add(self.started)
        self.most = max(self.most, len(self.alive))
        self._said.append(Message(READY, self.started, said={"pid": 1}))
        self.started += 1
        return self.started - 1

    def give(self, worker: int, part: int) -> None:
        assert worker in self.alive
        self.given.append(part)
        answer = self._act(worker, part)
        if answer is not None and answer.kind == LOST:
            self.alive.discard(worker)
        self._said += [Message(MOVED, worker, part, {"done": 50}), answer or ended(worker, part)]

    def wait(self, seconds: float) -> Sequence[Message]:
        said, self._said = self._said, []
        return said

    def close(self) -> None:
        self.closed = True


def ended(worker: int, part: int) -> Message:
    numbers: dict[str, Any] = {"nbytes": 100, "reads": 120, "seconds": 2.0, "cpu_seconds": 1.0, "reused": 1}
    return Message(ENDED, worker, part, {**numbers, "peak_memory": 1000 + part})


def driven(pool: Told, left: Sequence[PlanPart] = PARTS, count: int = 3, **more: Any) -> Any:
    return drive(lambda: pool, PARTS, left, count, engine="told", log=more.pop("log", lambda event, **_: None), **more)


def test_the_figures_are_the_sums() -> None:
    pool, moves = Told(), list[tuple[int, int]]()
    tally = driven(pool, progress=lambda done, total: moves.append((done, total)))
    assert (tally.parts, tally.found, tally.lost, tally.workers) == (10, 0, 0, 3)
    assert (tally.bytes_read, tally.bytes_written, tally.reused) == (1200, 1000, 10)
    assert (tally.cpu_seconds, tally.worker_seconds, tally.peak_memory) == (10.0, 20.0, 1009)
    assert sorted(pool.given) == list(range(10))
    assert moves[-1] == (1000, 1000)
    assert all(0 <= done <= total == 1000 for done, total in moves)
    assert pool.closed
    assert pool.most == 3


def test_the_largest_parts_come_first() -> None:
    pool = Told()
    driven(pool, count=1)
    costs = [PARTS[index].cost for index in pool.given]
    assert costs == sorted(costs, reverse=True)


def test_what_an_earlier_run_did_is_not_done_again() -> None:
    pool = Told()
    tally = driven(pool, left=PARTS[7:], count=8)
    assert sorted(pool.given) == [7, 8, 9]
    assert (tally.found, tally.workers, pool.started) == (7, 3, 3)


def test_with_nothing_left_no_worker_is_started() -> None:
    pool = Told()
    assert driven(pool, left=[]).found == 10
    assert pool.started == 0


def test_the_part_of_a_lost_worker_is_run_again_by_another() -> None:
    dead: set[int] = set()

    def act(worker: int, part: int) -> Message | None:
        if len(dead) < 6 and worker % 2 == 0:
            dead.add(worker)
            return Message(LOST, worker, said={"why": "signal 9"})
        return None

    pool = Told(act)
    tally = driven(pool)
    assert tally.lost == len(dead) >= 3
    assert tally.bytes_written == 1000
    assert len(pool.given) == 10 + len(dead)
    assert set(pool.given) == set(range(10))


def test_a_part_that_ends_every_worker_is_given_up() -> None:
    pool = Told(lambda worker, part: Message(LOST, worker, said={"why": "signal 9"}) if part == 4 else None)
    with pytest.raises(OutputError, match=rf"part 4 lost {LOSSES} workers \(signal 9\)"):
        driven(pool)
    assert pool.closed


def test_workers_that_never_begin_are_given_up() -> None:
    class Stillborn(Told):
        def wait(self, seconds: float) -> Sequence[Message]:
            return [Message(LOST, worker, said={"why": "exit code 1: no module"}) for worker in sorted(self.alive)]

    with pytest.raises(OutputError, match=r"workers were lost in a row .*no module"):
        driven(Stillborn())


def test_an_error_of_a_part_ends_the_run_in_its_own_words() -> None:
    error = CheckpointError("the base changed", "make the plan again")
    pool = Told(lambda worker, part: Message(FAILED, worker, part, as_said(error)) if part == 3 else None)
    with pytest.raises(CheckpointError) as caught:
        driven(pool)
    assert (caught.value.message, caught.value.hint) == ("the base changed", "make the plan again")
    assert pool.closed


def test_every_event_is_a_line(tmp_path: Path) -> None:
    dead = []

    def act(worker: int, part: int) -> Message | None:
        if part == 5 and not dead:
            dead.append(worker)
            return Message(LOST, worker, said={"why": "signal 9"})
        return None

    with log_to(tmp_path / "events") as log:
        driven(Told(act), log=log)
    found = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    names = [one["event"] for one in found]
    assert names[0] == "started"
    assert names[-1] == "executed"
    assert names.count("part-ended") == 10
    assert names.count("part-started") == 11
    assert [one["part"] for one in found if one["event"] == "worker-lost"] == [5]
    assert all("time" in one for one in found)
    assert sum(one["nbytes"] for one in found if one["event"] == "part-ended") == found[-1]["bytes_written"]
