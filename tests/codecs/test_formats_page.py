"""``docs/quantized.md`` lists what the table of codecs says, and every format has its tests."""

from __future__ import annotations

import runpy
from pathlib import Path

from adapterkit.codecs.table import CODECS
from adapterkit.requests.formats import FORMATS

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_up_to_date() -> None:
    tool = runpy.run_path(str(ROOT / "tools/formats_page.py"))
    page = (ROOT / "docs/quantized.md").read_text(encoding="utf-8")
    assert tool["page"]() == page, "run `python tools/formats_page.py --write`"
    for codec in CODECS:
        assert f"| {codec.name} |" in page
        assert (ROOT / "tests/codecs" / codec.test.partition(":")[0]).is_file()
        assert set(codec.writes) <= set(FORMATS)
