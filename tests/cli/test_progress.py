"""The progress bar: what it says on a terminal and elsewhere, and that nothing is written behind it."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from models import plain_adapter, plain_base

from adapterkit.cli import main
from adapterkit.cli.output import Progress, fail, note
from adapterkit.errors import tell


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


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (80, "############............ merging 50.00 MB of 100.00 MB,  50%, 2 s left"),
        (60, "######....... merging 50.00 MB of 100.00 MB,  50%, 2 s left"),
        (50, "merging 50.00 MB of 100.00 MB,  50%, 2 s left"),
        (40, "########........ merging  50%, 2 s left"),
        (20, "merging  50%"),
        (10, "merging  "),
    ],
)
def test_a_bar_fits_into_one_line(
    columns: int, shown: str, clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", str(columns))
    bar = Progress("merging")
    bar(0, 100_000_000)
    bar(1, 100_000_000)
    clock[0] += 2
    bar(50_000_000, 100_000_000)
    drawn = capsys.readouterr().err.split("\r")[-1].removesuffix("\x1b[K")
    assert drawn == shown
    assert len(drawn) < columns
    bar.close()


@pytest.mark.parametrize("columns", [40, 120])
def test_on_a_real_terminal(tmp_path: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line of it is wider than the terminal: it would wrap, and stay."""
    monkeypatch.delenv("COLUMNS", raising=False)
    base = plain_base(tmp_path / "base")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
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
    drawn = [line.removesuffix("\x1b[K") for line in shown.decode().split("\r") if "merging" in line]
    assert max(map(len, drawn)) < columns
    assert shown.endswith(b"\r\x1b[K")  # and the line is left clean


def test_what_is_said_meanwhile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a line of its own on stderr; by Python nobody hears it."""
    tell("nobody is there")
    monkeypatch.setattr("adapterkit.cli._run", lambda given: tell("Compiling\x1b[2J"))
    main(["merge"])
    assert capsys.readouterr() == ("", "Compiling\\x1b[2J\n")


@pytest.mark.parametrize("kept", [True, False])
def test_encoders_that_are_compiled_are_told_of_once(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """numba's own event, as it is when its cache holds no machine code; of other functions nothing is said."""
    from numba.core import event

    from adapterkit.gguf.kernels import compiled

    said: list[str] = []
    monkeypatch.setattr(compiled, "tell", said.append)
    monkeypatch.setattr(compiled.COMPILING, "said", False)
    kernel = compiled.kernel("Q8_0", False)
    monkeypatch.setitem(compiled.COMPILING.watched, id(kernel), kept)
    for dispatcher in (compiled._encode, kernel, kernel):
        with event.trigger_event("numba:compile", data={"dispatcher": dispatcher}):
            pass
    (text,) = said
    assert ("once for this environment" in text) == kept
    assert ("NUMBA_CACHE_DIR" in text) != kept
