"""A recipe is read: TOML becomes the values of `adapterkit.recipe.schema`, and every error names its line."""

from __future__ import annotations

import math
import re
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from adapterkit import errors
from adapterkit.errors import AdapterkitError, NotFound, RecipeError
from adapterkit.recipe.mergekit import is_mergekit, read_mergekit
from adapterkit.recipe.positions import line_of, positions
from adapterkit.recipe.schema import Recipe, Table, known_options
from adapterkit.requests.option import DEVICE, FLAG, NUMBER, PAIRS, PARAMETERS, PATH, REF, SWITCH, TEXT, WHOLE, Option

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
Place = tuple[str | int, ...]

DEFAULT, PYPROJECT = "adapterkit.toml", "pyproject.toml"
_TABLE = ("tool", "adapterkit")
OPTIONS = "options"
_HINTS: dict[str, type] = {
    TEXT: str,
    DEVICE: str,
    REF: str,
    PATH: str,
    WHOLE: int,
    NUMBER: float,
    FLAG: bool,
    SWITCH: bool,
}
_WORDS = {
    str: "a string",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "a table",
    list: "a list",
}


@dataclass(frozen=True)
class RecipeFile:
    """A recipe and the text that it came from.

    Attributes:
        path: the file.
        recipe: what it says.
        lines: where each key stands.
        prefix: the table that holds it, in a file about other things too.
    """

    path: Path
    recipe: Recipe
    lines: Mapping[Place, int] = field(repr=False)
    prefix: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where its relative paths start."""
        return self.path.parent

    def at(self, *place: str | int) -> tuple[str, int]:
        """File and line of a key."""
        return str(self.path), line_of(self.lines, (*self.prefix, *place))

    def fail(self, place: Place, message: str, hint: str = "", kind: type[AdapterkitError] = RecipeError) -> NoReturn:
        """Raise an error about a key of the recipe."""
        raise _error(self.at(*place), place, message, hint, kind)


def find_recipe(given: str | Path | None) -> Path:
    """The recipe's file: as given, else ``adapterkit.toml``, else a ``pyproject.toml``, here.

    Raises:
        NotFound: there is none.
    """
    if given is None:
        found = next((Path(name) for name in (DEFAULT, PYPROJECT) if Path(name).is_file()), None)
        if found is None:
            raise NotFound("there is no adapterkit.toml here", "name a recipe, as in adapterkit build RECIPE.toml")
        return found
    path = Path(given)
    if path.is_dir():
        path = path / DEFAULT
    if not path.is_file():
        raise NotFound(f"{path} does not exist", "name a recipe, as in adapterkit build RECIPE.toml")
    return path


def read_recipe(given: str | Path | None = None) -> RecipeFile:
    """Read a recipe, the table ``[tool.adapterkit]`` of a ``pyproject.toml``, or a merge of mergekit in YAML.

    Raises:
        NotFound: there is none.
        RecipeError: it is not TOML, or not a recipe; the sentence starts with its file and line.
    """
    path = find_recipe(given)
    if is_mergekit(path):
        return RecipeFile(path, _Reader(path, {}, ()).table(Recipe, read_mergekit(path), ()), {})
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not text in UTF-8", "save it again as UTF-8", (str(path), 1)) from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror})", "check its permissions") from None
    try:
        data: Any = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _syntax(path, text, error) from None
    except ValueError as error:  # a number that Python does not take, or a date that is none
        raise RecipeError(f"{path} holds a value that nothing can read ({error})"[:300], "correct it") from None
    except RecursionError:
        raise RecipeError(f"{path} is nested too deeply to be a recipe", "write it flatter", (str(path), 1)) from None
    lines = positions(text)
    prefix = _TABLE if path.name == PYPROJECT else ()
    for name in prefix:
        data = data.get(name) if isinstance(data, dict) else None
    if data is None:
        hint = "add it, or name a recipe of its own"
        raise RecipeError(f"{path} has no table [tool.adapterkit]", hint, (str(path), 1))
    reader = _Reader(path, lines, prefix)
    return RecipeFile(path, reader.table(Recipe, data, ()), lines, prefix)


def _syntax(path: Path, text: str, error: Exception) -> RecipeError:
    said = str(error)
    found = re.search(r"\(at line (\d+), column \d+\)", said)
    line = int(found[1]) if found else text.count("\n") + 1
    what = re.sub(r"\s*\(at [^)]*\)$", "", said)
    return RecipeError(
        f"{path}:{line}: this is not TOML: {what[:1].lower()}{what[1:]}", "correct it", (str(path), line)
    )


def shown(place: Place) -> str:
    """A key as a reader would write it: ``outputs.merged.path``, ``adapters[1]``."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _error(
    at: tuple[str, int], place: Place, message: str, hint: str, kind: type[AdapterkitError] = RecipeError
) -> AdapterkitError:
    return kind(f"{at[0]}:{at[1]}: {message}", hint, at)


def key_of(one: Field[Any]) -> str:
    """The key of a field in TOML."""
    return str(one.metadata.get("key", one.name.replace("_", "-")))


