"""``docs/quantized.md`` lists what the table of codecs says, and every format has its tests."""

from __future__ import annotations

import runpy
from pathlib import Path

from adapterkit.codecs.kinds import nested, written
from adapterkit.codecs.table import CODECS, KINDS
from adapterkit.dtypes import BF16
from adapterkit.requests.formats import formats

ROOT = Path(__file__).resolve().parents[2]


def test_the_words_are_those_of_the_codecs() -> None:
    """They are listed where the help reads them, and each is a way of writing that a codec has."""
    assert set(written()) == set(KINDS)
    for name in written():
        encoder = KINDS[name].encoder
        plain, double = (encoder("model.layers.0.mlp.up_proj.weight", (256, 256), BF16, nest) for nest in (False, True))
        assert plain is not None, name
        others = double is not None and [spec.name for spec in double.made] != [spec.name for spec in plain.made]
        assert others == (name in nested()), name


def test_the_page_is_up_to_date() -> None:
    tool = runpy.run_path(str(ROOT / "tools/formats_page.py"))
    page = (ROOT / "docs/quantized.md").read_text(encoding="utf-8")
    assert tool["page"]() == page, "run `python tools/formats_page.py --write`"
    for codec in CODECS:
        assert f"| {codec.name} |" in page
        assert (ROOT / "tests/codecs" / codec.test.partition(":")[0]).is_file()
        assert set(codec.writes) <= set(formats())
