"""Results files of evaluation harnesses, read into the figures that records carry.

One file of this package for each harness: `NAME` for readers, `fits` says whether a JSON value is one of its files, and
`measured` reads it. They are found by their files.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from adapterkit.errors import CheckFailed, UsageError
from adapterkit.foreign import json_value

if TYPE_CHECKING:
    from adapterkit.places import Address
    from adapterkit.registry.evaluation import Score

LIMIT = 64 << 20  # bytes of a results file
BESIDE = ("run_spec.json",)  # names of files beside one that say what it is of (HELM's)


class Harness(Protocol):
    """A file of this package."""

    NAME: str

    def fits(self, value: Any) -> bool: ...
    def measured(self, value: Any, path: Path, task: str) -> Iterable[Score]: ...


def harnesses() -> list[Harness]:
    """All harnesses whose files are known, the plain table last: it asks least of a file."""
    names = sorted((module.name for module in pkgutil.iter_modules(__path__)), key=lambda name: (name == "table", name))
    return [cast(Harness, import_module(f"{__name__}.{name}")) for name in names]


def read_results(place: Path | Address, *, subject: str = "self", task: str = "") -> tuple[Score, ...]:
    """The figures of a results file.

    Args:
        place: a JSON file, here or in a store, that a harness wrote, or a table ``{metric: value}``.
        subject: whose figures they are, a key of `adapterkit.registry.evaluation.SUBJECTS`.
        task: the task's name, for files that state none; by default the name of the file.

    Raises:
        UsageError: it is no results file that is known.
        CheckFailed: the run that it is of did not finish, or a figure is no number.
        NotFound, UnsafeError: the file is not there, or is no regular file.
    """
    from adapterkit.stores.files import reading

    with reading(place, BESIDE) as path:
        return _read(path, subject, task)


def _read(path: Path, subject: str, task: str) -> tuple[Score, ...]:
    from adapterkit.disk import read_regular
    from adapterkit.registry.canonical import sha256

    data = read_regular(path, LIMIT, "a results file")
    try:
        value = json_value(data.decode("utf-8"))
    except ValueError:
        raise UsageError(
            f"{path} is not JSON, and no results file that is known",
            "inspect-ai's .eval files become JSON by `inspect log dump`",
        ) from None
    source = sha256(data)
    for harness in harnesses():
        if harness.fits(value):
            try:
                scores = list(harness.measured(value, path, task or path.stem))
            except (AttributeError, TypeError, KeyError, ValueError, OverflowError) as error:
                raise UsageError(
                    f"{path} looks like a file of {harness.NAME}, and a part of it has another shape ({str(error)[:100]})",
                    "give the file as the harness wrote it",
                ) from error
            found = [replace(one, subject=subject, source=source) for one in scores]
            if not found:
                raise UsageError(
                    f"{path} is a file of {harness.NAME} that holds no figure", "give the file of a whole run"
                )
            return tuple(found)
    known = ", ".join(harness.NAME for harness in harnesses())
    raise UsageError(f"{path} is no results file that is known: {_shape(value)}", f"known are {known}")


def _shape(value: Any) -> str:
    if isinstance(value, dict):
        keys = [str(key)[:40] for key in value]
        return f"an object with {', '.join(keys[:6]) or 'nothing in it'}{' ...' if len(keys) > 6 else ''}"
    return f"a {type(value).__name__} and not an object"


def number(value: Any, what: str) -> float:
    """A figure.

    Raises:
        CheckFailed: it is no finite number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CheckFailed(f"{what} is {str(value)[:40]} in the results, which is no figure", "run the evaluation again")
    return float(value)


def spread(value: Any) -> float | None:
    """A standard error; None where a harness states none, or states that it has none."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return float(value) if good else None


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number, NaN and infinities included."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def utc(value: Any) -> str:
    """A date as records spell it, of seconds since 1970 or of ISO 8601; empty where it is neither."""
    from datetime import datetime, timezone

    try:
        if is_number(value):
            moment = datetime.fromtimestamp(float(value), timezone.utc)
        elif isinstance(value, str):
            moment = datetime.fromisoformat(value)
            moment = (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
        else:
            return ""
    except (ValueError, OverflowError, OSError):
        return ""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def count(value: Any) -> int:
    """A number of samples; 0 where none is stated."""
    return value if type(value) is int and value >= 0 else 0
