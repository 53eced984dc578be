"""The scripts of bench/: one runner that finds them all, and stored results that the pages show."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import KINDS, scripts
from bench.common import results
from tools import figures

ROOT = Path(__file__).resolve().parents[1]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


def test_every_script_is_listed_with_what_it_does() -> None:
    listed = {kind: scripts(kind) for kind in KINDS}
    assert {(kind, name) for kind in KINDS for name in listed[kind]} >= {
        ("speed", "merge"),
        ("proofs", "sweep"),
        ("studies", "joint"),
    }
    helpers = {"converter_differs", "converter_zoo"}
    for kind, found in listed.items():
        files = {path.stem for path in (ROOT / "bench" / kind).glob("*.py") if not path.name.startswith("_")}
        assert files - helpers == set(found)
        assert all(found.values())
    shown = run()
    assert shown.returncode == 0
    assert all(name in shown.stdout for found in listed.values() for name in found)


@pytest.mark.parametrize("words", [("speed", "nothing"), ("nothing",), ("proofs",)])
def test_what_is_not_there_exits_with_2(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert "usage" in done.stdout


def test_a_script_gets_its_arguments() -> None:
    done = run("proofs", "gguf_headers", "20", "1")
    assert done.returncode == 0, done.stderr
    assert "20" in done.stdout


def test_the_pages_show_the_stored_results() -> None:
    """No figure in README and docs is typed: `python tools/figures.py` puts them there."""
    shown = [page for page in figures.pages() if figures.filled(page.read_text()) != page.read_text()]
    assert shown == []
    used = {match[2] for page in figures.pages() for match in figures.FIGURE.finditer(page.read_text())}
    used |= {match[2] for page in figures.pages() for match in figures.TABLE.finditer(page.read_text())}
    assert used == set(results.names())  # and none is stored for nothing


# Numbers that say what is allowed, and not what was measured.
LIMITS = ("whose error is at most 1.6 times (squared) that of our own",)
TIMED = re.compile(r"\d[\d.,]* (?:s|ms|seconds|milliseconds|minutes|hours|times)\b|\d[\d.,]* M?(?:tokens|weights)/s")


def typed(text: str) -> list[str]:
    """Times and ratios of a page that no stored result gives; what a transcript shows is what a command printed."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for known in (figures.TABLE, figures.FIGURE):
        text = known.sub("", text)
    for limit in LIMITS:
        text = text.replace(limit, "")
    return TIMED.findall(text)


def test_no_time_and_no_ratio_is_typed() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert {page.name: typed(page.read_text()) for page in pages if typed(page.read_text())} == {}
    assert typed("It takes 0.3 s, and 1.6 to 30 times as long.") == ["0.3 s", "30 times"]
    assert typed("It takes <!--nf4.pages_s-->0.3<!--/--> s.") == []


def test_a_text_of_a_table_may_name_figures() -> None:
    table = {"heads": ["a", "b"], "formats": ["{}", "{}"], "rows": [["`x` of {n:,}", "{ms} ms"], ["{{}}", None]]}
    assert results.shown(table, {"n": 1000, "ms": 7}).splitlines()[2:] == ["| `x` of 1,000 | 7 ms |", "| {} | |"]
    stored = results.parsed("| a | b |\n|---|---|\n| `{x}` | 1 |\n")
    assert results.shown(stored).splitlines()[2] == "| `{x}` | 1 |"


def test_a_changed_figure_is_seen() -> None:
    page = (ROOT / "README.md").read_text()
    assert figures.filled(page.replace("| adapterkit | 0.", "| adapterkit | 9.")) == page
    assert figures.filled(page.replace("-->2.9<!--/-->", "-->1.9<!--/-->")) == page


def test_a_figure_never_begins_a_line() -> None:
    """Markdown would take the comment for a block, and cut the paragraph there."""
    for page in figures.pages():
        assert re.search(r"^<!--\w", page.read_text(), re.MULTILINE) is None, page


@pytest.mark.parametrize("name", results.names())
def test_a_result_says_what_was_measured_where_and_when(name: str) -> None:
    stored = results.read(name)
    if stored["script"].startswith("tools/"):
        assert (ROOT / stored["script"]).is_file()
        assert stored["command"].startswith(f"python {stored['script']}")
    else:
        kind, script = stored["script"].split()
        assert script in scripts(kind)
        assert stored["command"].startswith(f"python -m bench {kind} {script}")
    assert set(stored["measured"]) >= {"date", "commit", "version", "machine"}
    assert stored["figures"] or stored["tables"]


def test_what_a_script_prints_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    table = "| | seconds | share | error |\n|---|---|---|---|\n| ours | 0.74 | 98.5% | 1.2e-04 |\n| theirs | 10.00 | 3.0% | |\n"
    monkeypatch.setattr(results, "where", lambda: {"date": "today"})
    results.save("toy", "speed toy", "python -m bench speed toy", f"before\n{table}after\n")
    stored = results.read("toy")
    assert stored["tables"]["main"]["rows"] == [["ours", 0.74, 0.985, 1.2e-4], ["theirs", 10.0, 0.03, None]]
    assert results.shown(stored["tables"]["main"]) + "\n" == table
    assert stored["printed"][0] == "before"
