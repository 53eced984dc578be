"""Writers that add evidence, move aliases past a policy and take moves back, killed at random: nothing is lost.

    python -m bench proofs gates_kill                          # 20 writers, until 500 were killed
    python -m bench proofs gates_kill --writers 20 --kills 500 --each 40

Every call that returned is written to a file before the next begins. Afterwards each acknowledged figure stands in the
evidence of its version, every acknowledged move is in the history of its alias, each alias is where the last line of its
history says, no alias ever moved to a version whose figure was too low, and fsck finds nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import tempfile
import time
import traceback
from pathlib import Path

from adapterkit.errors import CheckFailed, NotFound
from adapterkit.registry import evaluation, fsck, policies, refs, resolve, served, store, verbs
from adapterkit.registry.evaluation import Score
from adapterkit.registry.evidence import attach_evaluation
from adapterkit.registry.gathered import gathered
from adapterkit.registry.home import Home
from adapterkit.registry.identity import Identity
from adapterkit.registry.record import Record
from bench.common import results

NAME, ALIAS, LIMIT = "model", "prod", 0.5
VERSIONS = 6


def value_of(writer: int, step: int, version: int) -> float:
    """The figure that a writer adds in a step, decided by the three numbers alone; odd versions pass the policy."""
    return 0.9 - 0.001 * (writer + step) if version % 2 else 0.1


def writer(root: Path, number: int, count: int, seed: int, acks: Path) -> None:
    """Adds evidence, moves the alias, tells what is served and sometimes rolls back, until ``count`` steps are done."""
    rng = random.Random(seed)
    fd = os.open(acks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def done(*words: object) -> None:
        os.write(fd, (" ".join(map(str, words)) + "\n").encode())

    me = os.getpid()  # a step that was killed is done again, and may move the alias again
    for step in range(steps_in(acks), count):
        version = rng.randrange(1, VERSIONS + 1)
        task = f"task-{number}-{step}"
        measured = [
            Score(task, "f1", value_of(number, step, version)),
            Score("gate", "acc", value_of(0, 0, version)),
        ]
        attach_evaluation(f"{NAME}@{version}", measured, home=root)
        done("figure", version, task)
        with contextlib.suppress(CheckFailed):
            moved = verbs.tag(f"{NAME}@{version}", ALIAS, why=f"writer-{number}-{step}-{me}", home=root)
            if moved.moved:
                done("move", version, f"writer-{number}-{step}-{me}")
        if rng.random() < 0.2:
            with contextlib.suppress(CheckFailed, NotFound):  # somebody moved it meanwhile, or nothing is before it
                back = verbs.rollback(NAME, ALIAS, why=f"back-{number}-{step}-{me}", home=root)
                done("move", back.version, f"back-{number}-{step}-{me}")
        record = verbs.show(f"{NAME}@{version}", home=root).record
        served.record_serving(f"server-{number}", record, served_as=f"step-{step}", home=root)
        done("step", step)


def steps_in(acks: Path) -> int:
    """How many steps a writer was told to be done."""
    return acks.read_bytes().count(b"step ") if acks.exists() else 0


def filled(root: Path) -> Home:
    """A registry with versions of one name and a policy for its alias."""
    home = Home(root)
    home.create()
    for number in range(VERSIONS):
        with home.store_lock(shared=True):
            store.add_record(home, Record("adapter", (), identity=Identity("org/model", f"{number:040x}")), NAME)
    policies.keep_policy(NAME, ALIAS, f"gate/acc>={LIMIT}", home=root)
    return home


def run(root: Path, writers: int, each: int, kills: int, seed: int = 0, pause: float = 0.1) -> dict[str, int]:
    """Runs the writers, kills ``kills`` of them (as long as there are any), and checks what is left.

    Raises:
        AssertionError: something is lost or is where it must not be.
    """
    home = filled(root)
    rng = random.Random(seed)
    acks = {number: root.parent / f"{root.name}.acks-{number}" for number in range(writers)}
    running: dict[int, int] = {}
    todo = list(range(writers))
    killed = 0
    while todo or running:
        while todo:
            number = todo.pop()
            child = os.fork()
            if child == 0:
                code = 3
                try:
                    writer(root, number, each, rng.randrange(1 << 30) + number, acks[number])
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            running[child] = number
        time.sleep(pause * rng.random())
        for child in list(running):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                number = running.pop(child)
                assert status == 0, f"writer {number} failed"
        if running and killed < kills:
            child = rng.choice(list(running))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            killed += os.WIFSIGNALED(status)
            number = running.pop(child)
            if steps_in(acks[number]) < each:
                todo.append(number)
    lines = [line.split() for path in acks.values() for line in path.read_text().splitlines()]
    return {"writers": writers, "killed": killed, **checked(home, lines)}


def checked(home: Home, lines: list[list[str]]) -> dict[str, int]:
    """Compares a home with what its writers were told."""
    known: dict[int, set[str]] = {}
    for version in range(1, VERSIONS + 1):
        record = resolve.find(home, f"{NAME}@{version}")
        known[version] = {one.task for one in evaluation.read(gathered(home, record))}
    added = [(int(line[1]), line[2]) for line in lines if line[0] == "figure"]
    lost = [(version, task) for version, task in added if task not in known[version]]
    assert not lost, f"figures that were acknowledged are gone: {lost[:5]}"
    moves = refs.history(home, NAME, ALIAS)
    reasons = [move.why for move in moves]
    told = [line[2] for line in lines if line[0] == "move"]
    assert set(told) <= set(reasons), f"moves that were acknowledged are gone: {sorted(set(told) - set(reasons))[:5]}"
    assert len(set(reasons)) == len(reasons), "a move is there twice"
    assert all(move.version % 2 for move in moves), "the alias moved past its policy"
    assert all(move.held or move.undoes for move in moves), "a move does not say what held"
    now = refs.get(home, NAME, ALIAS)
    assert now is None or now == moves[-1], "the alias is not where its history says"
    newest = store.load_known(home, NAME, home.versions(NAME)[-1])
    report = fsck.fsck(home=home.root)
    assert report.clean, report.problems
    return {"records": newest.version, "figures": len(added), "moves": len(moves), "acknowledged moves": len(told)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writers", type=int, default=20)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--each", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder) / "home", given.writers, given.each, given.kills, given.seed)
        for what, value in found.items():
            print(f"{what:<20} {value}")
    lost = max(0, found["acknowledged moves"] - found["moves"])
    results.note(writers=found["writers"], killed=found["killed"], moves=found["moves"], lost_moves=lost)


if __name__ == "__main__":
    main()
