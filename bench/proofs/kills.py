"""Kill every verb that writes with SIGKILL at random moments, and count what is left.

    python -m bench proofs kills [--kills 1000] [--only VERB] [--seed 0] [--json FILE]

Verbs and inputs are those of the proof ``faults``. Each run works in a forked child and is killed at a moment between its
start and a little after the time that an undisturbed one takes. Then: the target is absent or has the right bytes, the next
run gives the right bytes, and nothing is left beside it. After each kill of ``register`` in a home that is full the registry
has no problem that ``fsck`` sees, and every record that was there is there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from adapterkit.registry.fsck import fsck
from adapterkit.registry.register import register
from bench.common import results
from bench.proofs._writers import NAMES, Writer, writers

AGAIN = "register again"
KEYS = ("kills", "left something to do", "done before", "wrong")


def start(work: Callable[[], object], told: int | None = None) -> int:
    """The process of a run; ``told`` is given the error that ends it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        end = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            end = 0
        except BaseException as error:
            if told is not None:
                os.write(told, f"{type(error).__name__}: {error}"[:1000].encode())
        finally:
            os._exit(end)
    return pid


def timed(work: Callable[[], object]) -> float:
    """Seconds of an undisturbed run.

    Raises:
        RuntimeError: it failed, with what it said.
    """
    started = time.monotonic()
    read, told = os.pipe()
    with os.fdopen(read) as said:
        pid = start(work, told)
        os.close(told)
        if ended := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise RuntimeError(f"an undisturbed run ended with {ended}: {said.read()}")
    return time.monotonic() - started


def killed(work: Callable[[], object], after: float) -> bool:
    pid = start(work)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def outputs(name: str, writer: Writer, kills: int, chance: random.Random, wrong: list[str]) -> dict[str, int]:
    writer.warm()
    writer.start()
    timed(writer.run)
    right, beside = writer.state(), writer.beside()
    writer.start()
    before, took = writer.beside(), [timed(writer.run)]
    row = dict.fromkeys(KEYS, 0)
    while row["kills"] < kills:
        writer.start()
        # The machine may be busier at one time than at another: the last undisturbed runs say how long one takes.
        if not killed(writer.run, chance.uniform(0, statistics.median(took[-5:]) * 1.1)):
            continue
        row["kills"] += 1
        row["left something to do"] += writer.beside() not in (before, beside)
        writer.mend()
        bad = []
        if (found := writer.state()) not in (None, right):
            bad.append(f"target is {found}")
        if found is not None:
            row["done before"] += 1
            writer.take_away()
        try:
            took.append(timed(writer.again))
        except RuntimeError as error:
            bad.append(f"the next: {error}")
        if writer.state() != right or writer.beside() != beside:
            bad.append(f"after the next: right {writer.state() == right}, there {writer.beside()}")
        if bad:
            row["wrong"] += 1
            wrong.append(f"{name}: {'; '.join(bad)}")
    return row


def registered(adapter: Path, home: Path, kills: int, chance: random.Random, wrong: list[str]) -> dict[str, int]:
    """One home, in which every run adds a version."""
    row, number = dict.fromkeys(KEYS, 0), 0
    took = timed(lambda: register(adapter, "first", home=home))
    while row["kills"] < kills:
        number += 1
        before = {path.name for path in (home / "records").rglob("*.json")}
        work = lambda: register(adapter, "x", meta={"run": str(number)}, home=home)  # noqa: E731, B023
        if not killed(work, chance.uniform(0, took * 1.1)):
            continue
        row["kills"] += 1
        found = fsck(home=home)
        row["left something to do"] += bool(found.notes)
        there = {path.name for path in (home / "records").rglob("*.json")}
        row["done before"] += there != before
        timed(work)
        if found.problems or before - there or fsck(home=home).problems:
            row["wrong"] += 1
            wrong.append(f"{AGAIN}: {[one.sentence for one in found.problems]}, lost {before - there}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="Of all verbs together.")
    parser.add_argument("--only", action="append", choices=(*NAMES, AGAIN))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    wrong, rows = list[str](), {}
    names = given.only or [*NAMES, AGAIN]
    each = -(-given.kills // len(names))
    results.head("Verb", "Kills", "Left something to do", "Done before the kill", "Wrong")
    with tempfile.TemporaryDirectory() as made, writers(Path(made), names) as todo:
        for name in names:
            chance = random.Random(f"{given.seed} {name}")
            if name == AGAIN:
                rows[name] = registered(Path(made) / "adapter", Path(made) / "registry", each, chance, wrong)
            else:
                rows[name] = outputs(name, todo[name], each, chance, wrong)
            results.row(name, *(f"{rows[name][key]:,}" for key in KEYS))
    total = {key: sum(row[key] for row in rows.values()) for key in KEYS}
    results.row("all", *(f"{total[key]:,}" for key in KEYS))
    results.note(kills=total["kills"], wrong=total["wrong"])
    for line in wrong:
        print("WRONG", line)
    if given.json:
        given.json.write_text(json.dumps({**rows, "all": total}, indent=2) + "\n")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
