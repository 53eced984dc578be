"""The table of stored formats in docs/quantized.md, from the table of codecs.

python tools/formats_page.py            # print it
python tools/formats_page.py --write    # put it into the page
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from adapterkit.codecs.table import CODECS

PAGE = Path(__file__).parents[1] / "docs" / "quantized.md"
START, END = "<!-- formats -->\n", "<!-- /formats -->\n"


def table() -> str:
    lines = ["| format | `quant_method` | read | written by `convert --to` | layout | held against |", "|---" * 6 + "|"]
    for codec in CODECS:
        methods = ", ".join(f"`{name}`" for name in codec.methods)
        test, _, what = codec.test.partition(": ")
        writes = ", ".join(codec.writes)
        lines.append(
            f"| {codec.name} | {methods} | {codec.what} | {writes} | {codec.source} | {what} (`tests/codecs/{test}`) |"
        )
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the table as it is now."""
    return re.sub(
        f"{START}.*?{END}", lambda _: START + table() + END, PAGE.read_text(encoding="utf-8"), flags=re.DOTALL
    )


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(table(), end="")
