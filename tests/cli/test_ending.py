"""The process ends early, and nobody can tell but by the clock."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from adapterkit.cli import app, main
from adapterkit.errors import NotFound

# A command line of its own behind the program: what is in `main` is what a verb would do. torch counts as imported.
CHILD = """
import atexit, os, sys, threading, time, types
{before}
{torch}
import adapterkit.cli.ending as ending

class Held:
    def __del__(self, write=os.write):
        write(2, b"taken apart ")

held = Held()  # Python takes it apart at its end, unless the process is left before

def main():
    {main}

ending.main = main
ending.run()
"""


TORCH = "sys.modules['torch'] = types.ModuleType('torch')"


def script(main: str, before: str = "", torch: str = TORCH) -> str:
    return CHILD.format(main="\n    ".join(main.splitlines()), before=before, torch=torch)


def started(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(("said", "code"), [("0", 0), ("", 0), ("3", 3), ("130", 130), ("True", 1), ("'words'", 1)])
def test_the_exit_code_is_the_one_that_was_said(said: str, code: int) -> None:
    done = started(script(f"sys.exit({said})"))
    assert done.returncode == code
    assert ("words" in done.stderr) == ("words" in said)
    assert ("taken apart" in done.stderr) == (said in ("True", "'words'"))  # codes that Python makes something of


def test_all_that_is_seen_of_an_end_happens_before() -> None:
    main = """
print("x" * 200_000, end="")
sys.stderr.write("told ")
atexit.register(lambda: print("registered"))
threading.Thread(target=lambda: (time.sleep(0.05), print("waited for"))).start()
sys.exit(7)
"""
    done = started(script(main))
    assert done.returncode == 7
    assert done.stdout == "x" * 200_000 + "waited for\nregistered\n"
    assert done.stderr == "told "


@pytest.mark.parametrize(
    ("before", "torch"),
    [
        ("atexit.register(lambda: sys.stderr.write('theirs '))", TORCH),
        ("sys.setprofile(lambda *told: None)", TORCH),
        ("sys.settrace(lambda *told: None)", TORCH),
        ("", ""),  # a small interpreter ends quickly by itself
    ],
)
def test_python_ends_as_always_where_somebody_waits_for_it(before: str, torch: str) -> None:
    done = started(script("sys.exit(3)", before, torch))
    assert done.returncode == 3
    assert "taken apart" in done.stderr
    assert ("theirs" in done.stderr) == ("theirs" in before)


def test_a_caller_goes_on_afterwards() -> None:
    call = "def call():\n    try: ending.run()\n    except SystemExit: print('goes on')\ncall()"
    done = started(script("sys.exit(3)").replace("ending.run()", call))
    assert (done.returncode, done.stdout) == (0, "goes on\n")


def test_an_error_is_told_by_python() -> None:
    done = started(script("raise ValueError('unforeseen')"))
    assert done.returncode == 1
    assert "ValueError: unforeseen" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="a pipe whose reader is gone")
def test_a_reader_that_is_gone_is_told_of_as_always() -> None:
    ends = []
    for before in ("", "atexit.register(print)"):  # once early, once as Python ends
        read, write = os.pipe()
        os.close(read)
        code = script("sys.stdout.write('x')\nsys.exit(0)", before)
        done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
        os.close(write)
        ends.append((done.returncode, "BrokenPipeError" in done.stderr))
    assert ends[0] == ends[1]
    assert ends[0][0] != 0


@pytest.mark.skipif(os.name != "posix", reason="a pipe whose reader is gone")
@pytest.mark.parametrize("more", [(), ("-u",)])
def test_a_verb_whose_reader_is_gone_did_not_do_what_was_asked(more: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    code = (
        "import click; from adapterkit import cli\n"
        "cli.Verbs.get_command = lambda *_: click.Command('list', callback=lambda: click.echo('found'))\n"
        "cli.main(['list'])"
    )
    done = subprocess.run([sys.executable, *more, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_another_pipe_that_breaks_is_an_error_with_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def verb() -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("adapterkit.cli.Verbs.get_command", lambda *_: verb)
    with pytest.raises(SystemExit) as ended:
        main(["list"])
    assert ended.value.code == 1
    assert "Broken pipe" in capsys.readouterr().err


def test_the_program_is_the_command_and_the_module() -> None:
    for words in (["-m", "adapterkit"], ["-c", "from adapterkit.cli.ending import run; run()"]):
        done = subprocess.run([sys.executable, *words, "--version"], capture_output=True, text=True)
        assert done.returncode == 0
        assert done.stdout.startswith("adapterkit")


@pytest.mark.parametrize(("flag", "mapped"), [((), 1), (("--dry-run",), 0), (("--on", "local"), 0)])
def test_torch_s_library_is_on_its_way_where_something_is_computed_here(
    flag: tuple[str, ...], mapped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[None] = []
    monkeypatch.setattr("adapterkit.ops.early.map_torch", lambda: asked.append(None))
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "none"), str(tmp_path / "none"), "-o", "x", *flag])
    assert isinstance(done.exception, NotFound)
    assert len(asked) == mapped


@pytest.mark.parametrize(("more", "mapped"), [(("x.gguf",), 0), (("x", "--to", "hf"), 1)])
def test_torch_s_library_stays_away_from_gguf_to_gguf(
    more: tuple[str, ...], mapped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[None] = []
    monkeypatch.setattr("adapterkit.ops.early.map_torch", lambda: asked.append(None))
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "none.gguf"), "-o", *more])
    assert isinstance(done.exception, NotFound)
    assert len(asked) == mapped
