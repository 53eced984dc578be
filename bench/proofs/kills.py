"""Kill every verb that writes with SIGKILL at random moments, and count what is left.

    python -m bench proofs kills [--kills 1000] [--only VERB] [--seed 0] [--json FILE]

The verbs and inputs are those of the proof ``faults``, and a merge of a GGUF base beside them. Each run works in a forked
child and is killed at a moment between its start and a little after the time that an undisturbed one takes. Then: the target
is absent or has the right bytes, the next run gives the right bytes, and nothing is left beside it. After each kill of
``register`` the registry has no problem that ``fsck`` sees, and every record that was there is there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import adapterkit
from adapterkit.disk import recover
from adapterkit.registry.fsck import fsck
from adapterkit.registry.register import register
from bench.common import results
from bench.proofs.faults import inputs, state, verbs


def gguf_base(path: Path) -> Path:
    """A GGUF file with the layers of the other base."""
    import gguf
    import numpy

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (("block_count", 2), ("head_count", 2), ("head_count_kv", 2)):
        name = key if key == "block_count" else f"attention.{key}"
        writer.add_uint32(f"llama.{name}", value)
    rng = numpy.random.default_rng(0)
    writer.add_tensor("token_embd.weight", rng.standard_normal((8, 16)).astype(numpy.float32))
    writer.add_tensor("output_norm.weight", numpy.ones(16, numpy.float32))
    for layer in range(2):
        for leaf in "qkv":
            values = rng.standard_normal((16, 16)).astype(numpy.float32)
            writer.add_tensor(f"blk.{layer}.attn_{leaf}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def start(work: Callable[[], object]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pid = os.fork()
    if pid == 0:
        end = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            end = 0
        finally:
            os._exit(end)
    return pid


def timed(work: Callable[[], object]) -> float:
    started = time.monotonic()
    if os.waitstatus_to_exitcode(os.waitpid(start(work), 0)[1]):
        raise SystemExit("an undisturbed run failed")
    return time.monotonic() - started


def killed(work: Callable[[], object], after: float) -> bool:
    pid = start(work)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def outputs(
    name: str, verb: Callable[[Path], object], top: Path, kills: int, chance: random.Random, wrong: list[str]
) -> dict[str, int]:
    place = top / f"place-{name.replace(' ', '-')}"
    out = place / ("right.gguf" if "GGUF" in name else "right")
    place.mkdir()
    took = timed(lambda: verb(out))
    right, beside = state(out), sorted(os.listdir(place))
    row = {"kills": 0, "left something to do": 0, "wrong": 0}
    while row["kills"] < kills:
        if name != "merge --force":
            for entry in place.iterdir():
                remove(entry)
        if not killed(lambda: verb(out), chance.uniform(0, took * 1.1)):
            continue
        row["kills"] += 1
        recover(out)
        half = state(out) not in (None, right)
        row["left something to do"] += sorted(os.listdir(place)) != beside
        if name != "merge --force" and state(out) is not None:
            remove(out)
        for entry in beside:
            if entry != out.name and state(out) is None:
                (place / entry).unlink(missing_ok=True)
        timed(lambda: verb(out))
        if half or state(out) != right or sorted(os.listdir(place)) != beside:
            row["wrong"] += 1
            wrong.append(f"{name}: half {half}, right {state(out) == right}, left {sorted(os.listdir(place))}")
    return row


def registered(adapter: Path, top: Path, kills: int, chance: random.Random, wrong: list[str]) -> dict[str, int]:
    home, row, number = top / "registry", {"kills": 0, "left something to do": 0, "wrong": 0}, 0
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
        lost = before - {path.name for path in (home / "records").rglob("*.json")}
        timed(work)
        if found.problems or lost or fsck(home=home).problems:
            row["wrong"] += 1
            wrong.append(f"register: {[one.sentence for one in found.problems]}, lost {lost}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="Of all verbs together.")
    parser.add_argument("--only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    chance, wrong, rows = random.Random(given.seed), list[str](), {}
    with tempfile.TemporaryDirectory() as made:
        top = Path(made)
        base, adapter = inputs(top)
        register(adapter, "x", home=top / "home")
        file = gguf_base(top / "base.gguf")
        todo = verbs(base, adapter, top / "home")
        todo["merge of a GGUF base"] = lambda out: adapterkit.merge(file, [adapter], out, jobs=1, force=True)
        names = [name for name in (*todo, "register") if given.only in (None, name)]
        each = -(-given.kills // len(names))
        for name in names:
            if name == "register":
                rows[name] = registered(adapter, top, each, chance, wrong)
            else:
                rows[name] = outputs(name, todo[name], top, each, chance, wrong)
            print(f"{name:<22} {json.dumps(rows[name])}", flush=True)
    total = {key: sum(row[key] for row in rows.values()) for key in ("kills", "left something to do", "wrong")}
    print(f"{total['kills']} kills, {total['left something to do']} left something to do, {total['wrong']} wrong")
    results.note(kills=total["kills"], wrong=total["wrong"])
    for line in wrong:
        print("WRONG", line)
    if given.json:
        given.json.write_text(json.dumps({**rows, "all": total}, indent=2) + "\n")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
