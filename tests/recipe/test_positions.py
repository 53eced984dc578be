"""Where the keys of a recipe stand, held against tomllib (which paths there are) and against the text itself."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterkit.recipe.positions import line_of, positions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def paths(value: Any, path: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    """Every path of a parsed document."""
    found = {path} if path else set()
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found |= paths(item, (*path, key))
    return found


DOCUMENT = '''\
# a comment [with] = signs
base = "demo/base"   # at the end
weights = [1.0,
  2.0, # one
  3.0]

[outputs.merged]
path = 'C:\\new'
note = """
[not.a.table]
x = 1 \\"""
"""
rest = \'\'\'it''s\'\'\'

[[adapters]]
ref = "a"
  [adapters.meta]
  "quoted.key" = {x = 1, y = [{z = 2}]}
[[adapters]]
ref.deep = 2
'''


def test_lines_of_a_document() -> None:
    found = positions(DOCUMENT)
    assert set(found) == paths(tomllib.loads(DOCUMENT))
    lines = DOCUMENT.splitlines()
    for path, line in found.items():
        key = path[-1]
        if isinstance(key, str):
            assert key in lines[line - 1]
    assert found["weights", 1] == 4
    assert found["outputs", "merged", "rest"] == 13
    assert found["adapters", 0, "meta", "quoted.key", "y", 0, "z"] == 18
    assert found["adapters", 1, "ref", "deep"] == 20


def test_the_nearest_line_stands_for_what_has_none() -> None:
    found = positions(DOCUMENT)
    assert line_of(found, ("outputs", "merged", "missing")) == 7
    assert line_of(found, ("nothing",)) == 1


@pytest.mark.parametrize("text", ["", "\n\n", "# only this", "a = 1", "a = 1\r\nb = 2\r\n"])
def test_short_documents(text: str) -> None:
    assert set(positions(text)) == paths(tomllib.loads(text))


KEYS = st.from_regex(r"[A-Za-z0-9_-]{1,6}", fullmatch=True) | st.text("ab .\"'#[]=\\é", max_size=5)
SCALARS = st.integers(-5, 5) | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3))


@settings(suppress_health_check=list(HealthCheck))
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_every_path_that_tomllib_sees_has_a_line(document: dict[str, Any]) -> None:
    import tomlkit

    text = tomlkit.dumps(document)
    found = positions(text)
    assert set(found) == paths(tomllib.loads(text))
    lines = text.replace("\r\n", "\n").split("\n")
    for path, line in found.items():
        if isinstance(path[-1], str) and re.fullmatch(r"[\w-]+", path[-1], re.ASCII):
            assert path[-1] in lines[line - 1]
