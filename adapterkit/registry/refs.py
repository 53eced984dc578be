"""Aliases: names such as ``prod`` that point to a version and can be moved, in one step and with history.

Each move is one line of JSON with its own ``sum`` and the sum of the line before it (``prev``). The line is first
appended to the history and then, as a file of its own, renamed over the ref: a ref is always a copy of a line of its
history. A line behind it belongs to a move that was killed; the next move cuts it off, since nobody ever saw it.

A move also says who made it and why, which conditions held, and (of a rollback) which move it took back. So an alias and
the record of its move cannot come apart: they are one line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from adapterkit import disk
from adapterkit.errors import CheckFailed, NotFound, RegistryError, UsageError, counted
from adapterkit.registry.canonical import canonical, parse, sha256
from adapterkit.registry.home import Home, read_file
from adapterkit.registry.names import check_alias, check_time
from adapterkit.registry.record import now

ANY: Final = -1
"""``expected`` of a move that takes whatever the alias points to now."""
_LINE = 1 << 16  # bytes that a line may have
_TAIL = 2 * _LINE + 4096
_REASON = 1000  # characters of a reason

Gate = Callable[["Move | None"], Sequence[str]]
"""Decides whether an alias may move, from where it is now; gives the conditions that held, or raises `CheckFailed`."""


@dataclass(frozen=True)
class Move:
    """One move of an alias. ``version`` 0 (and no digest) means that it was taken off.

    Attributes:
        by, why: who moved it and the reason given; empty in moves that say nothing of it.
        held: the conditions that were asked for and held, as sentences.
        undoes: the ``seq`` of the move that this one took back; 0 for a move of its own.
    """

    name: str
    alias: str
    seq: int
    version: int
    digest: str
    at: str
    prev: str
    by: str = ""
    why: str = ""
    held: tuple[str, ...] = ()
    undoes: int = 0

    @property
    def _plain(self) -> dict[str, object]:
        said: dict[str, object] = {"by": self.by, "why": self.why, "held": list(self.held), "undoes": self.undoes}
        return {
            **{key: value for key, value in said.items() if value},
            "name": self.name,
            "alias": self.alias,
            "seq": self.seq,
            "version": self.version,
            "digest": self.digest,
            "at": self.at,
            "prev": self.prev,
        }

    @property
    def sum(self) -> str:
        """sha256 of the move, that the next one names as ``prev``."""
        return sha256(canonical(self._plain))

    @property
    def line(self) -> bytes:
        """The move as it stands in the ref and in the history."""
        return canonical({**self._plain, "sum": self.sum}) + b"\n"


@dataclass(frozen=True)
class Tagged:
    """Where an alias is now; ``before`` is the version it was at (0: none), ``moved`` False when it did not move.

    ``held`` are the conditions that were asked for, as sentences.
    """

    name: str
    alias: str
    version: int
    digest: str
    before: int
    moved: bool
    held: tuple[str, ...] = ()


def read_move(line: bytes, name: str, alias: str, where: str) -> Move:
    """One line of a ref or history.

    Raises:
        RegistryError: it is damaged or belongs to another alias.
    """
    value = parse(line, where)
    try:
        said: dict[str, Any] = {key: item for key, item in value.items() if key != "sum"}
        if "held" in said:
            said["held"] = _held(said["held"])
        move = Move(**said)
        good = move.line == line and (move.name, move.alias) == (name, alias) and type(move.version) is int
        check_time(move.at, where)
    except (TypeError, AttributeError, ValueError):
        good = False
    if not good:
        raise RegistryError(f"{where} is damaged: a line of {name}@{alias} does not have the sum it states", "run fsck")
    return move


def _held(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("not a list of sentences")
    return tuple(value)


def get(home: Home, name: str, alias: str) -> Move | None:
    """Where an alias points, or None when it points nowhere (also after ``untag``).

    Raises:
        RegistryError: the ref is damaged.
    """
    move = _current(home, name, alias)
    return move if move and move.version else None


def history(home: Home, name: str, alias: str) -> tuple[Move, ...]:
    """All moves that took effect, oldest first.

    Raises:
        RegistryError: the history or the ref is damaged.
    """
    current = _current(home, name, alias)
    found: list[Move] = []
    path = home.history(name, alias)
    for line in (read_file(path) if path.exists() else b"").splitlines(keepends=True):
        if current is None or (found and found[-1].sum == current.sum):
            break  # The rest is a move that never took effect.
        found.append(read_move(line, name, alias, str(path)))
    return tuple(found)


def standing(moves: Sequence[Move]) -> list[Move]:
    """The moves that count, oldest first: without those that a rollback took back. The last one is where the alias is;
    the one before it is where a rollback goes.

    Args:
        moves: the whole history, oldest first.
    """
    found: list[Move] = []
    for step in moves:
        if step.undoes:
            found = found[:-1]
            continue
        if found and not found[-1].version:  # it was taken off and is set again
            found.pop()
            if found and (found[-1].version, found[-1].digest) == (step.version, step.digest):
                found.pop()  # where it was before: going back from there leads further back
        found.append(step)
    return found


def move(
    home: Home,
    name: str,
    alias: str,
    version: int,
    digest: str,
    expected: int = ANY,
    *,
    by: str = "",
    why: str = "",
    undoes: int = 0,
    after: int = 0,
    gate: Gate | None = None,
) -> Tagged:
    """Points an alias to a version, or to nothing (version 0).

    ``expected`` is the version it must be at now (0: it must not exist); two writers that both expect the old one
    cannot both win.

    Args:
        by, why: who moves it, and the reason; kept with the move.
        undoes: the move that this one takes back.
        after: the ``seq`` of the move that has to be the last one: an alias that left and came back is at the expected
            version, and its history is another one. 0 asks nothing.
        gate: asked under the alias's lock, so what it saw of the alias is still so when the alias moves.

    Raises:
        CheckFailed: it is somewhere else than expected, or moved after the move that should be the last; or the gate refuses.
        RegistryError: its ref or history is damaged.
        UsageError: the reason is too long, or holds what does not print.
    """
    check_alias(alias)
    check_said(why, "the reason")
    check_said(by, "who moves it")
    with disk.writing(f"the alias {name}@{alias}", home.root), home.lock(name):
        current = _current(home, name, alias)
        before = current.version if current else 0
        if expected not in (ANY, before):
            raise CheckFailed(
                f"{name}@{alias} is at {_spell(before)}, not at {_spell(expected)}",
                "somebody moved it; look at its history",
            )
        if after and (current is None or current.seq != after):
            raise CheckFailed(f"{name}@{alias} was moved meanwhile", "look at its history, then run again")
        held = tuple(gate(current if before else None)) if gate is not None else ()
        if before == version and (not current or current.digest == digest):
            return Tagged(name, alias, version, digest, before, False, held)
        seq, prev = (current.seq + 1, current.sum) if current else (1, "")
        step = Move(name, alias, seq, version, digest, now(), prev, by, why, held, undoes)
        if len(step.line) > _LINE:  # so many conditions that their sentences do not fit: their number is kept
            step = replace(step, held=(f"{counted(len(held), 'condition')}",))
        for folder in (home.refs(name), home.history(name, alias).parent):
            disk.make_folder(folder)
        with disk.staged(home.staging, step.line) as temporary:
            _append(home, current, step)
            disk.publish_over(temporary, home.ref(name, alias))
        return Tagged(name, alias, version, digest, before, True, held)


def check_said(text: str, what: str) -> str:
    """``text``, when it is one printable line of a bounded length.

    Raises:
        UsageError: it is not.
    """
    if len(text) > _REASON or not (text.isprintable() or not text):
        raise UsageError(f"{what} is not one printable line of at most {_REASON} characters", "say it shorter")
    return text


def _spell(version: int) -> str:
    return f"version {version}" if version else "no version"


def _current(home: Home, name: str, alias: str) -> Move | None:
    path = home.ref(name, alias)
    try:
        return read_move(read_file(path), name, alias, str(path))
    except FileNotFoundError:
        return None


def _append(home: Home, current: Move | None, step: Move) -> None:
    """Writes the line behind that of the current ref; what is there instead can only be one unfinished move."""
    path = home.history(step.name, step.alias)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | disk.calls.flags("CLOEXEC", "NOFOLLOW", "BINARY"), 0o644)
    try:
        size = os.fstat(fd).st_size
        start = max(0, size - _TAIL)
        tail = disk.calls.pread(fd, _TAIL, start)
        found = tail.rfind(current.line) if current else 0
        end = found + len(current.line) if current else 0
        if found < 0 or start + end > size or tail[end:].count(b"\n") > 1 or (not current and start):
            raise RegistryError(
                f"{path} does not end with where {step.name}@{step.alias} is", "run adapterkit fsck --repair"
            )
        os.ftruncate(fd, start + end)
        os.lseek(fd, start + end, os.SEEK_SET)
        disk.write_all(fd, step.line)
        disk.fsync(fd)
    finally:
        os.close(fd)


def require(found: Move | None, name: str, alias: str) -> Move:
    """
    Raises:
        NotFound: the alias points nowhere.
    """
    if found is None:
        raise NotFound(f"{name} has no alias '{alias}'", "show lists its aliases")
    return found
