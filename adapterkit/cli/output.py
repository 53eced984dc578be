"""How results, messages, progress and errors are printed: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any

import click

from adapterkit.errors import counted
from adapterkit.errors import size as size
from adapterkit.redaction import redact

_SHOWWARNING = warnings.showwarning
_WARNED: set[str] = set()
LONGEST = 2000  # characters of a line that holds foreign text


def clean(text: str, *, lines: bool = False) -> str:
    """Text without secrets, and without what a terminal or a CI runner would take for a command.

    Control characters are escaped, and so are line breaks, unless the text is meant to have several ``lines``. A line that
    begins with ``::``, or holds ``##[``, is a command to runners of GitHub Actions; foreign text never is one.
    """
    kept = "\n\t" if lines else "\t"
    text = "".join(c if c in kept or c.isprintable() else c.encode("unicode_escape").decode() for c in redact(text))
    if "::" not in text and "##[" not in text:
        return text
    found = []
    for line in text.replace("##[", "#\\x23[").split("\n"):
        bare = line.lstrip()
        found.append(f"{line[: len(line) - len(bare)]}\\x3a{bare[1:]}" if bare.startswith("::") else line)
    return "\n".join(found)


def say(text: str = "", *, lines: bool = False) -> None:
    """A line of the result, or several."""
    click.echo(clean(text if lines else cut(text, 10_000), lines=lines))


def say_command(text: str) -> None:
    """One of our own workflow commands, whose parts are escaped already."""
    click.echo("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in redact(text)))


def note(text: str) -> None:
    """A line beside the result."""
    Progress.clear()
    click.echo(clean(cut(text)), err=True)


def others_speak_through_us() -> None:
    """Bars of other libraries are not drawn, and what they warn of is a note like ours: one line, cleaned, each once.

    Libraries read these variables when they are imported, which no verb has done yet. Whoever sets them differently, or asks
    Python for warnings (``-W``, ``PYTHONWARNINGS``), is left with that.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.warnoptions and warnings.showwarning is _SHOWWARNING:
        warnings.showwarning = _warned


def _warned(message: Warning | str, *_: object, **__: object) -> None:
    text = " ".join(str(message).split())
    if text not in _WARNED:
        _WARNED.add(text)
        note(f"warning: {text}")


def cut(text: str, most: int = LONGEST) -> str:
    """Text of a plausible length: a file may call a field by a hundred thousand characters."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def show_json(value: Any) -> None:
    """A frozen value as JSON on stdout."""
    data = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    text = redact(json.dumps(data, indent=2, ensure_ascii=False))
    # JSON escapes line breaks itself; what else a terminal would act on may stand in its strings.
    text = "".join(c if c == "\n" or c.isprintable() else _escaped(c) for c in text)
    click.echo(text.replace("##[", "#\\u0023["))


def _escaped(char: str) -> str:
    return json.dumps(char, ensure_ascii=True)[1:-1]


def fail(
    arguments: list[str], exit_code: int, code: str, message: str, hint: str, place: tuple[str, int] | None = None
) -> int:
    """Print an error the way the caller asked for, and give the exit code.

    Args:
        place: file and line that the error is about.
    """
    Progress.clear()
    message, hint = cut(message), cut(hint)
    asked = form_of(arguments)
    if asked == "github":
        from adapterkit.lint.problems import ERROR, Problem, github

        file, line = place or ("", 0)
        told = message.removeprefix(f"{file}:{line}: ")  # the annotation stands there already
        click.echo(github(Problem(ERROR, code, clean(told), clean(hint), file, line)))
    if asked == "json":
        show_json({"error": {"code": code, "message": message, "hint": hint}})
    else:
        click.echo(f"error: {clean(message)}{'; ' + clean(hint) if hint else ''}", err=True)
    return exit_code


def form_of(arguments: list[str]) -> str:
    """The output format that a command line asks for."""
    if "--json" in arguments:
        return "json"
    for number, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name == "--output-format":
            return value if equals else "".join(arguments[number + 1 : number + 2])
    return "text"


def interrupted(arguments: list[str]) -> int:
    kept = "finished work is kept for --resume" if "--resume" in arguments else "nothing was left behind"
    if "build" in arguments[:2] and "--resume" not in arguments:
        kept = "outputs that were finished stay, nothing else was left behind"
    return fail(arguments, 130, "interrupted", "interrupted", kept)


def unheard() -> bool:
    """Whether nobody reads our output any more: the other end of a pipe is closed."""
    import select

    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()  # what could not be written is written again
            number = stream.fileno()
        except BrokenPipeError:
            return True
        except (AttributeError, OSError, ValueError):
            continue  # there is none, or it is no file
        if hasattr(select, "poll"):  # Windows has none
            poll = select.poll()
            poll.register(number, 0)
            if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
                return True
    return False


def command_line() -> str:
    """The command line that is being carried out, as a shell takes it, without secrets; empty where a caller made it."""
    import shlex

    from adapterkit.redaction import redact

    context = click.get_current_context(silent=True)
    given = context.find_root().obj if context is not None else None
    return redact(shlex.join(["adapterkit", *given])) if given else ""


def count(number: int) -> str:
    return f"{number:,}"


def file_count(number: int) -> str:
    """``1 file``, ``12 files``"""
    return counted(number, "file")


def duration(seconds: float) -> str:
    """``40 s``, ``12 min``, ``3 h 05 min``"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def columns() -> int:
    """The width of the terminal that messages go to."""
    given = os.environ.get("COLUMNS", "")
    if given.isascii() and given.isdigit() and int(given):
        return int(given)
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):  # no terminal
        return 80


