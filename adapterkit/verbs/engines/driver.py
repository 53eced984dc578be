"""The driver: deals the parts of a plan out to workers, runs those of a lost worker again, and adds up."""

from __future__ import annotations

import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.errors import OutputError, counted
from adapterkit.verbs.engines.pool import ENDED, FAILED, LOST, MOVED, READY, Message, Pool, raised

if TYPE_CHECKING:
    from collections.abc import Iterator

    from adapterkit.checkpoint.cut import PlanPart

LOSSES = 10  # workers that may be lost over one part, or one after the other, before the part is given up
PAUSE = 0.25  # seconds between two looks at the workers

MOVED_IN_STORES = ("requests", "bytes_down", "bytes_up", "bytes_inside")

Log = Callable[..., None]


@dataclass
class RunTally:
    """What workers did.

    Attributes:
        engine: what ran them.
        workers: how many were started to work at the same time.
        parts: of the plan; ``found`` of them were done by an earlier run.
        lost: workers that were gone before they had ended their part.
        bytes_read, bytes_written: from inputs (an estimate of the plan) and into the output.
        cpu_seconds: of all workers, over their parts.
        worker_seconds: of all workers, from the beginning of a part to its end.
        peak_memory: the largest of a worker, in bytes.
        reused: computed tensors that an interrupted run had finished.
        seconds: of the run.
        requests, bytes_down, bytes_up, bytes_inside: of object stores.
    """

    engine: str
    workers: int
    parts: int
    found: int = 0
    lost: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    cpu_seconds: float = 0.0
    worker_seconds: float = 0.0
    peak_memory: int = 0
    reused: int = 0
    seconds: float = 0.0
    requests: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_inside: int = 0

    @property
    def summary(self) -> str:
        """In a sentence."""
        found = f", {self.found} of them done before" if self.found else ""
        lost = f", {counted(self.lost, 'worker')} lost and replaced" if self.lost else ""
        return f"{counted(self.parts, 'part')}{found} by {counted(self.workers, 'worker')} ({self.engine}){lost}"

    def add(self, said: Any) -> None:
        """Count a part."""
        self.bytes_read += int(said["reads"])
        self.bytes_written += int(said["nbytes"])
        self.cpu_seconds += float(said["cpu_seconds"])
        self.worker_seconds += float(said["seconds"])
        self.peak_memory = max(self.peak_memory, int(said["peak_memory"]))
        self.reused += int(said["reused"])
        for name in MOVED_IN_STORES:
            setattr(self, name, getattr(self, name) + int(said.get(name, 0)))

    @property
    def moved(self) -> dict[str, int]:
        """What was asked of object stores."""
        return {name: getattr(self, name) for name in MOVED_IN_STORES}


@contextmanager
def log_to(path: Path | None) -> Iterator[Log]:
    """What appends events to a file, a line of JSON each; without a file it does nothing."""
    if path is None:
        yield lambda event, **fields: None
        return
    fd = disk.open_appended(path)

    def log(event: str, **fields: Any) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        os.write(fd, (json.dumps({"time": now, "event": event, **fields}) + "\n").encode())

    try:
        yield log
    finally:
        os.close(fd)


@dataclass
class _State:
    """What the driver knows at a moment."""

    queue: deque[PlanPart]
    parts: dict[int, PlanPart]
    running: dict[int, int] = field(default_factory=dict)  # worker: part
    idle: set[int] = field(default_factory=set)
    alive: set[int] = field(default_factory=set)
    moved: dict[int, int] = field(default_factory=dict)  # part: bytes
    losses: Counter[int] = field(default_factory=Counter)
    in_a_row: int = 0
    done: int = 0


def drive(
    make: Callable[[], Pool],
    parts: Sequence[PlanPart],
    left: Sequence[PlanPart],
    count: int,
    *,
    engine: str,
    log: Log,
    progress: Callable[[int, int], None] | None = None,
) -> RunTally:
    """Have workers execute the parts that are left.

    Args:
        make: gives the workers, if there is something to do for them.
        parts: all of the plan.
        left: those that are not done, of which the largest are dealt out first.
        count: how many workers work at the same time.
        engine: what runs them.
        log: gets what happens.
        progress: called with bytes done and bytes in all, of all workers together.

    Raises:
        OutputError: a part, or the workers themselves, were lost again and again.
        AdapterkitError: a worker said why a part cannot be executed.
    """
    started = time.monotonic()
    order = sorted(left, key=lambda part: (-part.cost, part.index))
    state = _State(deque(order), {part.index: part for part in parts})
    total = sum(part.nbytes for part in parts)
    state.done = total - sum(part.nbytes for part in left)
    count = min(count, max(1, len(left)))
    tally = RunTally(engine, count, len(parts), len(parts) - len(left))
    log("started", engine=engine, workers=count, parts=len(parts), left=len(left), bytes=total)
    if not left:
        return tally
    pool = make()
    try:
        while state.queue or state.running:
            while len(state.alive) < min(count, len(state.queue) + len(state.running)):
                worker = pool.start()
                state.alive.add(worker)
                log("worker-started", worker=worker)
            while state.idle and state.queue:
                worker, part = state.idle.pop(), state.queue.popleft()
                state.running[worker] = part.index
                log("part-started", part=part.index, worker=worker, bytes=part.nbytes, file=part.file.name)
                pool.give(worker, part.index)
            for message in pool.wait(PAUSE):
                _heard(message, state, tally, log)
            if progress is not None:
                progress(min(total, state.done + sum(state.moved.values())), total)
    except BaseException as error:
        log("stopped", why=str(error) or type(error).__name__)
        raise
    finally:
        pool.close()
    tally.seconds = time.monotonic() - started
    log("executed", **{name: value for name, value in asdict(tally).items() if name not in ("engine", "workers")})
    return tally


def _heard(message: Message, state: _State, tally: RunTally, log: Log) -> None:
    """Act on what a worker said."""
    worker = message.worker
    if message.kind == READY:
        state.idle.add(worker)
        log("worker-ready", worker=worker, **message.said)
    elif message.kind == MOVED and state.running.get(worker) == message.part:
        state.moved[message.part] = int(message.said["done"])
    elif message.kind == ENDED:
        state.in_a_row = 0
        _no_longer(worker, state)
        state.idle.add(worker)
        state.done += state.parts[message.part].nbytes
        tally.add(message.said)
        numbers = {name: message.said[name] for name in ("nbytes", "reads", "seconds", "cpu_seconds", "peak_memory")}
        log("part-ended", part=message.part, worker=worker, **numbers)
    elif message.kind == FAILED:
        log("part-failed", part=message.part, worker=worker, **message.said)
        raise raised(message.said)
    elif message.kind == LOST and worker in state.alive:
        state.alive.discard(worker)
        state.idle.discard(worker)
        part = _no_longer(worker, state)
        tally.lost += 1
        state.in_a_row += 1
        why = str(message.said.get("why", ""))
        log("worker-lost", worker=worker, part=part, why=why)
        if part is not None:
            state.losses[part] += 1
            state.queue.appendleft(state.parts[part])
        often = state.losses[part] if part is not None else 0
        if often >= LOSSES or state.in_a_row >= LOSSES + 3 * tally.workers:
            what = (
                f"part {part} lost {often} workers"
                if often >= LOSSES
                else f"{state.in_a_row} workers were lost in a row"
            )
            raise OutputError(f"{what} ({why})", "see what ends them (memory, perhaps), then run it again: it goes on")


def _no_longer(worker: int, state: _State) -> int | None:
    part = state.running.pop(worker, None)
    if part is not None:
        state.moved.pop(part, None)
    return part
