"""Linear algebra whose bits do not depend on the number of threads."""

from __future__ import annotations

from contextlib import contextmanager
from threading import Lock, local
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
else:
    from adapterkit.ops._torch import torch

_lock = Lock()
_inside = 0


class _Mine(local):
    depth = 0
    wanted = 0


_mine = _Mine()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, as a context or a decorator; may be nested, and entered by several threads at once.

    LAPACK and matrix products add in another order on more threads. The last bit of a float64 is nothing, but once in a
    million entries it moves a rounding to float32, and then two machines write two files. The matrices here
    are thin, so one thread costs little; many weights at once are the place for more.
    """
    # OpenMP's number belongs to the calling thread and MKL's to the process, and torch sets both: so every thread
    # sets 1, and only the last one out sets more again. A thread that left earlier stays at 1 until its next turn.
    global _inside
    if _mine.depth == 0:
        with _lock:
            _inside += 1
            now = torch.get_num_threads()
            _mine.wanted = now if now > 1 else max(now, _mine.wanted)
            torch.set_num_threads(1)
    _mine.depth += 1
    try:
        yield
    finally:
        _mine.depth -= 1
        if _mine.depth == 0:
            with _lock:
                _inside -= 1
                if _inside == 0:
                    torch.set_num_threads(_mine.wanted)
                    _mine.wanted = 0
