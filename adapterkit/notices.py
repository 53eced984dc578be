"""What has to be said while something runs: each door decides who hears it, and by Python alone nobody does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Of the process and not of a context: worker threads are heard by the door that started them.
_HEARING: list[Callable[[str], None]] = []


def tell(text: str) -> None:
    """A line about what goes on now, such as why nothing seems to."""
    if _HEARING:
        _HEARING[-1](text)


@contextmanager
def heard(by: Callable[[str], None]) -> Iterator[None]:
    """Within the block, ``by`` gets each line; from whichever thread it is told."""
    _HEARING.append(by)
    try:
        yield
    finally:
        _HEARING.pop()
