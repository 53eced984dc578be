"""A verb's function takes the keywords of its request: by their own names, for callers, type checkers and ``help()``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from adapterkit.errors import UsageError
from adapterkit.requests.option import Request
from adapterkit.stores.meter import moving

P = ParamSpec("P")
Q = TypeVar("Q")
R = TypeVar("R")


def takes(request: Callable[P, Q]) -> Callable[[Callable[[Q], R]], Callable[P, R]]:
    """Make a function of a request a function of the request's fields.

    The inputs may be given by their position. Type checkers see the fields of the dataclass, since a dataclass is a
    callable with that signature. Options that the verb does not have are a `UsageError` with the nearest name.
    """
    cls: Any = request

    def decorate(function: Callable[[Q], R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with moving():
                return function(cls.bound(_named(cls, function.__name__, args, kwargs)))

        call.__signature__ = inspect.signature(cls).replace(  # type: ignore[attr-defined]
            return_annotation=inspect.signature(function).return_annotation
        )
        call.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nArgs:\n{_described(cls)}\n"
        call.request = cls  # type: ignore[attr-defined]
        return call

    return decorate


def _named(cls: type[Request], verb: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every argument by its name."""
    names = cls.inputs()
    if len(args) > len(names):
        raise UsageError(f"{verb} takes {', '.join(names)}, and its options by name", "name the other arguments")
    given = dict(zip(names, args, strict=False))
    twice = sorted(given.keys() & kwargs.keys())
    if twice:
        raise UsageError(f"{twice[0]} was given twice", "give it once")
    fields = cls._fields()
    missing = [name for name in names if name not in given and name not in kwargs and _required(fields[name])]
    missing += [name for name, one in fields.items() if one.kw_only and _required(one) and name not in kwargs]
    if missing:
        cls.known(kwargs)  # the name of one may be spelled wrongly
        raise UsageError(f"{verb} needs {', '.join(missing)}", f"give {missing[0]}")
    return {**given, **kwargs}


def _required(one: Any) -> bool:
    from dataclasses import MISSING

    return one.default is MISSING and one.default_factory is MISSING


def _described(cls: type[Request]) -> str:
    lines = []
    for name, option in cls.options().items():
        if "python" not in option.elsewhere:
            choices = "" if callable(option.choices) or not option.choices else f" One of {', '.join(option.choices)}."
            lines.append(f"    {name}: {option.help}{choices}")
    return "\n".join(lines)
