"""An option, and a request made of them: declared as fields, checked when the request is made."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from adapterkit.errors import UsageError, nearest
from adapterkit.places import Address, local, readable, writable
from adapterkit.values import dataclass

# Kinds of values.
TEXT, WHOLE, NUMBER, FLAG, SWITCH, PATH, REF, PAIRS, PARAMETERS, CALL = (
    *("text", "whole", "number", "flag", "switch", "path", "ref", "pairs", "parameters", "call"),
)
COUNTS = "counts"
DEVICE = "device"
DEVICES = "cpu|cuda|mps"  # what stands for one in help
# What an address in a store is, of an option that is a path: an output, a file that is read, or one that is written whole.
OUTPUT_THERE, READ_THERE, WRITTEN_THERE = "output", "read", "written"
# Roles: an input, what decides values of the output, what decides its bytes alone, or neither.
INPUT, VALUES, BYTES, RUN = "input", "values", "bytes", "run"
# Doors.
CLI, PYTHON, RECIPE, RECORD = "cli", "python", "recipe", "record"

_KEY = "option"
_WORDS = {
    TEXT: "a string",
    REF: "a path, a name or an open object",
    PATH: "a path",
    WHOLE: "a whole number",
    NUMBER: "a number",
    FLAG: "True or False",
    SWITCH: "True or False",
    PAIRS: "a mapping, or KEY=VALUE texts",
    PARAMETERS: "a mapping",
    CALL: "a function",
    COUNTS: "a number, or several as 1,8,64",
    DEVICE: "cpu, cuda, cuda:1 or mps",
}


@dataclass(frozen=True)
class Option:
    """What an option is, for every door.

    Attributes:
        help: one or two sentences.
        kind: of its value; see the constants of this module.
        role: what it decides.
        group: the heading under which ``--help`` shows it.
        flag: its name on the command line, by default ``--`` and the field's name with hyphens.
        short: a second name there, as ``-o``.
        metavar: what stands for the value in ``--help``.
        choices: the values it takes, or a function that gives them; empty for any.
        low, high: the bounds of a number.
        many: it takes several values; a single one is a sequence of one.
        needs: fields of which at least one must be given, or the option means nothing.
        recipe: its place in a recipe, ``table.key``; empty where it has none.
        elsewhere: for each door that does not have it, why.
        open: values beyond ``choices`` are left to the verb, which refuses them in its own words.
        store: of a path: an address in an object store is one too, and what it is then: `OUTPUT_THERE`, `READ_THERE` or
            `WRITTEN_THERE`. Empty where it is refused; docs/stores.md says why.
    """

    help: str
    kind: str = TEXT
    role: str = RUN
    group: str = ""
    flag: str = ""
    short: str = ""
    metavar: str = ""
    choices: tuple[str, ...] | Callable[[], Iterable[str]] = ()
    low: float | None = None
    high: float | None = None
    many: bool = False
    needs: tuple[str, ...] = ()
    recipe: str = ""
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    open: bool = False
    store: str = ""

    def values(self) -> tuple[str, ...]:
        """The choices, asked for now."""
        return tuple(self.choices() if callable(self.choices) else self.choices)

    def checked(self, name: str, value: Any) -> Any:
        """``value`` in the type of the field.

        Raises:
            UsageError: a value of another type, out of range, or not one of the choices.
        """
        if self.many:
            return self._several(name, value)
        found = _CHECKS[self.kind](self, name, value)
        if self.choices and not self.open and found not in self.values():
            raise UsageError(f"'{found}' is not a value of {name}", nearest(str(found), self.values()))
        return found

    def _several(self, name: str, value: Any) -> Any:
        if self.kind == REF and hasattr(value, "adapters"):
            return value  # a family: adapters that are open already
        alone = isinstance(value, (str, bytes, Path, bool)) or not hasattr(value, "__iter__")
        if alone or (self.kind == REF and hasattr(value, "ref")):
            value = (value,)
        one = Option(self.help, self.kind, choices=self.choices, low=self.low, high=self.high, open=self.open)
        return tuple(one.checked(name, item) for item in value)


def _wrong(option: Option, name: str, value: Any) -> UsageError:
    shown = repr(value) if len(repr(value)) <= 60 else f"a {type(value).__name__}"
    return UsageError(f"{name} is {shown}", f"give {_WORDS[option.kind]}")


def _text(option: Option, name: str, value: Any) -> Any:
    if not isinstance(value, str):
        raise _wrong(option, name, value)
    return value


def _ref(option: Option, name: str, value: Any) -> Any:
    """Paths, names and open objects (which have a ``ref`` of their own) pass."""
    if not isinstance(value, (str, Path)) and not hasattr(value, "ref"):
        raise _wrong(option, name, value)
    return readable(value, name) if isinstance(value, (str, Path)) else value


def _path(option: Option, name: str, value: Any) -> Any:
    if option.store and isinstance(value, (str, Path, Address)):
        return writable(value, name, "folder" if option.store == OUTPUT_THERE else "file")
    if not isinstance(value, (str, Path)):
        raise _wrong(option, name, value)
    return Path(local(value, name))


def _whole(option: Option, name: str, value: Any) -> Any:
    try:
        found = operator.index(value)
    except TypeError:
        raise _wrong(option, name, value) from None
    if isinstance(value, bool):
        raise _wrong(option, name, value)
    return _bounded(option, name, found)


def _number(option: Option, name: str, value: Any) -> Any:
    try:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError):
        raise _wrong(option, name, value) from None
    return _bounded(option, name, found)


def _bounded(option: Option, name: str, value: Any) -> Any:
    low, high = option.low, option.high
    outside = (low is not None and value < low) or (high is not None and value > high)
    if (low is not None or high is not None) and (outside or math.isnan(value)):
        bounds = f"a number from {low:g} to {high:g}" if low is not None and high is not None else ""
        bounds = bounds or (f"at least {low:g}" if low is not None else f"at most {high:g}")
        raise UsageError(f"{name} is {value:g}", f"give {bounds}")
    return value


def _flag(option: Option, name: str, value: Any) -> Any:
    if not isinstance(value, bool):
        raise _wrong(option, name, value)
    return value


def _pairs(option: Option, name: str, value: Any) -> Any:
    """(key, value) pairs, from a mapping, from pairs, or from ``KEY=VALUE`` texts (split at the last ``=``)."""
    if isinstance(value, Mapping):
        return tuple((str(key), str(item)) for key, item in value.items())
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Iterable):
        raise _wrong(option, name, value)
    found = []
    for item in value:
        if isinstance(item, str):
            key, equals, text = item.rpartition("=") if "REGEX" in option.metavar else item.partition("=")
            if not equals or not key:
                raise UsageError(f"'{item}' is not {option.metavar or 'KEY=VALUE'}", _EXAMPLES.get(option.metavar, ""))
            found.append((key, text))
        else:
            key, text = item
            found.append((str(key), str(text)))
    return tuple(found)


_EXAMPLES = {"REGEX=TYPE": "write it like attn_v=Q8_0"}


def _parameters(option: Option, name: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(option, name, value)
    return dict(value)


def _call(option: Option, name: str, value: Any) -> Any:
    if not callable(value):
        raise _wrong(option, name, value)
    return value


def _counts(option: Option, name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise _wrong(option, name, value)
    return str(value)


def _device(option: Option, name: str, value: Any) -> Any:
    from adapterkit.ops.device import check_name

    return check_name(_text(option, name, value))


_CHECKS: dict[str, Callable[[Option, str, Any], Any]] = {
    TEXT: _text,
    REF: _ref,
    PATH: _path,
    WHOLE: _whole,
    NUMBER: _number,
    FLAG: _flag,
    SWITCH: _flag,
    PAIRS: _pairs,
    PARAMETERS: _parameters,
    CALL: _call,
    COUNTS: _counts,
    DEVICE: _device,
}


def opt(help: str, kind: str = TEXT, **more: Any) -> dict[str, Option]:
    """The metadata of a field that is an option; see `Option` for the keywords."""
    return {_KEY: Option(help, kind, **more)}


class Request:
    """What a verb was asked for. A subclass has one field per option.

    Requests are equal when they are of one class and all their fields are.
    """

    VERB: ClassVar[str] = ""
    FIRST: ClassVar[tuple[str, ...]] = ()
    """What most people need: these fields lead ``--help``, in this order."""

    def __post_init__(self) -> None:
        for name, option in self.options().items():
            value = getattr(self, name)
            default = default_of(self._fields()[name])
            if value is None and default is not MISSING:
                value = default
            elif value is not default:
                value = option.checked(name, value)
                if option.many and value == () and default is None:
                    value = None
            object.__setattr__(self, name, value)
        self.check()

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self._fields())

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, name) for name in self._fields()))

    def __repr__(self) -> str:
        """The options that differ from their defaults, as they would be written in Python."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.given().items())})"

    def check(self) -> None:
        """Refuse options that mean nothing without others; verbs add what they know.

        Raises:
            UsageError
        """
        self.check_needs(self.options())

    def check_needs(self, names: Iterable[str]) -> None:
        """Refuse those of some options that mean nothing without others.

        Raises:
            UsageError
        """
        given = self.given()
        for name in names:
            option = self.options()[name]
            if option.needs and name in given and not any(one in given for one in option.needs):
                first = self.options()[option.needs[0]]
                flag = first.flag or flag_of(option.needs[0])
                raise UsageError(f"{self.spelled(name)} means nothing here", f"add {flag}, or leave it out")

    def spelled(self, name: str) -> str:
        """An option as the command line calls it."""
        return self.options()[name].flag or flag_of(name)

    @classmethod
    def _fields(cls) -> dict[str, Field[Any]]:
        key: Any = cls
        return _fields_of(key)

    @classmethod
    def options(cls) -> Mapping[str, Option]:
        """The options by name, in the order in which they are declared."""
        key: Any = cls
        return _options_of(key)

    def given(self, *roles: str) -> dict[str, Any]:
        """The options that differ from their defaults, of these roles or of all."""
        found = {}
        for name, option in self.options().items():
            value = getattr(self, name)
            if value != default_of(self._fields()[name]) and (not roles or option.role in roles):
                found[name] = value
        return found

    @property
    def named(self) -> frozenset[str]:
        """The options that the caller named, at their default too, and those that differ from it."""
        found: frozenset[str] = getattr(self, "_named", frozenset())
        return found | frozenset(self.given())  # one option may say another, as outtype says dtype

    @classmethod
    def bound(cls, given: Mapping[str, Any]) -> Any:
        """A request from what a caller named.

        Raises:
            UsageError: an option that this verb does not have.
        """
        keywords = cls.known(given)
        made = cls(**keywords)
        object.__setattr__(made, "_named", frozenset(name for name, value in keywords.items() if value is not None))
        return made

    @classmethod
    def known(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords as the fields have them, parameters of a method put together.

        Raises:
            UsageError: one is no option of the verb.
        """
        fields, keywords = cls._fields(), dict(given)
        strange = [name for name in given if name not in fields and name not in cls.taken()]
        if strange and "parameters" in fields:
            keywords = _with_parameters(keywords, strange)
            strange = [name for name in strange if name in keywords]
        if strange:
            hint = nearest(strange[0], fields, f"it has {', '.join(sorted(fields))}")
            raise UsageError(f"{cls.VERB} has no option '{strange[0]}'", hint)
        return keywords

    @classmethod
    def taken(cls) -> frozenset[str]:
        """Keywords that are taken beside the fields."""
        return frozenset()

    @classmethod
    def inputs(cls) -> tuple[str, ...]:
        """The fields that can be given by their position, in order."""
        return tuple(name for name, one in cls._fields().items() if not one.kw_only)


class InHome:
    """A request with a field ``home``: the registry's folder."""

    home: Any

    @property
    def folder(self) -> Path | None:
        """The registry's folder, where it was named."""
        return None if self.home is None else Path(self.home)


def _with_parameters(given: dict[str, Any], strange: Sequence[str]) -> dict[str, Any]:
    """Keywords that are parameters of a combination method, as one mapping."""
    from adapterkit.ops.rules import RULES

    known = {parameter.name for row in RULES.values() for parameter in row.parameters}
    own = {name: given[name] for name in strange if name in known and given[name] is not None}
    rest = {name: value for name, value in given.items() if name not in known or name not in strange}
    if own:
        rest["parameters"] = {**(rest.get("parameters") or {}), **own}
    return rest


def flag_of(name: str) -> str:
    """``--max-shard-size``"""
    return "--" + name.replace("_", "-")


def default_of(one: Field[Any]) -> Any:
    """The default of a field; ``MISSING`` where it has none."""
    return one.default_factory() if one.default_factory is not MISSING else one.default


@cache
def _fields_of(cls: Any) -> dict[str, Field[Any]]:
    """The fields of a request: those that can be given by position first."""
    found = {one.name: one for one in fields(cls)}
    placed = {name: one for name, one in found.items() if not one.kw_only}
    return placed | {name: one for name, one in found.items() if one.kw_only}


@cache
def _options_of(cls: Any) -> dict[str, Option]:
    return {name: one.metadata[_KEY] for name, one in _fields_of(cls).items() if _KEY in one.metadata}
