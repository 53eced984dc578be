"""Commands of the documentation, taken out of its pages and run.

A fence ``sh`` is run line by line, in order, in one folder for each page; ``python`` is executed; a fence with a ``title`` is
written to that file first. What this machine cannot have (servers, pip, make) is done by stand-ins that look at what they
are given. A line whose comment says ``exits with 3`` must do so; of one that says ``needs NAME`` only the words are looked at
where that library is not installed.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_FENCE = re.compile(r"^( *)```(\w*)(.*?)\n(.*?)^\1```[ \t]*$", re.DOTALL | re.MULTILINE)
_TITLE = re.compile(r'title="([^"]+)"')
_NEEDS = re.compile(r"#.*\bneeds (\w+)")
_CODE = re.compile(r"#.*\bexits with (\d+)")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is, its text, and the line where it starts."""

    language: str
    title: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    found = []
    for match in _FENCE.finditer(page):
        indent = len(match[1])
        text = "\n".join(line[indent:] if line[:indent].isspace() else line for line in match[4].split("\n"))
        title = _TITLE.search(match[3])
        line = page.count("\n", 0, match.start()) + 2
        found.append(Block(match[2], title[1] if title else "", text, line))
    return found


def commands(block: Block) -> Iterator[tuple[int, str]]:
    """Line number and text of every command; a backslash joins a line to the next."""
    joined, start = "", block.line
    for number, line in enumerate(block.text.split("\n"), block.line):
        start = number if not joined else start
        joined += line
        if joined.endswith("\\"):
            joined = joined[:-1] + " "
            continue
        if joined.strip() and not joined.strip().startswith("#"):
            yield start, joined.strip()
        joined = ""


class Shell:
    """Runs commands in a folder: ``adapterkit`` in this process, stand-ins, and a few real programs.

    Args:
        folder: where it starts.
        page: its name, for what is said when a command fails.
        together: what adapterkit prints on both streams is kept in its order, as a terminal shows it.
    """

    def __init__(self, folder: Path, page: str, *, together: bool = False) -> None:
        self.folder, self.page, self.together = folder, page, together
        self.ran = 0

    def run(self, block: Block) -> None:
        """Run a block.

        Raises:
            AssertionError: a command failed; it says which, and what it printed.
        """
        for line, command in commands(block):
            self.output(block, line, command)

    def output(self, block: Block, line: int, command: str) -> str:
        """What one command of a block printed.

        Raises:
            AssertionError: as `run`.
        """
        wanted = _CODE.search(command)
        code, output = self._one(command)
        expected = int(wanted[1]) if wanted else 0
        assert code == expected, f"{self.page}:{line}: {command}\nexited with {code}, not {expected}:\n{output}"
        self.ran += 1
        return output

    def _one(self, command: str) -> tuple[int, str]:
        words = shlex.split(command, comments=True)
        needed = _NEEDS.search(command)
        if needed and importlib.util.find_spec(needed[1]) is None:
            return _understood(words[1:])
        target = None
        if len(words) > 2 and words[-2] in (">", ">>"):
            target, words = (words[-2], words[-1]), words[:-2]
        environment = {}
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        with _changed(environment):
            code, out, err = self._program(words)
        if target is not None:
            with open(self.folder / target[1], "a" if target[0] == ">>" else "w") as file:
                file.write(out)
        return code, out + err

    def _program(self, words: list[str]) -> tuple[int, str, str]:
        if words[0] == "cd":
            self.folder = (self.folder / words[1]).resolve()
            os.chdir(self.folder)
            return 0, "", ""
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            os.environ[name] = value
            return 0, "", ""
        if words[0] == "adapterkit":
            return _adapterkit(words[1:], together=self.together)
        if words[0] in STAND_INS:
            fault = STAND_INS[words[0]](words[1:], self.folder)
            return (1, "", fault) if fault else (0, "", "")
        assert words[0] in REAL, f"{self.page}: nobody runs {words[0]}; add a stand-in, or show it as text"
        words = [name for word in words for name in (sorted(glob.glob(word, root_dir=self.folder)) or [word])]
        program = [sys.executable, *words[1:]] if words[0] == "python" else words
        done = subprocess.run(program, cwd=self.folder, capture_output=True, text=True, timeout=900, check=False)
        return done.returncode, done.stdout, done.stderr


REAL = ("python", "ls", "cat", "cp", "mkdir", "sha256sum", "rm", "mv")


