"""How long 1 to 256 workers take over a model of 0.7 or 0.8 TB: simulated, from the real plan and its real parts.

    python -m bench studies workers

Plans are made of headers (`bench.common.giants`, sparse files) and cut as `adapterkit run` cuts them; the parts are dealt out
as its driver does: the largest first, to whoever is free. What is assumed, and not measured here: what a worker moves in a
second in each direction, what its cores compute (`adapterkit.verbs.engines.forecast`), how unequal workers are (speeds around
the median by a log-normal of 0.15, and one in fifty at a third of it), and how often one is lost (once in so many hours of a
worker; another takes its place after half a minute and opens the plan anew, and what was done of the part is done again). The
store is never the bottleneck. Medians of 25 draws.
"""

from __future__ import annotations

import argparse
import heapq
import random
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common.giants import make
from bench.common.results import note

CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Llama 405B, all linear layers, bf16", "llama-405b", {}),
    ("DeepSeek-V3, attention, the base's own format", "deepseek-v3", {"quant": "keep"}),
    ("DeepSeek-V3, attention, bf16", "deepseek-v3", {}),
)
COUNTS = (1, 4, 16, 64, 256)
GIGABITS, JOBS = 25.0, 8
REPLACED = 30.0  # seconds until another worker is there
SLOW, SPREAD, THIRD = 0.02, 0.15, 1 / 3
DRAWS = 25


@dataclass
class Outcome:
    """One draw: seconds until the last part is done, workers that were lost, seconds of work that were done in vain."""

    seconds: float
    lost: int
    vain: float


def simulate(costs: list[float], count: int, opening: float, *, uneven: bool, hours: float, seed: int) -> Outcome:
    """Workers take parts one after the other, the longest first.

    Args:
        costs: seconds of each part for a worker of the median speed.
        opening: seconds until a worker can begin.
        uneven: workers differ in speed.
        hours: between two losses of one worker; 0 for never.
    """
    draw = random.Random(seed)

    def speed() -> float:
        return (THIRD if draw.random() < SLOW else 1.0) * draw.lognormvariate(0.0, SPREAD) if uneven else 1.0

    def dies(now: float) -> float:
        return now + draw.expovariate(1 / (3600 * hours)) if hours else float("inf")

    queue = sorted(costs)  # the last is taken first
    free = [(opening, number, speed(), dies(0.0)) for number in range(min(count, len(costs)))]
    heapq.heapify(free)
    end, lost, vain = 0.0, 0, 0.0
    number = count
    while queue:
        now, worker, pace, death = heapq.heappop(free)
        if death <= now:  # while it was idle or opening
            lost += 1
            number += 1
            heapq.heappush(free, (death + REPLACED + opening, number, speed(), dies(death + REPLACED)))
            continue
        cost = queue.pop()
        done = now + cost / pace
        if death < done:
            lost += 1
            vain += death - now
            queue.append(cost)  # given to the next that is free
            number += 1
            heapq.heappush(free, (death + REPLACED + opening, number, speed(), dies(death + REPLACED)))
            continue
        end = max(end, done)
        heapq.heappush(free, (done, worker, pace, death))
    return Outcome(end, lost, vain)


def main() -> None:
    parser = argparse.ArgumentParser(description="1 to 256 workers, simulated from real plans")
    parser.add_argument("--gigabits", type=float, default=GIGABITS, help="a second, of a worker, each way")
    parser.add_argument("--jobs", type=int, default=JOBS, help="threads of a worker")
    options = parser.parse_args()
    from adapterkit.checkpoint.cut import cut
    from adapterkit.verbs.engines.forecast import opening, seconds_of
    from adapterkit.verbs.plan_merge import plan_merge

    print(f"Simulated: {options.gigabits:g} Gb/s each way and {options.jobs} threads a worker\n")
    heads = (
        "case",
        "parts",
        "read, GB",
        "written, GB",
        "workers",
        "all alike",
        "unequal",
        "and one loss in 10 min",
        "lost",
        "in vain",
    )
    print(f"| {' | '.join(heads)} |")
    print("|" + "---|" * len(heads))
    for name, giant, how in CASES:
        with tempfile.TemporaryDirectory() as place:
            root = Path(place)
            make(root / "model", giant)
            plan = plan_merge(root / "model/base", [root / "model/adapter"], **how).plan
        parts = cut(plan)
        costs = [seconds_of(part, options.gigabits * 1e9 / 8, options.jobs) for part in parts]
        start = opening(len(plan.steps))
        read, written = sum(part.reads for part in parts) / 1e9, plan.nbytes / 1e9
        for count in COUNTS:
            alike = simulate(costs, count, start, uneven=False, hours=0, seed=0)
            drawn = [
                [simulate(costs, count, start, uneven=True, hours=hours, seed=seed) for seed in range(DRAWS)]
                for hours in (0.0, 1 / 6)
            ]
            unequal, losing = (statistics.median(one.seconds for one in some) for some in drawn)
            lost = statistics.mean(one.lost for one in drawn[1])
            vain = statistics.mean(one.vain for one in drawn[1])
            told = (f"{alike.seconds:.0f} s", f"{unequal:.0f} s", f"{losing:.0f} s", f"{lost:.2f}", f"{vain:.1f} s")
            cells = (name, f"{len(parts)}", f"{read:.0f}", f"{written:.0f}", f"{count}", *told)
            print(f"| {' | '.join(cells)} |")
            if giant == "deepseek-v3" and how:
                note(**{f"keep_{count}": round(unequal)})


if __name__ == "__main__":
    main()
