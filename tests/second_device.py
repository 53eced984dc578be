"""A second device for tests on machines without a GPU.

It is a backend of torch in its own right, called ``second``: a tensor there has another device than one on the CPU, torch
sees it so, and values are real. An operator that is given tensors of both devices is an error here as it is on a GPU
(numbers without dimensions may come along, as there). What lies there cannot be seen by numpy, and has no address.
`COPIES` counts what went there and back.
"""

from __future__ import annotations

import threading
from collections import Counter
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from adapterkit.ops.device import Sort

NAME = "second"
COPIES: Counter[str] = Counter()
OPERATORS: Counter[str] = Counter()
_LOCK = threading.Lock()
_COPY = {"aten::_to_copy", "aten::copy_", "aten::_copy_from"}
# What a GPU takes with indices of the CPU too.
_INDEXED = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"}


class Mixed(RuntimeError):
    """An operator was given tensors of two devices."""


class There(torch.Tensor):
    """A tensor on the second device; what it holds lies on the CPU, where only this class reaches it."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        found = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        found.inner = inner
        return found  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"There({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return _run(func, args, kwargs or {})


def _flat(values: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def see(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            found.append(value)
        return value

    tree_map(see, values)
    return found


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = str(func._schema.name)
    tensors = _flat((args, kwargs))
    there = [one for one in tensors if isinstance(one, There)]
    asked = kwargs.get("device")
    if name in _COPY:
        return _copied(func, name, args, kwargs)
    if there:
        # Indices may lie on the CPU, of what lies there; values may not.
        looked = [args[0], *args[2:]] if name in _INDEXED else tensors
        strangers = [one for one in _flat(looked) if not isinstance(one, There) and one.dim()]
        if strangers:
            raise Mixed(f"{name} was given a tensor of shape {list(strangers[0].shape)} on the CPU and one on {NAME}")
    with _LOCK:
        OPERATORS[name] += 1
    result_there = bool(there) if asked is None else torch.device(asked).type == NAME
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner = tree_map(lambda one: one.inner if isinstance(one, There) else one, (args, kwargs))
    found = func(*inner[0], **inner[1])
    if not result_there:
        return found
    back = {id(one.inner): one for one in there}
    return tree_map(lambda one: _wrapped(one, back), found)


def _wrapped(value: Any, back: dict[int, There]) -> Any:
    """What an operator gave; a tensor that it was given (``out=``, in place) is that tensor."""
    if not isinstance(value, torch.Tensor) or isinstance(value, There):
        return value
    same = back.get(id(value))
    if same is not None and same.shape == value.shape:
        return same
    return There(value)


def _copied(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """From the one device to the other, or with another dtype."""
    if name == "aten::_to_copy":
        source = args[0]
        asked = kwargs.pop("device", None)
        to_there = isinstance(source, There) if asked is None else torch.device(asked).type == NAME
        kwargs.pop("pin_memory", None)
        inner = source.inner if isinstance(source, There) else source
        _count(isinstance(source, There), to_there)
        found = torch.ops.aten._to_copy.default(inner, **kwargs)
        return There(found) if to_there else found
    target, source = args[0], args[1]
    _count(isinstance(source, There), isinstance(target, There))
    one, other = (x.inner if isinstance(x, There) else x for x in (target, source))
    one.copy_(other)
    return target


def _count(was_there: bool, is_there: bool) -> None:
    if was_there != is_there:
        with _LOCK:
            COPIES["back" if was_there else "there"] += 1


@cache
def register() -> None:
    """Make the device known to torch, once in a process."""
    _setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")

    def fallback(func: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return _run(func, args, kwargs)

    library.fallback(fallback, "PrivateUse1")
    register.library = library  # type: ignore[attr-defined]


def sort() -> Sort:
    """As `adapterkit.ops.device` knows it: as CUDA, without memory that is pinned."""
    return Sort(lambda: "", lambda: 1, lambda index: {"name": "a second CPU", "memory": 1 << 30})
