"""What lies in the place of an output, or in its hidden folder, is taken for done only if it is of the same plan and inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import plain_adapter, plain_base, read_bytes

import adapterkit
from adapterkit.checkpoint.plan import Plan
from adapterkit.disk import partial_folder
from adapterkit.errors import OutputError


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "base", layers=4, shards=3)


PLANS: dict[str, tuple[str, Callable[[Path, Path, Path], Any]]] = {
    "folder": ("out", lambda base, adapter, plan: adapterkit.merge(base, adapter, save_plan=plan)),
    "combined": ("out", lambda base, adapter, plan: adapterkit.combine([adapter, adapter], rank=2, save_plan=plan)),
    "one file": (
        "out.safetensors",
        lambda base, adapter, plan: adapterkit.resize(adapter, rank=2, to="kohya", save_plan=plan),
    ),
    "report": (
        "report.json",
        lambda base, adapter, plan: adapterkit.verify(
            plan.with_name("merged"), base=base, adapters=adapter, save_plan=plan
        ),
    ),
}


@pytest.mark.usefixtures("pieces_alike")
@pytest.mark.parametrize("kind", PLANS)
def test_an_output_that_is_there_is_known_by_its_content(kind: str, base: Path, tmp_path: Path) -> None:
    """Not by names, sizes and dates, nor by the digest of a plan, which may be the same for other inputs."""
    name, planned = PLANS[kind]
    adapter, plan, out = plain_adapter(tmp_path / "adapter", base, seed=1), tmp_path / "plan.json", tmp_path / name
    adapterkit.merge(base, adapter, tmp_path / "merged")
    planned(base, adapter, plan)
    digest = Plan.from_json(plan.read_bytes()).digest
    assert adapterkit.run(plan, out, task=0, tasks=1).report
    for when in (1, 4_000_000_000):  # whichever clock is off
        os.utime(plan, (when, when))
        assert adapterkit.run(plan, out, task=0, tasks=1).notes == (f"{out} is there already",)
    plain_adapter(adapter, base, seed=2)
    planned(base, adapter, plan)
    assert Plan.from_json(plan.read_bytes()).digest == digest
    for when in (1, 4_000_000_000):
        os.utime(plan, (when, when))
        with pytest.raises(OutputError, match="exists"):
            adapterkit.run(plan, out, task=0, tasks=1)
    before = read_bytes(out) if out.is_dir() else out.read_bytes()
    assert adapterkit.run(plan, out, task=0, tasks=1, force=True).report
    assert before != (read_bytes(out) if out.is_dir() else out.read_bytes())


def test_an_output_whose_record_is_another_s_or_whose_bytes_are(base: Path, tmp_path: Path) -> None:
    adapter, plan, out = plain_adapter(tmp_path / "adapter", base), tmp_path / "plan.json", tmp_path / "out"
    adapterkit.merge(base, adapter, save_plan=plan)
    adapterkit.run(plan, out, task=0, tasks=1)
    record, weights = out / "adapterkit.json", out / "model-00002-of-00003.safetensors"
    for path in (weights, record):
        whole = path.read_bytes()
        path.write_bytes(whole[:-2] + b"\x01\x01" if path == weights else b"{}")
        with pytest.raises(OutputError, match="exists"):
            adapterkit.run(plan, out, task=0, tasks=1)
        path.write_bytes(whole)
    said = json.loads(record.read_text())
    assert said["operation"]["name"] == "merge"
    adapterkit.merge(base, adapter, weights=0.5, out=out, force=True)
    with pytest.raises(OutputError, match="exists"):
        adapterkit.run(plan, out, task=0, tasks=1)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_a_whole_run_writes_over_parts_and_they_are_done_no_longer(weight: float, base: Path, tmp_path: Path) -> None:
    """The hidden folder is one: what a run with --resume left there has the names and sizes of the parts."""
    adapter, saved, out = plain_adapter(tmp_path / "adapter", base), tmp_path / "plan.json", tmp_path / "out"
    adapterkit.merge(base, adapter, tmp_path / "whole")
    adapterkit.merge(base, adapter, save_plan=saved)
    plan = Plan.from_json(saved.read_bytes())
    adapterkit.execute(plan, out, part=0)

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapterkit.merge(base, adapter, out, weights=weight, resume=True, progress=interrupt)
    assert partial_folder(out).exists()
    for part in (1, 2):
        adapterkit.execute(plan, out, part=part)
    with pytest.raises(OutputError, match="parts 0 are not done"):
        adapterkit.execute(plan, out)
    adapterkit.execute(plan, out, part=0)
    adapterkit.execute(plan, out)
    assert read_bytes(out, record=True) == read_bytes(tmp_path / "whole", record=True)
