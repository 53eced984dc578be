"""Fuzz the readers for as long as is wanted: ``python tests/fuzz/run.py --seconds 3600 [--only NAME] [--json FILE]``.

Prints, for each reader, how many inputs it took and refused, the slowest, and the most memory that one took. What ends in
anything but an error of ours, in more than a second of CPU or more than 200 MB is written to the corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from adapterkit.errors import AdapterkitError  # noqa: E402
from fuzz.mutate import mutated  # noqa: E402
from fuzz.readers import Reader, readers  # noqa: E402

SECONDS, MEMORY = 1.0, 200 << 20
MEASURED = 10  # every so many inputs memory is measured, which makes everything several times slower
CORPUS = Path(__file__).with_name("corpus")


@dataclass
class Fuzzed:
    """What came of the inputs of one reader: how many there were, seconds of CPU of the slowest, MB of the largest."""

    inputs: int = 0
    taken: int = 0
    refused: int = 0
    wrong: int = 0
    slowest: float = 0.0
    most: float = 0.0


def fuzzed(
    folder: Path, *, seconds: float = 0.0, inputs: int = 0, seed: int = 0, only: str | None = None
) -> Iterator[tuple[str, Fuzzed]]:
    """Each reader with what came of mutations of its seeds.

    Args:
        folder: where small inputs are made.
        seconds: for all readers together.
        inputs: of each reader, where no seconds are given.
    """
    known = {name: reader for name, reader in readers(folder).items() if only in (None, name)}
    for name, reader in known.items():
        place = folder / "place" / name
        place.mkdir(parents=True)
        for one in reader.seeds:  # what is imported and made once is no cost of an input
            _fed(reader, one, place)
        random, row = Random(f"{seed}{name}"), Fuzzed()
        end = time.monotonic() + seconds / len(known)
        while time.monotonic() < end if seconds else row.inputs < inputs:
            data = mutated(random.choice(reader.seeds), random)
            if wrong := _one(reader, data, place, row):
                path = CORPUS / f"{name.replace(' ', '_')}--{hashlib.sha256(data).hexdigest()[:12]}"
                path.write_bytes(data)
                print(f"{name}: {wrong} ({path.name})", file=sys.stderr)
        yield name, row


def _fed(reader: Reader, data: bytes, place: Path) -> str | None:
    """``""`` where an input is read, None where it is refused, and else what it ended in."""
    try:
        reader.read(data, place)
    except AdapterkitError:
        return None
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:120]
    return ""


def _one(reader: Reader, data: bytes, place: Path, row: Fuzzed) -> str:
    """Feed one input; what is wrong with its end."""
    measured = row.inputs % MEASURED == 0
    row.inputs += 1
    if measured:
        tracemalloc.start()
    started = time.thread_time()
    end = _fed(reader, data, place)
    spent, memory = time.thread_time() - started, 0
    if measured:
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        row.most = max(row.most, memory / 1e6)
    else:
        row.slowest = max(row.slowest, spent)
    late = f"{spent:.1f} s" if spent > SECONDS and not measured else ""
    wrong = end or late or (f"{memory / 1e6:.0f} MB" if memory > MEMORY else "")
    if wrong:
        row.wrong += 1
    elif end is None:
        row.refused += 1
    else:
        row.taken += 1
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as made:
        for name, row in fuzzed(Path(made), seconds=given.seconds, seed=given.seed, only=given.only):
            rows[name] = asdict(row)
            print(f"{name:<22} {json.dumps({key: round(value, 2) for key, value in rows[name].items()})}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 1 if any(row["wrong"] for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
