"""`dataclass` for values that exist as soon as the command line starts.

The one of the standard library compiles six functions for every frozen class. Here a frozen class gets one, its
``__init__``; comparing, hashing, showing and refusing to be changed are written once, for all. That takes a quarter of the
time, and there are many such classes. What these classes do is the same, and type checkers see the standard library's.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import dataclass as dataclass
else:

    def dataclass(cls: Any = None, **options: Any) -> Any:
        """See `dataclasses.dataclass`. Quick for ``frozen=True``, and the same for what else it is given."""
        if cls is None:
            return lambda cls: dataclass(cls, **options)
        if not options.get("frozen") or options.keys() - {"frozen", "kw_only", "init", "eq", "repr"}:
            return dataclasses.dataclass(cls, **options)
        return _frozen(cls, **options)


def _frozen(
    cls: Any, *, frozen: bool, kw_only: bool = False, init: bool = True, eq: bool = True, repr: bool = True
) -> Any:
    if cls.__doc__ is None:
        cls.__doc__ = cls.__name__  # else a signature is made for it, which takes longer than all the rest
    shared = {"__setattr__": _setattr, "__delattr__": _delattr}
    if repr:
        shared["__repr__"] = _repr
    if eq:
        shared |= {"__eq__": _eq, "__hash__": _hash}
    # A class that writes ``__eq__`` alone is given ``__hash__ = None`` by Python; that is not its own.
    shared = {name: function for name, function in shared.items() if cls.__dict__.get(name) is None}
    # A frozen class may only follow frozen ones, so what has such a base is made frozen by the standard library too.
    below = any(getattr(base, "__dataclass_params__", None) is not None for base in cls.__mro__[1:])
    made = dataclasses.dataclass(init=False, repr=False, eq=False, kw_only=kw_only, frozen=below)(cls)
    said = made.__dataclass_params__
    said.init, said.repr, said.eq, said.frozen = init, repr, eq, frozen
    if init and "__init__" not in cls.__dict__:
        shared["__init__"] = _initializer(made)
    for name, function in shared.items():
        setattr(made, name, function)
    return made


def _initializer(cls: Any) -> Callable[..., None]:
    """``__init__`` of a class whose fields are known."""
    placed: list[str] = []
    named: list[str] = []
    # Names that no field has.
    body = ["__values__ = __self__.__dict__"]
    space: dict[str, Any] = {"__missing__": dataclasses.MISSING}
    passed = []
    for name, one in cls.__dataclass_fields__.items():
        kind = one._field_type.name
        if kind == "_FIELD_CLASSVAR":
            continue
        made = one.default_factory is not dataclasses.MISSING
        given = name
        if made:
            space[f"__make_{name}__"] = one.default_factory
            given = f"__make_{name}__() if {name} is __missing__ else {name}" if one.init else f"__make_{name}__()"
        elif one.default is not dataclasses.MISSING:
            space[f"__default_{name}__"] = one.default
        if one.init:
            default = "=__missing__" if made else f"=__default_{name}__" if f"__default_{name}__" in space else ""
            (named if one.kw_only else placed).append(name + default)
        if kind == "_FIELD_INITVAR":
            passed.append(name)
        elif one.init or made:
            body.append(f"__values__[{name!r}] = {given}")
    if hasattr(cls, "__post_init__"):
        body.append(f"__self__.__post_init__({', '.join(passed)})")
    taken = ", ".join(["__self__", *placed, *(["*", *named] if named else [])])
    exec(f"def __init__({taken}):\n " + "\n ".join(body), space)
    found: Any = space["__init__"]
    found.__qualname__ = f"{cls.__qualname__}.__init__"
    found.__annotations__ = {one.name: one.type for one in dataclasses.fields(cls) if one.init} | {"return": None}
    return found  # type: ignore[no-any-return]


@cache
def _values(cls: Any, hashed: bool = False) -> Callable[[Any], Any]:
    """A function that gives the values of an object by which it is compared, or hashed."""
    names = [
        one.name for one in dataclasses.fields(cls) if (one.compare if not hashed or one.hash is None else one.hash)
    ]
    return attrgetter(*names) if len(names) > 1 else lambda one: tuple(getattr(one, name) for name in names)


def _eq(self: Any, other: object) -> bool:
    if other.__class__ is not self.__class__:
        return NotImplemented  # type: ignore[no-any-return]
    cls: Any = self.__class__
    values = _values(cls)
    return bool(values(self) == values(other))


def _hash(self: Any) -> int:
    cls: Any = self.__class__
    return hash(_values(cls, True)(self))


def _repr(self: Any) -> str:
    shown = (f"{one.name}={getattr(self, one.name)!r}" for one in dataclasses.fields(self) if one.repr)
    return f"{self.__class__.__qualname__}({', '.join(shown)})"


def _setattr(self: Any, name: str, value: object) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _delattr(self: Any, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
