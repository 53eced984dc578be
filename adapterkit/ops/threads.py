"""Linear algebra whose bits do not depend on the number of threads."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
else:
    from adapterkit.ops._torch import torch


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
