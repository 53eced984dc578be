"""`docs/stores.md`: the tests that its table of faults names are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_fault_of_the_page_names_tests_that_are_there() -> None:
    named = re.findall(r"`((?:stores|engines)/test_\w+\.py)::(test_\w+)`", (ROOT / "docs/stores.md").read_text())
    assert len(named) > 15
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), (file, name)