@contextlib.contextmanager
def _changed(environment: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _adapterkit(arguments: list[str], *, together: bool) -> tuple[int, str, str]:
    import signal

    from adapterkit.cli import main

    out = io.StringIO()
    err = out if together else io.StringIO()
    code: object = 0
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    finally:
        signal.signal(signal.SIGTERM, handler)
    return int(code or 0), out.getvalue(), "" if together else err.getvalue()  # type: ignore[call-overload]


def _understood(arguments: list[str]) -> tuple[int, str]:
    """Whether the command line is one, for a verb that needs a library that is not here."""
    import click

    from adapterkit.cli import app

    context = click.Context(app, info_name="adapterkit")
    command = app.get_command(context, arguments[0])
    if command is None:
        return 2, f"there is no verb {arguments[0]}"
    try:
        command.make_context(arguments[0], arguments[1:], parent=context)
    except click.ClickException as error:
        return error.exit_code, error.format_message()
    return 0, ""


# ------------------------------------------------------------------ stand-ins: they say what is wrong, or nothing


def _pip(words: list[str], folder: Path) -> str:
    data = (ROOT / "pyproject.toml").read_text()
    asked = words[1:]
    for flag in ("--index-url", "--torch-backend"):
        if flag in asked:
            if asked[asked.index(flag) + 1] not in (CPU_INDEX, "cpu"):
                return f"{flag} of something else"
            del asked[asked.index(flag) : asked.index(flag) + 2]
    for word in asked:
        name, _, extras = word.partition("[")
        if word.startswith("-") or name in ("pre-commit", "torch", "uv"):
            continue
        if name != "adapterkit":
            return f"nobody knows {name}"
        for extra in filter(None, extras.rstrip("]").split(",")):
            if not re.search(rf"^{extra} = \[", data, re.MULTILINE):
                return f"adapterkit has no extra {extra}"
    return "" if words[0] == "install" else f"pip {words[0]}"


def _uv(words: list[str], folder: Path) -> str:
    return _pip(words[1:], folder) if words[:1] == ["pip"] else "" if words[:1] == ["venv"] else f"uv {words}"


def _docker(words: list[str], folder: Path) -> str:
    """A build of our Dockerfile, or a run of a command line that adapterkit understands."""
    if words[0] == "build":
        return "" if (ROOT / "Dockerfile").is_file() else "there is no Dockerfile"
    code, said = _understood(words[words.index("adapterkit") + 1 :])
    return said if code else ""


def _make(words: list[str], folder: Path) -> str:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return "" if set(words) <= set(targets) else f"no target in {words}"


def _is_model(place: str, folder: Path) -> bool:
    return (folder / place / "config.json").is_file() or re.fullmatch(r"\w[\w.-]*/[\w.-]+", place) is not None


def _vllm(words: list[str], folder: Path) -> str:
    if words[0] != "serve" or not _is_model(words[1], folder):
        return f"no model {words[1:2]}"
    if "--lora-modules" in words:
        for word in words[words.index("--lora-modules") + 1 :]:
            if "=" not in word:
                break
            if not (folder / word.partition("=")[2] / "adapter_config.json").is_file():
                return f"no adapter {word}"
        if "--enable-lora" not in words:
            return "--enable-lora is missing"
    return ""


def _gguf(place: str, folder: Path) -> bool:
    path = folder / place
    return path.is_file() and path.read_bytes()[:4] == b"GGUF"


def _llama(words: list[str], folder: Path) -> str:
    files = [word for flag, word in itertools.pairwise(words) if flag in ("-m", "--model", "--lora")]
    wrong = [file for file in files if not _gguf(file, folder)]
    return f"no GGUF file: {wrong or words}" if wrong or not files else ""


def _ollama(words: list[str], folder: Path) -> str:
    if words[0] == "run":
        return ""
    if words[0] != "create" or words[2] != "-f":
        return f"ollama {words}"
    made = folder / words[3]
    places = re.findall(r"^(?:FROM|ADAPTER) (\S+)", made.read_text(), re.MULTILINE)
    return "" if places and all(_gguf(place, made.parent) for place in places) else f"no GGUF file among {places}"


def _git(words: list[str], folder: Path) -> str:
    missing = [word for word in words[1:] if words[0] == "add" and not (folder / word).exists()]
    return f"not there: {missing}" if missing else ""


def _nothing(words: list[str], folder: Path) -> str:
    return ""


STAND_INS: dict[str, Callable[[list[str], Path], str]] = {
    "pip": _pip,
    "uv": _uv,
    "docker": _docker,
    "make": _make,
    "vllm": _vllm,
    "ollama": _ollama,
    "git": _git,
    "pre-commit": _nothing,
    "llama-server": _llama,
    "llama-cli": _llama,
}
