"""`docs/architecture.md` walks through files and functions: each of them is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import adapterkit

PACKAGE = Path(adapterkit.__file__).parent
PAGE = Path(__file__).parents[1] / "docs/architecture.md"
WALKS = PAGE.read_text(encoding="utf-8").partition("## Four walks")[2].partition("\n## ")[0]
PLACES = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", WALKS)))


def names(file: str) -> set[str]:
    """Functions, classes and methods of a file."""
    found = set()
    for node in ast.parse((PACKAGE / file).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
    return found


def test_there_are_walks() -> None:
    assert len(PLACES) > 20


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_a_walk_goes_through_what_is_there(file: str, name: str) -> None:
    assert name in names(file)
