"""Let the disk fail at every call of every verb that writes, or kill the run there, and count what is left.

    python -m bench proofs faults [--only VERB] [--codes EIO,KILL] [--json FILE]
    python -m bench proofs faults --rows FOLDER        # add up what several runs wrote with --json

Each run works in a forked child on tiny inputs. At the n-th ``pwrite``, ``write``, ``fsync``, ``rename``, ``link`` or
``mkdir`` the call fails with EIO, ENOSPC or EDQUOT, is interrupted (EINTR, which Python repeats by itself when the system
says so; here it is raised, so it counts as a failure), or the process gets SIGKILL. Then: the target is absent or has the
right bytes; a run that was not killed left nothing beside it and ended with an error of ours; and the next run gives the
right bytes and leaves nothing either.

A verb that writes to the Hub or to a store makes few of these calls, and a request that fails for it (``connect``, ``send``)
has the same four causes.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import socket
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from adapterkit.disk import calls as system
from adapterkit.errors import AdapterkitError
from bench.common import results
from bench.proofs._writers import NAMES, Writer, writers

CODES = ("EIO", "ENOSPC", "EDQUOT", "EINTR", "KILL")
CALLS = ("pwrite", "write", "fsync", "rename", "replace", "rename_new", "link", "mkdir")
SENT = ("send", "connect")
MOST = 400  # of one call
KEYS = ("faults", "kills", "refused", "done", "wrong")


def child(work: Callable[[], object], call: str, code: str, nth: int) -> int:
    """0: done; 1: an error of ours; 2: the call does not happen so often; 3: another error; -9: killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        end = 3
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 2)
            end = _inject(work, call, code, nth)
        finally:
            os._exit(end)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _inject(work: Callable[[], object], call: str, code: str, nth: int) -> int:
    seen = 0

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def fails(*args: Any, **more: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == nth:
                if code == "KILL":
                    os.kill(os.getpid(), 9)
                number = getattr(errno, code)
                raise OSError(number, os.strerror(number))
            return real(*args, **more)

        return fails

    if call in SENT:
        names = ("send", "sendall") if call == "send" else ("connect",)
        plain = socket.socket
        made = {name: failing(getattr(plain, name)) for name in names}
        setattr(socket, "socket", type("Failing", (plain,), made))  # noqa: B010
    elif call:
        where: Any = system if call == "rename_new" else os
        setattr(where, call, failing(getattr(where, call)))
    try:
        work()
    except AdapterkitError:
        return 1
    except BaseException:
        return 3
    return 0 if seen >= nth else 2


def undisturbed(work: Callable[[], object]) -> int:
    """The end of a run that nothing happens to."""
    return child(work, "", "", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=NAMES)
    parser.add_argument("--codes", type=lambda text: text.split(","), default=CODES, help="causes, divided by commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=Path, help="a folder with what runs wrote with --json: nothing is run")
    given = parser.parse_args()
    if strange := set(given.codes) - set(CODES):
        parser.error(f"no such cause: {', '.join(sorted(strange))}")
    torch.set_num_threads(1)
    rows: dict[str, dict[str, int]] = {}
    wrong: list[str] = []
    results.head("Verb", "Faults", "Kills", "Ended with a sentence", "Done all the same", "Wrong")
    if given.rows is not None:
        rows = added(sorted(given.rows.glob("*.json")))
        for name, row in rows.items():
            _show(name, row)
    else:
        with tempfile.TemporaryDirectory() as made, writers(Path(made), given.only) as todo:
            for name, writer in todo.items():
                row = rows[name] = run(name, writer, wrong, given.codes)
                _show(name, row)
    total = {key: sum(row[key] for row in rows.values()) for key in KEYS}
    _show("all", total)
    for line in wrong:
        print("WRONG", line)
    results.note(faults=total["faults"], kills=total["kills"], wrong=total["wrong"])
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")
    raise SystemExit(1 if any(row["wrong"] for row in rows.values()) else 0)


def added(files: Sequence[Path]) -> dict[str, dict[str, int]]:
    """What several runs counted, in the order of the verbs."""
    found = {name: dict.fromkeys(KEYS, 0) for name in NAMES}
    for file in files:
        for name, row in json.loads(file.read_text()).items():
            for key in KEYS:
                found[name][key] += row[key]
    return {name: row for name, row in found.items() if row["faults"] or row["kills"]}


def _show(name: str, row: dict[str, int]) -> None:
    results.row(name, *(f"{row[key]:,}" for key in KEYS))


def run(name: str, writer: Writer, wrong: list[str], codes: Sequence[str] = CODES) -> dict[str, int]:
    row = dict.fromkeys(KEYS, 0)
    writer.warm()
    writer.start()
    if undisturbed(writer.run):
        raise SystemExit(f"{name}: an undisturbed run failed")
    right, beside = writer.state(), writer.beside()
    for call in (*CALLS, *(SENT if name in ("push", "merge in a store") else ())):
        for code in codes:
            for nth in range(1, MOST):
                writer.start()
                before = writer.beside()
                ended = child(writer.run, call, code, nth)
                if ended == 2:
                    break
                row["kills" if code == "KILL" else "faults"] += 1
                row["refused"] += ended == 1
                row["done"] += ended == 0
                bad = []
                if ended == 3:
                    bad.append("ended with an error of Python")
                if code != "KILL" and (left := set(writer.beside()) - set(beside) - set(before)):
                    bad.append(f"left {sorted(left)}")
                writer.mend()  # between two renames of a replacement the next look puts it right
                if (found := writer.state()) not in (None, right):
                    bad.append(f"target is {found}")
                if ended == 0 and found != right:
                    bad.append("done, and not there")
                if found is not None:
                    writer.take_away()
                if end := undisturbed(writer.again):
                    bad.append(f"the next run ended {end}")
                if writer.state() != right or writer.beside() != beside:
                    bad.append(f"after the next: right {writer.state() == right}, there {writer.beside()}")
                if bad:
                    row["wrong"] += 1
                    wrong.append(f"{name}: {code} at {call} {nth}: {'; '.join(bad)}")
    return row


if __name__ == "__main__":
    main()
