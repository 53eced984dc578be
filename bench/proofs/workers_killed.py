"""Workers and drivers that are killed at random: every run ends, and ends with the bytes of one process.

    python -m bench proofs workers_killed --on ray --workers-killed 100 --drivers-killed 20
    python -m bench proofs workers_killed --on local --workers-killed 6 --drivers-killed 2     # small

A worker is killed (SIGKILL) at a moment drawn between 0 and half a second after it began a part; a driver at a moment drawn
from the last two thirds of the time of a whole run. A driver that was killed is started again until it ends
by itself. Nothing waits between two runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bench.common.results import note
from bench.common.shapes import Shape, write_adapter, write_base

SHAPE = Shape(512, 1024, 8, 8, 4, 4096)
PART = "500KB"
AT_ONCE = 6  # workers killed in one run, at most: a part may lose ten


def events(path: Path) -> list[dict[str, Any]]:
    """What is in a file of events, but for a line that is being written."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def content(folder: Path) -> dict[str, bytes]:
    """The weights and their index."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix == ".safetensors" or "index" in path.name
    }


class Runs:
    """Runs of one plan, each into a folder of its own."""

    def __init__(self, root: Path, engine: str, draw: random.Random) -> None:
        self.root, self.engine, self.draw = root, engine, draw
        write_base(root / "base", SHAPE, shard_layers=4)
        write_adapter(root / "adapter", SHAPE)
        self._adapterkit("merge", root / "base", root / "adapter", "-o", root / "whole")
        self._adapterkit("merge", root / "base", root / "adapter", "--save-plan", root / "plan.json")
        self.expected = content(root / "whole")
        self.count = 0
        began = time.monotonic()
        out = self.place()
        self.end(out, self.start(out))
        self.usual = time.monotonic() - began  # seconds of a run that nobody disturbs

    def _adapterkit(self, *words: object) -> None:
        subprocess.run([sys.executable, "-m", "adapterkit", *map(str, words)], check=True, stdout=subprocess.DEVNULL)

    def start(self, out: Path) -> subprocess.Popen[bytes]:
        command = ["run", self.root / "plan.json", "-o", out, "--on", self.engine, "--workers", 2, "--jobs", 1]
        command += ["--part-size", PART, "--events", f"{out}.events", "--json"]
        words = [sys.executable, "-m", "adapterkit", *map(str, command)]
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def place(self) -> Path:
        self.count += 1
        return self.root / f"out{self.count}"

    def end(self, out: Path, process: subprocess.Popen[bytes]) -> None:
        """See that a run ended by itself, with every byte."""
        if process.wait(600):
            sys.exit(f"run {self.count} failed with {process.returncode}: {events(Path(f'{out}.events'))[-1]}")
        self.same(out)

    def same(self, out: Path) -> None:
        """See that an output has every byte, and take it away."""
        if content(out) != self.expected:
            sys.exit(f"run {self.count} made other bytes")
        shutil.rmtree(out)

    def workers_killed(self, wanted: int) -> int:
        """One run in which workers are killed."""
        out = self.place()
        process, killed, seen = self.start(out), set[int](), 0

        def later(pid: int, pause: float) -> None:
            time.sleep(pause)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                killed.discard(pid)

        threads = []
        while process.poll() is None:
            found = events(Path(f"{out}.events"))
            pids = {one["worker"]: one["pid"] for one in found if one["event"] == "worker-ready"}
            for one in found[seen:]:
                pid = pids.get(one.get("worker", -1))
                if one["event"] == "part-started" and pid is not None and pid not in killed and len(killed) < wanted:
                    killed.add(pid)
                    threads.append(threading.Thread(target=later, args=(pid, self.draw.uniform(0, 0.5))))
                    threads[-1].start()
            seen = len(found)
            time.sleep(0.02)
        for thread in threads:
            thread.join()
        self.end(out, process)
        return sum(one["event"] == "worker-lost" for one in events(Path(f"{out}.events")))

    def driver_killed(self) -> int:
        """One run whose driver is killed, and started again until it ends; how many were killed."""
        out, killed = self.place(), 0
        while True:
            process = self.start(out)
            try:
                process.wait(self.draw.uniform(0.3, 1.0) * self.usual if killed < 3 else 600)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed += 1
                if out.exists():  # killed when the output had its name already: it is whole, and nothing is left to do
                    self.same(out)
                    return killed
        self.end(out, process)
        return killed


def main() -> None:
    parser = argparse.ArgumentParser(description="Workers and drivers that are killed at random")
    parser.add_argument("--on", choices=["local", "ray"], default="ray")
    parser.add_argument("--workers-killed", type=int, default=100)
    parser.add_argument("--drivers-killed", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        runs = Runs(Path(place), options.on, random.Random(options.seed))
        workers = drivers = 0
        while workers < options.workers_killed:
            workers += runs.workers_killed(min(AT_ONCE, options.workers_killed - workers))
        while drivers < options.drivers_killed:
            drivers += runs.driver_killed()
        print("| engine | runs | workers killed | drivers killed | runs with other bytes |")
        print("|---|---|---|---|---|")
        print(f"| {options.on} | {runs.count} | {workers} | {drivers} | 0 |")
        note(**{f"{options.on}_workers": workers, f"{options.on}_drivers": drivers})


if __name__ == "__main__":
    main()
