"""Torch in threads of our own, and linear algebra whose bits do not depend on the number of threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from adapterkit.errors import out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future
    from contextlib import AbstractContextManager

    import torch
else:
    from adapterkit.ops._torch import torch

T = TypeVar("T")
KEPT = 16 << 20
"""Bytes that one step of a block holds for a moment, at most."""


SMALL = 1 << 18
"""Bytes read for a tensor below which its computation is mostly Python: calls of microseconds, each of which lets go of the
interpreter and has to get it back. Two threads in such calls wake each other all the time and take twice as long as one."""

FEW = 1 << 17
"""As `SMALL`, for what decomposes the factors of a module."""


class OneAtATime:
    """Who computes small tensors does so alone; large ones are computed side by side.

    A model of 18,771 small tensors takes 13.6 s with two threads that do not take turns, and 7.1 s with one.

    Args:
        small: bytes read below which a tensor is small.
    """

    def __init__(self, small: int = SMALL) -> None:
        self._small, self._lock = small, threading.Lock()

    def of(self, reads: int) -> AbstractContextManager[Any]:
        """To be held while a tensor is computed for which so many bytes are read; none for what comes with another one."""
        return self._lock if 0 < reads < self._small else nullcontext()


def settle() -> None:
    """What a worker thread does first: from now on torch uses no other threads, and memory that is freed is kept.

    glibc hands freed memory back to the kernel and asks for it again with the next block, page by page, up to half of the
    time of a merge. How much it keeps follows the largest piece that was ever freed (mallopt(3), M_MMAP_THRESHOLD): one
    untouched piece, which costs nothing, is enough. Elsewhere this does no harm.
    """
    torch.set_num_threads(1)
    torch.empty(KEPT, dtype=torch.uint8)


def start_all(threads: Sequence[threading.Thread], *, needed: bool = True) -> list[threading.Thread]:
    """Start as many threads as the system gives; those that run.

    Raises:
        OutOfMemory: not one started, and one is ``needed``.
    """
    started: list[threading.Thread] = []
    for thread in threads:
        try:
            thread.start()
        except RuntimeError as error:  # no more threads, or no room for a stack
            if needed and not started:
                raise out_of_memory(error) from error
            break
        started.append(thread)
    return started


_threads = threading.local()


class Workers(ThreadPoolExecutor):
    """A pool whose threads settle with their first task, so that a failure to do so is that task's."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return super().submit(_settled, fn, *args, **kwargs)


def _settled(work: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    if not getattr(_threads, "settled", False):
        settle()
        _threads.settled = True
    return work(*args, **kwargs)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, as a context or a decorator; other Python threads keep their number.

    LAPACK and matrix products add in another order on more threads. The last bit of a float64 is nothing, but once in a
    million entries it moves a rounding to float32, and then two machines write two files. The matrices here
    are thin, so one thread costs little; many weights at once are the place for more.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
