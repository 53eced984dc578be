"""What was moved from, to and inside object stores, counted where it happens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Moved:
    """What a run asked of object stores, or will.

    Attributes:
        requests: of every kind, also those that were tried again.
        bytes_down, bytes_up: that came here and that left here.
        bytes_inside: that a store copied by itself.
    """

    requests: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    bytes_inside: int = 0

    def __add__(self, other: Moved) -> Moved:
        return Moved(
            self.requests + other.requests,
            self.bytes_down + other.bytes_down,
            self.bytes_up + other.bytes_up,
            self.bytes_inside + other.bytes_inside,
        )

    def __sub__(self, other: Moved) -> Moved:
        return self + Moved(-other.requests, -other.bytes_down, -other.bytes_up, -other.bytes_inside)


class Meter:
    """A count that began at some moment and goes on, in every thread of the process."""

    def __init__(self, begun: Moved) -> None:
        self._begun = begun

    @property
    def moved(self) -> Moved:
        """What was moved since then."""
        return _total - self._begun


_lock = threading.Lock()
_total = Moved()
_meter: ContextVar[Meter | None] = ContextVar("meter", default=None)


@contextmanager
def moving() -> Iterator[Meter]:
    """Count what is moved within the block; `moved` then says it."""
    meter = Meter(_total)
    token = _meter.set(meter)
    try:
        yield meter
    finally:
        _meter.reset(token)


def moved() -> Moved:
    """What was moved since the innermost `moving` began, else since the process did."""
    meter = _meter.get()
    return _total if meter is None else meter.moved


def count(requests: int = 0, *, down: int = 0, up: int = 0, inside: int = 0) -> None:
    """Add to what was moved."""
    global _total
    with _lock:
        _total += Moved(requests, down, up, inside)
