"""One word, one thing: the names of the package's public classes."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

import adapterkit

ROOT = Path(adapterkit.__file__).parent


def twice(files: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Public class names that are defined more than once in ``(file, text)`` pairs, with the files."""
    places: dict[str, list[str]] = {}
    for file, text in files:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(file)
    return {name: files for name, files in places.items() if len(files) > 1}


def test_no_public_class_name_is_defined_twice() -> None:
    found = twice((str(file.relative_to(ROOT)), file.read_text()) for file in sorted(ROOT.rglob("*.py")))
    assert found == {}


def test_a_name_that_is_defined_twice_is_seen() -> None:
    files = [("a.py", "class Rule: ...\nclass _Kept: ..."), ("b.py", "def f():\n    class Rule: ...\nclass _Kept: ...")]
    assert twice(files) == {"Rule": ["a.py", "b.py"]}
