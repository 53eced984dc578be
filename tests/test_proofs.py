"""Each proof of bench/ made again at a small size, and held against its stored result."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import scripts
from bench.common import results
from bench.proofs import PACKAGES, SMALL

ROOT = Path(__file__).resolve().parents[1]
STORED = results.FOLDER / "proofs"


def stored(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((STORED / f"{name}.json").read_text())
    return found


def test_every_proof_has_a_small_run_with_a_stored_result() -> None:
    assert set(SMALL) == set(scripts("proofs"))
    assert {path.stem for path in STORED.glob("*.json")} == {name for name in SMALL if name not in UNSTORED}
    for path in STORED.glob("*.json"):
        result = stored(path.stem)
        assert result["script"] == f"proofs {path.stem}"
        assert result["command"] == f"python -m bench proofs {path.stem} {SMALL[path.stem]}".rstrip()
        assert result["measured"]["version"]
        assert re.fullmatch(r"[0-9a-f]{7,40}", result["measured"]["commit"])
        assert result["figures"] or result["tables"]
        assert result["printed"]
        assert re.search(r"/(?:tmp|home|root|work)/", path.read_text()) is None


UNSTORED = {"facts", "imatrix", "keep_plan", "mergekit", "rounding", "workers_killed"}
"""Proofs whose small run is not stored yet, or measures time; it has to end well, and no more."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_proof_gives_what_is_stored(name: str, tmp_path: Path) -> None:
    missing = [word for word in re.findall(r"\$([A-Z_]+)", SMALL[name]) if word not in os.environ]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: see bench/proofs/{name}.py")
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    again = tmp_path / "again.json"
    words = SMALL[name].split()
    command = [sys.executable, "-m", "bench", "--save", str(again), "proofs", name, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    made = json.loads(again.read_text())
    if name in UNSTORED:
        return
    kept = stored(name)
    if kept["figures"]:
        assert made["figures"] == kept["figures"]
    else:  # the table is the proof: the same to its last printed digit, give or take one
        assert made["tables"].keys() == kept["tables"].keys()
        for name, table in kept["tables"].items():
            assert numbers(made["tables"][name]["rows"]) == pytest.approx(numbers(table["rows"]), abs=0.0101)


def numbers(rows: list[list[Any]]) -> list[float]:
    """Every number of a table, in the texts of its cells too."""
    return [
        float(number) for row in rows for cell in row for number in re.findall(r"-?\d+\.?\d*(?:e[+-]\d+)?", str(cell))
    ]
