"""The vocabulary of the encoders: a value holds one number per block, and every function works on all blocks at once.

Written in torch here. :mod:`adapterkit.gguf.kernels.simd` teaches numba the same words over sixteen-lane registers, so
one source gives both backends, and the same bytes, because each word is one IEEE operation in both. That rules out
fused multiply-add, reciprocals in place of a division, reordered sums, and roots that are not correctly rounded.

Arrays are rows of lanes, in torch shaped ``[elements, sub-blocks, lanes]``. There a sub-block index may be a slice that
takes all sub-blocks in one call, and an element a `Span` that takes many: loops over :func:`every` run once. What is
summed keeps the order of the elements, so such loops are written over ``range``, or for torch by hand (`by_torch`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    Function = TypeVar("Function", bound=Callable[..., Any])

try:
    from numba.extending import overload as _overload
    from numba.extending import register_jitable as _register
except ImportError:

    def _register(function: Any) -> Any:
        return function

    def _overload(*_: Any, **__: Any) -> Any:
        return _register


def shared(function: Function) -> Function:
    """Mark a function that both backends run: plain Python over torch, and compilable when numba is installed."""
    return _register(function)  # type: ignore[no-any-return]


def by_torch(function: Function) -> Callable[[Function], Function]:
    """Let torch run ``function`` in the place of the decorated loop, which numba compiles."""

    def decorate(loop: Function) -> Function:
        @wraps(loop)
        def entry(*arguments: Any) -> Any:
            return function(*arguments)

        _overload(entry, strict=False)(lambda *_: loop)
        return entry  # type: ignore[return-value]

    return decorate


@dataclass(frozen=True)
class Span:
    """``count`` elements from ``start`` on, taken in one call."""

    start: int
    count: int

    def __add__(self, offset: int) -> Span:
        return Span(self.start + offset, self.count)

    __radd__ = __add__


def every(n: int) -> Any:
    """The elements 0..n-1, for loops whose rounds do not depend on each other."""
    return (Span(0, n),)


_overload(every, strict=False)(lambda _: lambda n: range(n))


def _place(i: Any) -> Any:
    return slice(i.start, i.start + i.count) if isinstance(i, Span) else i


def at(rows: Any, sub: Any, n: int, i: Any) -> Any:
    """Element ``i`` of sub-block ``sub``, where a sub-block has ``n`` elements."""
    return rows[_place(i), sub]


def put(rows: Any, sub: Any, n: int, i: Any, value: Any) -> None:
    """Store element ``i`` of sub-block ``sub``."""
    rows[_place(i), sub] = value


def put_byte(rows: Any, i: Any, value: Any) -> None:
    """Store the low eight bits of an integer value as byte ``i`` of every block."""
    rows[_place(i)] = value & 255


def as_block(rows: Any) -> Any:
    """All elements of all sub-blocks as those of a single one; where that takes a copy, only for reading."""
    return rows.transpose(0, 1).reshape(-1, 1, rows.shape[-1])


def splat(like: Any, value: float) -> Any:
    """``value`` in every lane of a float32 value shaped like ``like``."""
    import torch

    return torch.full_like(like, value, dtype=torch.float32)


def select(mask: Any, yes: Any, no: Any) -> Any:
    """``yes`` where the mask holds, else ``no``."""
    import torch

    return torch.where(mask, yes, no)


def div(a: Any, b: Any) -> Any:
    """``a / b``, rounded once: torch turns ``number / tensor`` into a reciprocal and a product, which rounds twice."""
    import torch

    if not isinstance(a, torch.Tensor):
        a = torch.full_like(b, float(a))
    if not isinstance(b, torch.Tensor):
        b = torch.full_like(a, float(b))
    return torch.div(a, b)


def sqrt(value: Any) -> Any:
    """Correctly rounded root: the float64 root rounds to it, while torch's float32 root on CPUs can be one unit off."""
    return value.double().sqrt().float()


def fabs(value: Any) -> Any:
    """Magnitude."""
    return value.abs()


def bits(value: Any) -> Any:
    """The int32 with the float's bits."""
    import torch

    return value.view(torch.int32)


def from_bits(value: Any) -> Any:
    """The float with the int32's bits."""
    import torch

    return value.view(torch.float32)


def to_int(value: Any) -> Any:
    """Truncate towards zero; the value must fit."""
    import torch

    return value.to(torch.int32)


def to_float(value: Any) -> Any:
    """Integer to float32."""
    import torch

    return value.to(torch.float32)


def largest_lane(value: Any) -> int:
    """The largest of an integer value's lanes."""
    return int(value.max())


def all_lanes(mask: Any) -> bool:
    """Whether the mask holds in every lane."""
    return bool(mask.all())
