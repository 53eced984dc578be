"""What moved between two versions, by the stored results: ``make bench-compare``, or ``python tools/bench_compare.py [REF]``.

REF is a tag or commit, by default the newest tag, else the commit before the last one that changed `bench/results`. Figures are
compared as they are stored; those that are ratios or sizes tell most, since seconds are of the machine that is named. The exit
code is 1 where a ratio ("over `cp -r`", "share", "x") became worse by more than ``--worse``, a tenth by default.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RATIOS = ("over", "ratio", "times")


@dataclass(frozen=True)
class Moved:
    """One figure that two versions have.

    Attributes:
        ratio: it compares two things that were measured together, so that it means the same on another machine.
    """

    result: str
    figure: str
    before: float
    after: float
    ratio: bool

    @property
    def change(self) -> float:
        """How much larger, as a share."""
        return self.after / self.before - 1 if self.before else 0.0


def figures(stored: dict[str, Any]) -> Iterator[tuple[str, float, bool]]:
    """Name, value and whether it is a ratio, of every number in a stored result."""
    for name, value in stored.get("figures", {}).items():
        if isinstance(value, (int, float)):
            yield name, float(value), any(word in name for word in RATIOS)
    for table, rows in stored.get("tables", {}).items():
        heads = rows["heads"]
        for row in rows["rows"]:
            for head, cell in zip(heads[1:], row[1:], strict=True):
                if isinstance(cell, (int, float)):
                    yield f"{table}: {row[0]}, {head}", float(cell), any(word in head for word in RATIOS)


def compare(before: dict[str, Any], after: dict[str, Any], result: str) -> list[Moved]:
    """Figures that both have and that are not the same."""
    old = {name: value for name, value, _ in figures(before)}
    return [
        Moved(result, name, old[name], value, ratio)
        for name, value, ratio in figures(after)
        if name in old and old[name] != value
    ]


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def reference() -> str:
    """The newest tag; without one, the commit before the last that changed a result."""
    tag = git("describe", "--tags", "--abbrev=0")
    return tag or f"{git('log', '-1', '--format=%h', '--', 'bench/results')}~1"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ref", nargs="?")
    parser.add_argument("--worse", type=float, default=0.1, help="A ratio that grew by more than this fails.")
    asked = parser.parse_args()
    ref = asked.ref or reference()
    moved: list[Moved] = []
    for path in sorted((ROOT / "bench/results").glob("*.json")):
        old = git("show", f"{ref}:bench/results/{path.name}")
        if not old:
            print(f"{path.stem}: new since {ref}")
            continue
        before, after = json.loads(old), json.loads(path.read_text(encoding="utf-8"))
        found = compare(before, after, path.stem)
        if found:
            places = {one.get("measured", {}).get("machine", "?") for one in (before, after)}
            print(f"{path.stem} ({' against '.join(sorted(places))})")
        for one in found:
            print(f"  {one.before:>10,.2f} -> {one.after:>10,.2f} {one.change:>+7.0%}  {one.figure}")
        moved += found
    worse = [one for one in moved if one.ratio and one.change > asked.worse]
    for one in worse:
        print(f"worse: {one.result}, {one.figure}: {one.before:.2f} -> {one.after:.2f}")
    print(f"{len(moved)} figures moved since {ref}, {len(worse)} ratios are worse by more than {asked.worse:.0%}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
