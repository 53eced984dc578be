"""Long signatures have a reason, and the page about the architecture shows the code's figures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools import shape


def test_every_long_signature_has_a_reason_and_every_reason_a_signature() -> None:
    named = [name for names in shape.REASONS.values() for name in names]
    assert len(named) == len(set(named))
    found = shape.long_signatures()
    assert sorted(found.keys() - set(named)) == [], "hand on a value instead, or say why in tools/shape.py"
    assert sorted(set(named) - found.keys()) == [], "these are short now: take them out of tools/shape.py"


def test_the_page_shows_the_figures() -> None:
    page = shape.PAGE.read_text(encoding="utf-8")
    assert "<!-- /shape -->" in page
    assert shape.filled(page) == page, "run `python tools/shape.py --write`"
    assert len(shape.loose()) <= 12


def test_parameters_are_counted_without_self(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text(
        "class A:\n    def f(self, a, b, c, d, e, f): ...\n    def g(self, a, b, c, d, *, e, f, h): ...\n\n"
        "async def k(a, b, /, c, d, e, f, *rest, g, **more):\n    def inner(a, b, c, d, e, f, g): ...\n"
    )
    monkeypatch.setattr(shape, "PACKAGE", tmp_path)
    assert shape.long_signatures() == {"toy.py:A.g": 7, "toy.py:k": 7, "toy.py:k.inner": 7}
    assert re.search(r"Longest file: 6 lines \(`toy.py`\)", shape.section())
