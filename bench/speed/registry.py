"""The registry's speed and its safety under SIGKILL; prints tables, asserts only what must never fail.

python -m bench speed registry speed      # list, show and lineage over 10,000 records, each in a fresh Python
python -m bench speed registry register   # a 100 MB adapter: registering it against hashing and copying it
python -m bench speed registry kill       # 8 processes x 500 registrations and alias moves, killed at random
python -m bench speed registry            # all three
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from adapterkit import disk
from adapterkit.registry import fsck, listing, register, store, verbs
from adapterkit.registry.home import Home
from adapterkit.registry.identity import Identity
from adapterkit.registry.record import FileEntry, Operation, Parent, Record
from adapterkit.ui import overview
from adapterkit.ui import version as version_page
from bench.common import results

VERBS = {
    "python -c pass": "pass",
    "list": "from adapterkit.registry import listing; assert len(listing.listing().rows) >= {count}",
    "list, filtered": "from adapterkit.registry import listing; "
    "assert listing.listing(method='dora', alias='prod').rows",
    "show": "from adapterkit.registry import verbs; assert verbs.show('adapter-5@prod').record.version",
    "show by digest": "from adapterkit.registry import verbs; assert verbs.show('sha256:{digest}')",
    "lineage": "from adapterkit.registry import lineage; "
    "assert len(lineage.tree_text(lineage.lineage('chat-q4-7')).splitlines()) > 4",
    "lineage of a base with 200 children": "from adapterkit.registry import lineage; "
    "assert len(lineage.lineage('the-base').nodes) > 200",
}

PAGES = {
    "page of ui: all": lambda home: overview.page(overview.overview(overview.Query(), home.root), home),
    "page of ui: one version": lambda home: version_page.page("adapter-5", 1, home.root),
}


def fill(home: Home, count: int, names: int) -> str:
    """``count`` records under ``names`` names: bases, adapters on them, merged and quantized models; a digest."""
    home.create()
    bases = [Identity(f"org/base-{i}", hashlib.sha1(b"%d" % i).hexdigest()) for i in range(10)]
    last = ""
    made: list[Record] = []
    for number in range(count):
        which = number % names
        digest = hashlib.sha256(b"%d" % number).hexdigest()
        files = (FileEntry("model.safetensors", 10_000 + number, digest, stored=False),)
        kind = ("adapter", "adapter", "merged", "quantized")[which % 4] if number >= 4 else "adapter"
        base = bases[which % len(bases)]
        if kind == "adapter":
            name, method = f"adapter-{which}", ("lora", "dora")[which % 2]
            draft = Record(
                kind, files, method=method, parameters={"r": 16}, base=base, evidence={"fidelity": {"kl": 1e-4}}
            )
        else:
            name = f"chat-{which}" if kind == "merged" else f"chat-q4-{which}"
            parent = Parent("adapter" if kind == "merged" else "source", made[-1].content, parameters={"weight": 1.0})
            draft = Record(kind, files, operation=Operation("merge"), parents=(parent,), base=base)
        with home.store_lock(shared=True):
            record = store.add_record(home, draft, name).record
        made.append(record)
        if kind == "adapter" and number < names:
            verbs.tag(record.ref, "prod", home=home.root)
        last = record.digest
    family = Identity("org/the-base", "f" * 40)
    with home.store_lock(shared=True):
        store.add_record(home, Record("base", identity=family), "the-base")
        for number in range(200):
            files = (
                FileEntry("adapter_model.safetensors", 1, hashlib.sha256(b"child %d" % number).hexdigest(), False),
            )
            store.add_record(home, Record("adapter", files, method="lora", base=family), f"child-{number}")
    return last


def timed(code: str, root: Path, repeats: int = 7) -> tuple[float, float]:
    """The median wall and processor milliseconds of a fresh Python that runs ``code``."""
    env = {**os.environ, "ADAPTERKIT_HOME": str(root), "PYTHONPATH": str(Path(__file__).parents[2])}
    wall, cpu = [], []
    for _ in range(repeats):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, env=env)
        wall.append((time.perf_counter() - start) * 1000)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000)
    return statistics.median(wall), statistics.median(cpu)


def _shown(took: tuple[float, float]) -> str:
    return f"{took[0]:8.0f} ms {took[1]:8.0f} ms on the processor"


def speed(folder: Path, count: int) -> None:
    """The time of each reading verb, Python's own start included."""
    for names in (count // 20, count):
        home = Home(folder / f"speed-{names}")
        start = time.perf_counter()
        digest = fill(home, count, names)
        print(f"\n{count} records under {names} names (written in {time.perf_counter() - start:.1f} s)")
        start = time.perf_counter()
        listing.listing(home=home.root)
        print(f"  first list, which builds the index   {time.perf_counter() - start:8.2f} s")
        time.sleep(2.1)  # Past the age at which a folder's time is believed.
        listing.listing(home=home.root)
        for verb, code in VERBS.items():
            took = timed(code.format(count=count, digest=digest[:16]), home.root)
            print(f"  {verb:<36} {_shown(took)}")
            if names == count:
                results.note(**{f"{re.sub(r'[^a-z0-9]+', '_', verb.lower()).strip('_')}_ms": round(took[0])})
        for page, make in PAGES.items():
            times = []
            for _ in range(7):
                start = time.perf_counter()
                make(home)
                times.append((time.perf_counter() - start) * 1000)
            print(f"  {page:<36} {statistics.median(times):8.0f} ms in a server that runs")
        verbs.tag("adapter-1", "new", home=home.root)
        print(f"  {'list, just after a change':<36} {_shown(timed(VERBS['list'].format(count=count), home.root, 3))}")


def register_big(folder: Path, size: int) -> None:
    """Registering an adapter against hashing and copying it, with and without making the copy durable."""
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16}')
    weights = adapter / "adapter_model.safetensors"
    figures: dict[str, list[float]] = {"hash, copy": [], "hash, copy, fsync": [], "register": []}
    for turn in range(7):
        weights.write_bytes(random.Random(turn).randbytes(size))
        os.sync()
        for what in sorted(figures, key=lambda _: random.random()):
            start = time.perf_counter()
            if what == "register":
                register.register(adapter, f"big-{turn}", home=folder / "register")
            else:
                disk.hash_file(weights)
                shutil.copyfile(weights, folder / "copy")
                if "fsync" in what:
                    with open(folder / "copy", "rb") as copied:
                        os.fsync(copied.fileno())
            figures[what].append(time.perf_counter() - start)
            os.sync()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(folder / "copy")
    print(f"\nan adapter of {size / 1e6:.0f} MB, median of 7")
    base = statistics.median(figures["hash, copy, fsync"])
    for what, times in figures.items():
        print(f"  {what:<20} {statistics.median(times) * 1000:8.0f} ms  {statistics.median(times) / base:5.2f} x")
    took = statistics.median(figures["register"])
    results.note(register=round(took / base, 2), unsynced=round(took / statistics.median(figures["hash, copy"]), 2))


