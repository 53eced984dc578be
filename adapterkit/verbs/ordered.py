"""Work on worker threads whose results come back in order, a few at a time."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from adapterkit.ops.threads import OneAtATime, Workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")
R = TypeVar("R")


def in_order(
    work: Callable[[T], R],
    items: Sequence[T],
    jobs: int,
    sizes: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
    small: int = 0,
) -> Iterator[R]:
    """``work`` of each item, in the order of the items. Those whose size is below ``small`` are worked on one at a time.

    At most two results per worker wait at a time, so memory does not grow with the number of items. When one fails or
    the caller stops, what has not begun is dropped.
    """
    sizes = [1] * len(items) if sizes is None else sizes
    total, done = sum(sizes), 0
    turns = OneAtATime(small)

    def one(item: T, size: int) -> R:
        with turns.of(size):
            return work(item)

    with Workers(jobs) as pool:
        waiting: deque[tuple[Future[R], int]] = deque()
        rest = iter(zip(items, sizes, strict=True))
        try:
            while True:
                while len(waiting) < 2 * jobs and (item := next(rest, None)) is not None:
                    waiting.append((pool.submit(one, *item), item[1]))
                if not waiting:
                    return
                future, size = waiting.popleft()
                yield future.result()
                done += size
                if progress is not None:
                    progress(done, total)
        finally:
            for future, _ in waiting:
                future.cancel()