def _fitting(share: float, texts: list[str]) -> str:
    """A bar with the first text that fits into one line of the terminal; a bar of less than 8 is left out.

    A line that wraps would not be taken back: each next one would stand below it.
    """
    room = columns() - 1  # in the last column some terminals wrap already
    text = next((text for text in texts if len(text) <= room), texts[-1][:room])
    wide = min(24, room - len(text) - 1)
    if wide < 8:
        return text
    filled = int(wide * share)
    return f"{'#' * filled}{'.' * (wide - filled)} {text}"


class Progress:
    """A bar with bytes (or what ``form`` shows) and ETA on a terminal, a line now and then elsewhere."""

    EVERY = 30.0  # seconds between lines where there is no terminal
    PACE = 0.01  # share of the bytes that have to flow before they tell a pace
    _bar: Progress | None = None  # the one that stands on the terminal now

    def __init__(self, label: str, *, enabled: bool = True, form: Callable[[int], str] = size) -> None:
        self._label, self._enabled, self._form = label, enabled, form
        self._tty = sys.stderr.isatty()
        self._last = time.monotonic()
        self._first: tuple[float, int] | None = None  # when bytes began to flow, and how many there were already

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None and done:
            self._first = now, done
        if not self._enabled or now - self._last < (0.1 if self._tty else self.EVERY):
            return
        self._last = now
        share = done / total if total else 1.0
        text = f"{self._label} {self._form(done)} of {self._form(total)}, {share:4.0%}"
        left = self._left(now, done, total)
        if not self._tty:
            click.echo(f"{text}{left}", err=True)
            return
        Progress._bar = self
        shown = _fitting(share, [f"{text}{left}", f"{self._label} {share:4.0%}{left}", f"{self._label} {share:4.0%}"])
        click.echo(f"\r{shown}\x1b[K", err=True, nl=False)

    def _left(self, now: float, done: int, total: int) -> str:
        """How long it will still take, once there is a pace to tell it by; start-up is no part of that."""
        if self._first is None:
            return ""
        began, before = self._first
        if done - before < max(1, self.PACE * total):
            return ""
        return f", {duration((now - began) * (total - done) / (done - before))} left"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if Progress._bar is self:
            Progress.clear()

    @classmethod
    def clear(cls) -> None:
        """Take a bar off the terminal, so that what comes next has a line of its own."""
        if cls._bar is not None:
            cls._bar = None
            click.echo("\r\x1b[K", err=True, nl=False)
