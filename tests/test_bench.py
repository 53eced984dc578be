"""The scripts of bench/: one runner that finds them all, and stored results that the pages show."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import KINDS, scripts

ROOT = Path(__file__).resolve().parents[1]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


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
