"""The one table of combination methods: a typed function, registered once, is a method.

Its keyword-only parameters with an ``Annotated`` type are what a user can set: type, range, default and help come
from the signature, and so do command-line options, recipe fields and the row in the documentation. Reading the
table does not import torch.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from adapterkit.errors import UsageError, nearest
from adapterkit.ops.settings import Setting, is_setting, setting

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterkit.ops.rows import DeltaRows

Space = Literal["factors", "core", "dense"]
Value = float | int | bool | str | None


@dataclass(frozen=True)
class Range:
    """An interval; ``None`` is no bound, and ``open_low`` leaves the lower bound out."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low is None or value > self.low or (value == self.low and not self.open_low)
        return above and (self.high is None or value <= self.high)

    def __str__(self) -> str:
        if self.high is None:
            return f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if self.low is None:
            return f"at most {self.high:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}]"


class PerAdapter:
    """Marks a parameter that may have a value for each adapter."""


@dataclass(frozen=True)
class Parameter:
    """One thing a user can set on a method; ``type`` is float, int, bool or str (with ``choices``).

    A value may also be rows by part of the model (see `adapterkit.ops.settings`), and a list, one for each adapter, where
    ``each``.
    """

    name: str
    type: type
    default: Value
    help: str
    range: Range | None = None
    choices: tuple[str, ...] = ()
    optional: bool = False
    each: bool = False

    @property
    def option(self) -> str:
        """The name on the command line."""
        return "--" + self.name.replace("_", "-")

    def check(self, value: object, method: str) -> Any:
        """The value in the parameter's type; a `Setting` of rows, and a tuple of a list.

        Raises:
            UsageError: wrong type, out of range, or not a choice.
        """
        where = f"{self.name} of method {method}"
        if value is None and self.optional:
            return None
        if isinstance(value, Setting):
            return value
        if is_setting(value):
            rows: Any = value
            return setting(rows, lambda one: self.check(one, method), where)
        if self.each and isinstance(value, (list, tuple)) and value:
            return tuple(self.check(one, method) for one in value)
        if self.choices:
            if value in self.choices:
                return str(value)
            raise UsageError(f"{where} must be one of {', '.join(self.choices)}, got {value!r}", self.help)
        wanted: tuple[type, ...] = (int, float) if self.type is float else (self.type,)
        # bool is an int to Python and never a number to a user.
        if not isinstance(value, wanted) or (isinstance(value, bool) and self.type is not bool):
            raise UsageError(f"{where} must be {_ARTICLES[self.type]}, got {value!r}", self.help)
        checked = self.type(value)
        if self.range is not None and checked not in self.range:
            raise UsageError(f"{where} must be {self.range}, got {value!r}", self.help)
        return checked


_ARTICLES = {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}


@dataclass(frozen=True)
class CombinationRule:
    """A row of the table.

    ``space`` is where the rule works: on the factors, on the small core matrices, or on the entries of the deltas.
    ``nested`` methods align adapters and leave the combination itself to an inner rule, whose parameters they take
    too; ``inner`` methods can be that rule. ``keyed`` rules are told the tensor's name, and ``weighted`` ones the weights that
    the deltas were multiplied by; ``based`` ones get the base's own values.
    """

    name: str
    summary: str
    paper: str
    space: Space
    parameters: tuple[Parameter, ...]
    function: Callable[..., DeltaRows]
    nested: bool
    inner: bool
    keyed: bool
    weighted: bool
    based: bool

    @property
    def url(self) -> str:
        """Where the method is defined."""
        return f"https://arxiv.org/abs/{self.paper}" if self.paper else ""

    def bind(self, given: dict[str, Any]) -> dict[str, Any]:
        """All parameters of a call: those given, checked, and the defaults of the rest.

        Raises:
            UsageError: a name that is no parameter, or a value that is out of range.
        """
        own = {p.name: p for p in self.parameters}
        mine = {name: value for name, value in given.items() if name in own}
        rest = {name: value for name, value in given.items() if name not in own}
        bound: dict[str, Any] = {p.name: p.check(mine.get(p.name, p.default), self.name) for p in self.parameters}
        if self.nested:
            return bound | RULES[str(bound["rule"])].bind(rest)
        if rest:
            known = ", ".join(own) if own else "no parameters"
            raise UsageError(f"method {self.name} has no parameter {next(iter(rest))}", f"it takes {known}")
        return bound


RULES: dict[str, CombinationRule] = {}
ANY_DELTAS = frozenset({"linear", "slerp", "nuslerp", "multislerp", "karcher", "model-stock"})
"""Rules that keep low rank where it is and take any other delta too."""


def rule(*, paper: str, space: Space, inner: bool | None = None) -> Callable[[Any], Any]:
    """Register the decorated function as a method; its name, with hyphens, is the method's."""

    def register(function: Any) -> Any:
        name = function.__name__.replace("_", "-")
        signature = inspect.signature(function)
        found = tuple(
            _parameter(p, function.__globals__)
            for p in signature.parameters.values()
            if p.kind is p.KEYWORD_ONLY and p.name not in ("key", "weights", "base")
        )
        RULES[name] = CombinationRule(
            name=name,
            summary=inspect.getdoc(function).splitlines()[0],  # type: ignore[union-attr]
            paper=paper,
            space=space,
            parameters=found,
            function=function,
            nested=any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()),
            inner=space == "dense" if inner is None else inner,
            keyed="key" in signature.parameters,
            weighted="weights" in signature.parameters,
            based="base" in signature.parameters,
        )
        return function

    return register


def find(name: str) -> CombinationRule:
    """The method of that name; underscores and hyphens are the same.

    Raises:
        UsageError: there is none.
    """
    found = RULES.get(name.replace("_", "-"))
    if found is None:
        raise UsageError(f"there is no combination method '{name}'", nearest(name, sorted(RULES)))
    return found


def _parameter(parameter: inspect.Parameter, names: dict[str, Any]) -> Parameter:
    hint = parameter.annotation
    base, *extras = get_args(eval(hint, names) if isinstance(hint, str) else hint)
    optional = get_origin(base) in (UnionType, Union)
    if optional:
        base = next(t for t in get_args(base) if t is not NoneType)
    literal = get_origin(base) is Literal
    return Parameter(
        name=parameter.name,
        type=str if literal else base,
        default=parameter.default,
        help=next(extra for extra in extras if isinstance(extra, str)),
        range=next((extra for extra in extras if isinstance(extra, Range)), None),
        choices=tuple(get_args(base)) if literal else (),
        optional=optional,
        each=PerAdapter in extras,
    )
