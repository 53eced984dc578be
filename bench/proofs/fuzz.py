"""Feed every reader of foreign bytes mutations of good files, and count what they end in.

    python -m bench proofs fuzz [--seconds 600 | --inputs N] [--seed 0] [--only READER]

The readers are those of ``tests/fuzz``; what ends in anything but a result or an error of adapterkit, in more than a second of
CPU or more than 200 MB goes to its corpus. Everything happens in one process. Memory is what Python allocates for one input
in ten.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from bench.common import results

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--inputs", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only")
    given = parser.parse_args()
    from fuzz.run import fuzzed

    seconds = given.seconds or (0.0 if given.inputs else 600.0)
    count = wrong = readers = 0
    results.head("Reader", "Inputs", "Read", "Refused", "Other", "Slowest (s of CPU)", "Most memory (MB)")
    with tempfile.TemporaryDirectory() as made:
        how = {"seconds": seconds, "inputs": given.inputs, "seed": given.seed, "only": given.only}
        for name, row in fuzzed(Path(made), **how):
            counts = (row.inputs, row.taken, row.refused, row.wrong)
            results.row(name, *(f"{one:,}" for one in counts), f"{row.slowest:.2f}", f"{row.most:.1f}")
            readers, count, wrong = readers + 1, count + row.inputs, wrong + row.wrong
    results.note(readers=readers, inputs=count, wrong=wrong)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
