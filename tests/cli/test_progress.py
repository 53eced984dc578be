"""The progress bar: what it says on a terminal and elsewhere, and that nothing is written behind it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from models import plain_adapter, plain_base

from adapterkit.cli.output import Progress, fail, note


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("adapterkit.cli.output.time.monotonic", lambda: now[0])
    return now


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


def test_the_time_left_is_told_by_the_pace_alone(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Start-up moves no bytes and says nothing about how long they will take."""
    on_terminal(monkeypatch)
    bar = Progress("merging")
    clock[0] += 5
    bar(0, 4_000_000)
    assert capsys.readouterr().err == "\r" + "." * 24 + " merging 0 B of 4.00 MB,   0%\x1b[K"
    bar(1_000_000, 4_000_000)
    clock[0] += 2
    bar(2_000_000, 4_000_000)
    assert "merging 2.00 MB of 4.00 MB,  50%, 4 s left" in capsys.readouterr().err


def test_a_line_now_and_then_where_there_is_no_terminal(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    line = Progress("merging")
    for second in range(65):
        line(second * 1000, 100_000)
        clock[0] += 1
    said = capsys.readouterr().err.splitlines()
    assert [text.partition(",")[0] for text in said] == [
        "merging 30.00 kB of 100.00 kB",
        "merging 60.00 kB of 100.00 kB",
    ]


def test_quiet_when_asked(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    line = Progress("merging", enabled=False)
    clock[0] += 1000
    line(1, 2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("what", ["note", "error", "close"])
def test_what_comes_after_a_bar_has_a_line_of_its_own(
    what: str, clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_terminal(monkeypatch)
    bar = Progress("merging")
    clock[0] += 1
    bar(1, 2)
    capsys.readouterr()
    if what == "close":
        bar.close()
        assert capsys.readouterr().err == "\r\x1b[K"
    else:
        note("hello") if what == "note" else fail([], 1, "x", "hello", "")
        assert capsys.readouterr().err in ("\r\x1b[Khello\n", "\r\x1b[Kerror: hello\n")
    note("again")
    assert capsys.readouterr().err == "again\n"


def test_on_a_real_terminal(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    ours, theirs = pty.openpty()
    # A clock that runs a second at each look, so that the bar is drawn however fast the merge is.
    code = (
        "import itertools, sys; from adapterkit.cli import main, output; clock = itertools.count(); "
        "output.time = type('Clock', (), {'monotonic': staticmethod(lambda: float(next(clock)))}); main(sys.argv[1:])"
    )
    adapter = plain_adapter(tmp_path / "a", base)
    command = [sys.executable, "-c", code, "merge", base, adapter, "-o", tmp_path / "o"]
    shown = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        try:
            while chunk := os.read(ours, 65536):
                shown += chunk
        except OSError:  # how Linux says that the other end is closed
            pass
        said = process.communicate(timeout=900)[0]
    os.close(ours)
    assert process.returncode == 0
    assert "tensors changed" in said
    assert b"merging" in shown
    assert b"100%" in shown
    assert shown.endswith(b"\r\x1b[K")  # and the line is left clean
