"""SECURITY.md promises what tests hold, and the pages that show figures name scripts that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def promises() -> list[tuple[str, str]]:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    table = text.partition("| Promise | Test |\n|---|---|\n")[2].partition("\n\n")[0]
    return [(cells[1].strip(), cells[2]) for cells in (row.split("|") for row in table.splitlines())]


def test_there_are_promises() -> None:
    assert len(promises()) > 10


@pytest.mark.parametrize(("promise", "tests"), promises(), ids=[promise[:40] for promise, _ in promises()])
def test_a_promise_has_its_tests(promise: str, tests: str) -> None:
    named = re.findall(r"`([^`]+)`", tests)
    assert named, promise
    for name in named:
        path = ROOT / name
        files = sorted(path.rglob("test_*.py")) if path.is_dir() else [path]
        assert files, name
        assert any("\ndef test_" in file.read_text(encoding="utf-8") for file in files), name


def test_every_test_that_the_page_of_faults_names_is_there() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    rows = page.partition("## What the first audit found")[2]
    named = set(re.findall(r"`([\w/]+\.py)`", rows)) | set(re.findall(r"`(tests/[\w/]+)`", page))
    there = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert [name for name in named if "/" not in name and name not in there] == []
    assert [name for name in named if "/" in name and not (ROOT / name).exists()] == []
    assert len(re.findall(r"^\| \d+ \|", rows, re.MULTILINE)) == 15


def test_actions_are_pinned_by_commit() -> None:
    files = [ROOT / "action.yml", *(ROOT / ".github").rglob("*.yml")]
    used = [found for file in files for found in re.findall(r"uses:\s*(\S+)", file.read_text(encoding="utf-8"))]
    assert len(used) > 5
    assert [one for one in used if not re.search(r"@[0-9a-f]{40}$", one) and not one.startswith("./")] == []
