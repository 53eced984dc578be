"""The vocabulary of the encoders: a value holds one number per block, and every function works on all blocks at once.

Written in torch here. :mod:`adapterkit.gguf.kernels.simd` teaches numba the same words over sixteen-lane registers, so
one source gives both backends, and the same bytes, because each word is one IEEE operation in both. That rules out
fused multiply-add, reciprocals in place of a division, reordered sums, and roots that are not correctly rounded.

Arrays are rows of lanes, shaped ``[sub-blocks, elements, lanes]``. A sub-block index may be an int or, in torch, a
slice that takes all sub-blocks in one call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    Function = TypeVar("Function", bound=Callable[..., Any])

try:
    from numba.extending import register_jitable as _register
except ImportError:

    def _register(function: Any) -> Any:
        return function


def shared(function: Function) -> Function:
    """Mark a function that both backends run: plain Python over torch, and compilable when numba is installed."""
    return _register(function)  # type: ignore[no-any-return]


def at(rows: Any, sub: Any, n: int, i: int) -> Any:
    """Element ``i`` of sub-block ``sub``, where a sub-block has ``n`` elements."""
    return rows[sub, i]


def put(rows: Any, sub: Any, n: int, i: int, value: Any) -> None:
    """Store element ``i`` of sub-block ``sub``."""
    rows[sub, i] = value


def put_byte(rows: Any, i: int, value: Any) -> None:
    """Store the low eight bits of an integer value as byte ``i`` of every block."""
    rows[i] = value & 255


def as_block(rows: Any) -> Any:
    """One value per sub-block, seen as the elements of a single sub-block."""
    return rows.view(1, -1, rows.shape[-1])


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
