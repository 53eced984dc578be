"""A plan of many small parts, and what one process makes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import read_bytes


@dataclass
class Case:
    """A saved plan and the bytes of a whole run."""

    place: Path
    base: Path
    adapter: Path

    @property
    def plan(self) -> Path:
        return self.place / "plan.json"

    def command(self, *words: object) -> list[str]:
        return [sys.executable, "-m", "adapterkit", *map(str, words)]

    def run(self, *words: object, code: int = 0) -> Any:
        """A command's report."""
        done = subprocess.run(
            [*self.command(*words), "--json"], cwd=self.place, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == code, done.stdout + done.stderr
        return json.loads(done.stdout)

    def same(self, out: Path, *, record: bool = False) -> bool:
        """Whether an output has every byte of the whole run."""
        return read_bytes(out, record=record) == read_bytes(self.place / "whole", record=record)


def events(path: Path) -> list[dict[str, Any]]:
    """What is in a file of events; a line that is being written is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def kill_workers(process: subprocess.Popen[str], path: Path, times: int) -> int:
    """Kill workers that have just begun a part, until so many are or the run has ended; how many were."""
    killed: set[int] = set()
    seen = 0
    while process.poll() is None and len(killed) < times:
        found = events(path)
        pids = {one["worker"]: one["pid"] for one in found if one["event"] == "worker-ready"}
        for one in found[seen:]:
            if one["event"] == "part-started" and len(killed) < times and pids[one["worker"]] not in killed:
                os.kill(pids[one["worker"]], signal.SIGKILL)
                killed.add(pids[one["worker"]])
        seen = len(found)
        time.sleep(0.005)
    return len(killed)
