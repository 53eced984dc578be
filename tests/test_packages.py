"""The tables of packages say what `pyproject.toml` says; one sentence for each that is missing."""

from __future__ import annotations

import contextlib
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from adapterkit import packages
from adapterkit.errors import MissingPackage, UsageError
from adapterkit.packages import CORE, EXTRAS, lacking, missing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
NOT_FOR_USERS = {"all", "docs", "test", "lint"}


def bounds(lines: list[str]) -> dict[str, str]:
    """Name and lower bound of each requirement, but for those of one Python only."""
    found = {}
    for line in lines:
        requirement = line.partition(";")[0].strip()
        name, _, least = requirement.partition(">=")
        if requirement.startswith("adapterkit["):
            continue
        if ";" not in line or sys.version_info < (3, 11):
            found[re.sub(r"[-_.]+", "-", name).lower()] = least
    return found


def test_the_core_is_that_of_pyproject() -> None:
    assert {one.name: one.least for one in CORE} == bounds(PROJECT["dependencies"])


def test_the_extras_are_those_of_pyproject() -> None:
    said = {name: bounds(rows) for name, rows in PROJECT["optional-dependencies"].items() if name not in NOT_FOR_USERS}
    assert {extra.name: {one.name: one.least for one in extra.packages} for extra in EXTRAS} == said


def test_the_page_lists_every_extra() -> None:
    page = (Path(__file__).parents[1] / "docs/installing.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted([*(extra.name for extra in EXTRAS), "all"])


def test_modules_are_what_the_packages_bring() -> None:
    """A wrong module would make a package look missing: each that is installed is found by its table."""
    here = []
    for one in (*CORE, *(one for extra in EXTRAS for one in extra.packages)):
        with contextlib.suppress(PackageNotFoundError):
            version(one.name)
            here.append(one)
    assert len(here) >= len(CORE)
    for one in here:
        assert one.installed(), one
        assert one.is_recent(one.installed()), one


@pytest.mark.parametrize(
    ("found", "least", "recent"),
    [
        ("2.13.0+cpu", "2.6", True),
        ("2.6.0", "2.6", True),
        ("2.5.1", "2.6", False),
        ("10", "9.9", True),
        ("", "1", False),
    ],
)
def test_versions_are_compared_by_number(found: str, least: str, recent: bool) -> None:
    assert packages.Package("x", "x", least).is_recent(found) is recent


def test_the_sentence_names_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told = missing("numba.core", "the compiled encoders need numba")
    assert isinstance(told, MissingPackage)
    assert isinstance(told, UsageError)
    assert told.exit_code == 2
    assert str(told) == "the compiled encoders need numba, and numba is not installed; pip install 'adapterkit[gguf]'"
    # An environment made by uv has no pip.
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: iter(()))
    assert missing("cryptography", "signing needs it", "sign").hint == "uv pip install 'adapterkit[sign]'"
    assert missing("xxhash", "x").message == "xxhash, which adapterkit always needs, is not installed"


def test_only_our_packages_are_explained() -> None:
    told = lacking(ModuleNotFoundError("No module named 'yaml'", name="yaml"))
    assert told is not None
    assert told.hint == "pip install pyyaml"
    assert lacking(ModuleNotFoundError("No module named 'tkinter'", name="tkinter")) is None
    assert lacking(RuntimeError("Numpy is not available")) is not None
    assert lacking(RuntimeError("other")) is None
