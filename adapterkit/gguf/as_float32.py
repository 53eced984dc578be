"""A model whose weights stay in 16 bits in memory, and which computes in float32.

Processors are slow in float16, and rounding every activation to 16 bits is not what an importance matrix is about:
llama-imatrix sums float32 activations too. A copy of all weights in float32 would take twice the memory. So a parameter is
turned into float32 when something is computed with it, and only for as long as that takes; of a stack of experts only the
expert that is used. Whatever asks a parameter for its dtype is told float32, so that masks, buffers and activations become
what they are in a model of float32 weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Iterable

NARROW = frozenset((torch.float16, torch.bfloat16))

_DTYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]


def _named(names: str) -> frozenset[Any]:
    """Functions of torch, of its tensors and of ``torch.nn.functional`` by these names, as a mode sees them."""
    owners = (torch, torch.Tensor, torch.nn.functional)
    return frozenset(getattr(owner, name) for owner in owners for name in names.split() if hasattr(owner, name))


_FACTS = _named(
    "__len__ data_ptr dim element_size get_device is_complex is_contiguous is_floating_point ndimension nelement numel "
    "size storage_offset stride untyped_storage"
)
"""What a tensor is asked: answered without looking at its values."""

_PICKS = _named(
    "__getitem__ __iter__ as_strided chunk contiguous detach diagonal embedding expand expand_as flatten gather index_select "
    "movedim moveaxis narrow permute ravel reshape select split split_with_sizes squeeze swapaxes swapdims t take "
    "tensor_split transpose unbind unflatten unfold unsqueeze view view_as"
)
"""What takes values as they are: the same values come out, turned into float32 before or after."""

_CASTS = _named("float to type type_as")


class AsFloat32(TorchFunctionMode):
    """While it is entered, parameters in 16 bits count as float32 ones of the same values.

    Args:
        parameters: of a model; they must stay where they are while this is entered.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._held = {one.untyped_storage().data_ptr() for one in parameters if one.dtype in NARROW}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS:
            return func(*args, **kwargs)
        if func == _DTYPE:
            return torch.float32 if self._is_held(args[0]) else func(*args)
        if func in _PICKS or getattr(func, "__name__", "") == "__get__":
            return self._picked(func(*args, **kwargs), any(map(self._is_held, args)))
        if func in _CASTS and self._is_held(args[0]):
            like = torch.empty(0)
            made = func(like, *args[1:], **kwargs)
            if isinstance(made, torch.Tensor) and (made.dtype, made.device) == (like.dtype, like.device):
                return args[0]  # it counts as float32 already
        return func(*self._wide(args), **{name: self._wide(value) for name, value in kwargs.items()})

    def _is_held(self, value: Any) -> bool:
        """Whether a value is a parameter in 16 bits, or a part of one."""
        return (
            isinstance(value, torch.Tensor)
            and value.dtype in NARROW
            and value.untyped_storage().data_ptr() in self._held
        )

    def _picked(self, found: Any, ours: bool) -> Any:
        """What was picked from a parameter: a part of it stays one, and copies of its values become float32."""
        if not ours or not isinstance(found, torch.Tensor) or found.dtype not in NARROW or self._is_held(found):
            return found
        return found.float()

    def _wide(self, value: Any) -> Any:
        """A value with every parameter in it in float32."""
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return type(value)(self._wide(one) for one in value)
        return value.float() if self._is_held(value) else value
