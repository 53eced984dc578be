"""`demo`: what a newcomer runs first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_the_demo_shows_that_it_worked_and_can_be_built_upon(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "adapterkit", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)

    done = run("demo", "d", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [answer["adapter"] for answer in report["answers"]] == [answer["merged"] for answer in report["answers"]]
    assert all(answer["base"] != answer["adapter"] for answer in report["answers"])
    assert report["logit_difference"] < 1e-4 * report["logit_spread"] * 10
    assert report["verified"] == ["merged", "merged-Q8_0.gguf"]
    assert run("inspect", "d/merged-Q8_0.gguf").returncode == 0
    again = run("demo", "d")
    assert (again.returncode, again.stdout) == (1, "")
    assert "d/base exists" in again.stderr