def nearest(name: str, known: list[str]) -> str:
    """A hint: the known word that is most like ``name``, or all of them."""
    return errors.nearest(name, known, f"known: {', '.join(sorted(known))}")


class _Reader:
    """Values from data, by the types of dataclass fields."""

    def __init__(self, path: Path, lines: Mapping[Place, int], prefix: tuple[str, ...]) -> None:
        self._path, self._lines, self._prefix = path, lines, prefix

    def _fail(self, place: Place, message: str, hint: str) -> NoReturn:
        line = line_of(self._lines, (*self._prefix, *place))
        raise _error((str(self._path), line), place, message, hint)

    def table(self, kind: type[T], data: Any, place: Place) -> T:
        short = getattr(kind, "SHORT", None)
        if isinstance(data, str) and short is not None:
            data = {short: data}
        if not isinstance(data, dict):
            self._wrong(place, "a table", data)
        hints = get_type_hints(kind)
        known = {key_of(one): one for one in fields(kind) if one.name != OPTIONS}  # type: ignore[arg-type]
        options = {k: one for k, one in known_options(getattr(kind, "TABLE", "")).items() if k not in known}
        for name in data:
            if name not in known and name not in options:
                where = f" in {shown(place)}" if place else ""
                self._fail((*place, name), f"there is no key '{name}'{where}", nearest(name, [*known, *options]))
        given: dict[str, Any] = {}
        said = {
            one.name: self._option(one.option, data[key], (*place, key)) for key, one in options.items() if key in data
        }
        if issubclass(kind, Table):
            given[OPTIONS] = said
        for name, one in known.items():
            if name in data:
                given[one.name] = self._value(hints[one.name], one, data[name], (*place, name))
            elif one.default is MISSING and one.default_factory is MISSING:
                what = f"{shown(place)} has no '{name}'" if place else f"the recipe has no '{name}'"
                self._fail(place, what, f"add {name}")
        return kind(**given)

    def _option(self, option: Option, data: Any, place: Place) -> Any:
        """The value of an option, by its kind."""
        if option.kind == PARAMETERS:
            return self._mapping(Any, data, place)
        if option.kind == PAIRS:
            return tuple(self._mapping(str, data, place).items())
        hint = _HINTS[option.kind]
        if option.many:
            if not isinstance(data, list):
                self._wrong(place, "a list", data)
            return tuple(self._plain(hint, item, (*place, i)) for i, item in enumerate(data))
        found = self._plain(hint, data, place)
        choices = () if option.open or not option.choices else option.values()
        self._within(choices, (option.low, option.high), found, place)
        return found

    def _value(self, hint: Any, one: Field[Any], data: Any, place: Place) -> Any:
        hint = _without_none(hint)
        origin = get_origin(hint)
        if is_dataclass(hint):
            return self.table(hint, data, place)  # type: ignore[arg-type]
        if origin is tuple:
            if not isinstance(data, list):
                self._wrong(place, "a list", data)
            return tuple(self._plain(get_args(hint)[0], item, (*place, i)) for i, item in enumerate(data))
        if origin is not None:
            return self._mapping(get_args(hint)[1], data, place)
        found = self._plain(hint, data, place)
        self._check(one, found, place)
        return found

    def _mapping(self, hint: Any, data: Any, place: Place) -> dict[str, Any]:
        if not isinstance(data, dict):
            self._wrong(place, "a table", data)
        if hint is Any:
            return dict(data)
        if is_dataclass(hint):
            return {name: self.table(hint, item, (*place, name)) for name, item in data.items()}  # type: ignore[arg-type]
        return {name: self._plain(hint, item, (*place, name)) for name, item in data.items()}

    def _plain(self, hint: Any, data: Any, place: Place) -> Any:
        if hint is float and isinstance(data, int) and not isinstance(data, bool):
            data = float(data)
        if type(data) is not hint:
            self._wrong(place, _WORDS[hint], data)
        if hint is float and not math.isfinite(data):
            self._wrong(place, "a finite number", data)
        return data

    def _check(self, one: Field[Any], value: Any, place: Place) -> None:
        self._within(one.metadata.get("choices", ()), (None, None), value, place)

    def _within(
        self, choices: Sequence[str], bounds: tuple[float | None, float | None], value: Any, place: Place
    ) -> None:
        """Refuse a value that is none of the choices, or out of its bounds."""
        if choices and value not in choices:
            self._fail(place, f"{shown(place)} is '{value}'", f"use {', '.join(choices)}")
        low, high = bounds
        if (low is not None and value < low) or (high is not None and value > high):
            least = f"it is at least {low:g}"
            hint = least if high is None else f"it lies between {low or 0:g} and {high:g}"
            self._fail(place, f"{shown(place)} is {value:g}, which can never hold", hint)

    def _wrong(self, place: Place, wanted: str, data: Any) -> NoReturn:
        got = _WORDS.get(type(data), f"a {type(data).__name__}")
        text = f" ({data!r})" if isinstance(data, (str, int, float)) and len(repr(data)) <= 60 else ""
        self._fail(place, f"{shown(place) or 'the recipe'} is {got}{text}", f"give {wanted}")


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(one for one in get_args(hint) if one is not type(None))
    return hint
