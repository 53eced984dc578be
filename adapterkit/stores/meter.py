"""What was moved from, to and inside object stores, counted where it happens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
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


class Meter:
    """A count that goes on while a run does; safe to use from several threads."""

    def __init__(self) -> None:
        self.moved = Moved()


_lock = threading.Lock()
_running: list[Meter] = []


@contextmanager
def moving() -> Iterator[Meter]:
    """Count what is moved within the block, in every thread."""
    meter = Meter()
    with _lock:
        _running.append(meter)
    try:
        yield meter
    finally:
        with _lock:
            _running.remove(meter)


def count(requests: int = 0, *, down: int = 0, up: int = 0, inside: int = 0) -> None:
    """Add to every count that is running."""
    more = Moved(requests, down, up, inside)
    with _lock:
        for meter in _running:
            meter.moved += more
