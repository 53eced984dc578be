"""Put stored results into README and docs, so that no figure there is typed.

    python tools/figures.py            # write the pages
    python tools/figures.py --check    # exit with 1 where a page shows something else than the stored results

A page has ``<!-- figures RESULT.TABLE -->`` and ``<!-- /figures -->`` around a table, and ``<!--RESULT.FIGURE-->`` and
``<!--/-->`` around a figure within a sentence; ``<!--RESULT.FIGURE:.1f-->`` says how it is written. Such a comment may not
begin a line, where Markdown takes it for a block of its own.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench.common import results  # noqa: E402

TABLE = re.compile(r"(<!-- figures ([\w-]+)\.([\w-]+) -->\n)(.*?)(<!-- /figures -->)", re.DOTALL)
FIGURE = re.compile(r"(<!--([\w-]+)\.([\w-]+)(?::([^>-]*))?-->)(.*?)(<!--/-->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with every figure as it is stored."""

    def table(match: re.Match[str]) -> str:
        stored = results.read(match[2])
        return f"{match[1]}\n{results.shown(stored['tables'][match[3]], stored['figures'])}\n\n{match[5]}"

    def figure(match: re.Match[str]) -> str:
        value = results.read(match[2])["figures"][match[3]]
        return match[1] + format(value, match[4] or "") + match[6]

    return FIGURE.sub(figure, TABLE.sub(table, text))


def pages() -> list[Path]:
    """The pages that show stored figures."""
    every = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in every if TABLE.search(text := page.read_text(encoding="utf-8")) or FIGURE.search(text)]


def main() -> int:
    wrong = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            wrong.append(page)
            if "--check" not in sys.argv:
                page.write_text(new, encoding="utf-8")
    for page in wrong:
        print(f"{page.relative_to(ROOT)}: {'differs from the stored results' if '--check' in sys.argv else 'written'}")
    return 1 if wrong and "--check" in sys.argv else 0


if __name__ == "__main__":
    raise SystemExit(main())
