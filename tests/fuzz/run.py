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
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from adapterkit.errors import AdapterkitError  # noqa: E402
from fuzz.mutate import mutated  # noqa: E402
from fuzz.readers import readers  # noqa: E402

SECONDS, MEMORY = 1.0, 200 << 20
CORPUS = Path(__file__).with_name("corpus")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    bad = 0
    rows = {}
    with tempfile.TemporaryDirectory() as made:
        known = {k: v for k, v in readers(Path(made)).items() if given.only in (None, k)}
        for name, reader in known.items():
            random = Random(f"{given.seed}{name}")
            place = Path(made) / "place" / name
            place.mkdir(parents=True)
            row = {"inputs": 0, "taken": 0, "refused": 0, "wrong": 0, "slowest_s": 0.0, "most_MB": 0.0}
            end = time.monotonic() + given.seconds / len(known)
            while time.monotonic() < end:
                data = mutated(random.choice(reader.seeds), random)
                measured = row["inputs"] % 10 == 0  # measuring memory makes everything several times slower
                if measured:
                    tracemalloc.start()
                started, wrong = time.thread_time(), ""
                try:
                    reader.read(data, place)
                    row["taken"] += 1
                except AdapterkitError:
                    row["refused"] += 1
                except Exception as error:
                    wrong = f"{type(error).__name__}: {error}"[:120]
                spent = time.thread_time() - started
                if measured:
                    memory = tracemalloc.get_traced_memory()[1]
                    tracemalloc.stop()
                    row["most_MB"] = max(row["most_MB"], round(memory / 1e6, 1))
                    wrong = wrong or (f"{memory / 1e6:.0f} MB" if memory > MEMORY else "")
                else:
                    row["slowest_s"] = max(row["slowest_s"], round(spent, 2))
                    wrong = wrong or (f"{spent:.1f} s" if spent > SECONDS else "")
                row["inputs"] += 1
                if wrong:
                    row["wrong"] += 1
                    bad += 1
                    path = CORPUS / f"{name.replace(' ', '_')}--{hashlib.sha256(data).hexdigest()[:12]}"
                    path.write_bytes(data)
                    print(f"{name}: {wrong} ({path.name})", file=sys.stderr)
            rows[name] = row
            print(f"{name:<18} {json.dumps(row)}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
