"""``docs/methods.md`` is what the registrations say."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_up_to_date() -> None:
    bench = runpy.run_path(str(ROOT / "bench" / "methods.py"))
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert bench["registry_table"]() in page, "run `python bench/methods.py --write`"
    assert bench["refused_table"]() in page, "run `python bench/methods.py --write`"
    for case in bench["cases"]():
        assert f"| {case.config().peft_type.value} | {case.kind} |" in page, "run `python bench/methods.py --write`"