def worker(root: Path, name: str, number: int, count: int, seed: int, acks: Path) -> None:
    """Registers and moves aliases until ``acks`` names ``count`` records, one line for each call that returned."""
    rng = random.Random(seed)
    home = Home(root)
    fd = os.open(acks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for step in range(records_in(acks), count):
        # The same step after a kill has the same body: it must find what the killed one wrote, not write it twice.
        draft = Record("adapter", (), identity=Identity(f"org/worker-{number}", f"{step:040x}"))
        with home.store_lock(shared=True):
            record = store.add_record(home, draft, name).record
        os.write(fd, f"record {record.version} {record.digest}\n".encode())
        moved = verbs.tag(record.ref, rng.choice(("prod", "canary")), home=root)
        os.write(fd, f"alias {moved.alias} {moved.version}\n".encode())


def records_in(acks: Path) -> int:
    """How many registrations a worker was told to be done."""
    return acks.read_bytes().count(b"record ") if acks.exists() else 0


def killed_run(root: Path, processes: int, count: int, seed: int = 0, pause: float = 0.3) -> dict[str, int]:
    """Runs ``processes`` workers and kills one after another at random times, each starting again where it stopped.

    Returns figures.

    Raises:
        AssertionError: a committed record is lost, a version missing or double, an alias move lost, or fsck not clean.
    """
    Home(root).create()
    rng = random.Random(seed)
    acks = {number: root.parent / f"{root.name}.acks-{number}" for number in range(processes)}
    running: dict[int, int] = {}
    todo = list(range(processes))
    kills = failed = 0
    while todo or running:
        while todo:
            number = todo.pop()
            child = os.fork()
            if child == 0:
                code = 3
                try:
                    worker(root, "model", number, count, rng.randrange(1 << 30) + number, acks[number])
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            running[child] = number
        time.sleep(pause * rng.random())
        for child in list(running):
            if os.waitpid(child, os.WNOHANG) != (0, 0):
                failed += records_in(acks[running.pop(child)]) != count
        if running:
            child = rng.choice(list(running))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            number = running.pop(child)
            kills += os.WIFSIGNALED(status)
            if records_in(acks[number]) < count:
                todo.append(number)
    lines = [line.split() for path in acks.values() for line in path.read_text().splitlines()]
    return {"kills": kills, "failed": failed, **checked(Home(root), lines, processes * count)}


def checked(home: Home, lines: list[list[str]], count: int) -> dict[str, int]:
    """Compares a home with what its writers were told."""
    versions = home.versions("model")
    assert versions == list(range(1, len(versions) + 1)), "versions are not contiguous"
    assert len(versions) == count, f"{count} bodies became {len(versions)} versions"
    committed = {int(line[1]): line[2] for line in lines if line[0] == "record"}
    for version, digest in committed.items():
        assert store.load_known(home, "model", version).digest == digest, f"version {version} was lost"
    moves = sum(line[0] == "alias" for line in lines)
    kept = sum(len(verbs.history("model", alias, home=home.root)) for alias in home.alias_names("model"))
    assert kept >= moves, f"{moves} moves were acknowledged and {kept} are in the histories"
    report = fsck.fsck(home=home.root)
    assert report.clean, report.problems
    assert len(listing.listing(home=home.root).rows) == len(versions), "the index does not list every version"
    return {"records": len(versions), "acknowledged": len(committed), "moves": kept, "notes": len(report.notes)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("speed", "register", "kill"))
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--each", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.part in (None, "speed"):
            speed(folder, given.records)
        if given.part in (None, "register"):
            register_big(folder, given.megabytes * 1_000_000)
        if given.part in (None, "kill"):
            start = time.perf_counter()
            figures = killed_run(folder / "kill", given.processes, given.each, given.seed)
            print(
                f"\n{given.processes} processes x {given.each}, killed at random: {time.perf_counter() - start:.0f} s"
            )
            results.note(processes=given.processes, each=given.each, **figures)
            for what, value in figures.items():
                print(f"  {what:<20} {value}")


if __name__ == "__main__":
    main()
