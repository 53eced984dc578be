"""Processes of this machine execute a plan: the bytes of one process, whatever is killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from models import edit_config, read_bytes

import adapterkit
from adapterkit.disk import partial_folder
from adapterkit.errors import CheckpointError, OutputError, UsageError

sys.path.insert(0, str(Path(__file__).parent))
from engine_case import Case, events, kill_workers

SMALL = "20KB"


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_workers_that_are_killed_change_no_byte(case: Case, tmp_path: Path) -> None:
    log, out = tmp_path / "events", tmp_path / "out"
    command = case.command("run", case.plan, "-o", out, "--on", "local", "--workers", 2, "--part-size", SMALL)
    running = subprocess.Popen([*command, "--events", str(log), "--json"], stdout=subprocess.PIPE, text=True)
    killed = kill_workers(running, log, 3)
    report = json.loads(running.communicate(timeout=900)[0])
    assert running.returncode == 0
    assert killed == 3
    assert report["lost"] == 3
    assert case.same(out)
    assert report["bytes_written"] == report["nbytes"]
    assert report["parts"] == sum(one["event"] == "part-ended" for one in events(log)) > 4


def test_a_driver_that_is_killed_takes_its_workers_along_and_the_next_run_goes_on(case: Case, tmp_path: Path) -> None:
    log, out = tmp_path / "events", tmp_path / "out"
    given = ("run", case.plan, "-o", out, "--on", "local", "--workers", 1, "--part-size", SMALL, "--events", log)
    running = subprocess.Popen(case.command(*given), stdout=subprocess.DEVNULL)
    while sum(one["event"] == "part-ended" for one in events(log)) < 2:
        assert running.poll() is None, "it was over before it could be killed"
        time.sleep(0.002)
    running.kill()
    running.wait()
    pids = [one["pid"] for one in events(log) if one["event"] == "worker-ready"]
    deadline = time.monotonic() + 900
    while not all(map(gone, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if out.exists():
        pytest.skip("it had ended before it was killed")
    before = sum(one["event"] == "part-ended" for one in events(log))
    report = case.run(*given)
    assert report["found"] >= before >= 2
    assert report["finished"]
    assert case.same(out)


def test_merge_by_workers_is_merge(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ("merge", case.base, case.adapter, "-o", out, "--on", "local", "--workers", 2)
    report = case.run(*given, "--attest")
    assert "2 parts by 2 workers (local)" in report["notes"]
    made, whole = (read_bytes(folder, record=True) for folder in (out, case.place / "whole"))
    assert {name: data for name, data in made.items() if name in whole} == whole
    assert made.keys() - whole.keys() == {"adapterkit.intoto.json"}
    assert not partial_folder(out).exists()


def test_a_conversion_by_workers_is_a_conversion(case: Case, tmp_path: Path) -> None:
    given = {"to": "f16", "max_shard_size": "40KB"}
    adapterkit.convert(case.base, tmp_path / "one", **given)  # type: ignore[arg-type]
    adapterkit.convert(case.base, tmp_path / "other", on="local", workers=1, **given)  # type: ignore[arg-type]
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 2
    assert read_bytes(tmp_path / "one", record=True) == read_bytes(tmp_path / "other", record=True)


def test_an_error_of_a_worker_is_the_error_of_the_run(case: Case, tmp_path: Path) -> None:
    edit_config(case.adapter, lora_alpha=3)
    weights = case.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        adapterkit.run(case.plan, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_a_merge_that_fails_by_workers_leaves_nothing(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterkit.verbs.engines import local

    def lost(self: object) -> int:
        raise OutputError("no worker can be started")

    monkeypatch.setattr(local.LocalPool, "start", lost)
    with pytest.raises(OutputError, match="no worker"):
        adapterkit.merge(case.base, [case.adapter], tmp_path / "out", on="local", workers=2)
    assert not partial_folder(tmp_path / "out").exists()
    with pytest.raises(OutputError, match="no worker"):
        adapterkit.merge(case.base, [case.adapter], tmp_path / "out", on="local", workers=2, resume=True)
    assert partial_folder(tmp_path / "out").exists()


def test_another_run_of_the_same_output_is_refused_meanwhile(case: Case, tmp_path: Path) -> None:
    from adapterkit.checkpoint.parts import claimed
    from adapterkit.checkpoint.plan import Plan

    with claimed(Plan.from_json(case.plan.read_bytes()), tmp_path / "out"):
        with pytest.raises(OutputError, match="another run is writing"):
            adapterkit.merge(case.base, [case.adapter], tmp_path / "out")
        with pytest.raises(OutputError, match="another run is writing"):
            adapterkit.merge(case.base, [case.adapter], tmp_path / "out", weights=[2], on="local", workers=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on": "local", "fidelity": True}, "measured in one pass"),
        ({"on": "local", "workers": "2,4"}, "several numbers"),
        ({"workers": 2}, "means nothing here"),
        ({"on": "local", "workers": "many"}, "no number of workers"),
        ({"on": "local", "workers": 0}, "no number of workers"),
        ({"on": "local", "address": "auto"}, "is of ray"),
        ({"on": "local", "submit": True}, "of slurm and k8s"),
        ({"on": "slurm"}, "how many tasks"),
        ({"on": "slurm", "workers": 2, "attest": True}, "nothing beside it"),
        ({"on": "nomad"}, "not a value of"),
        ({"on": "local", "save_plan": "p.json"}, "not executed"),
        ({"save_plan": "p.json", "fidelity": True}, "is measured while one process writes"),
        ({"save_plan": "p.json", "min_cosine": 0.0}, "min_cosine= is measured while one process writes"),
        ({"dry_run": True, "workers": 2, "bandwidth": "fast"}, "not a rate"),
    ],
)
def test_what_workers_cannot_do_is_refused(options: dict[str, object], words: str, case: Case, tmp_path: Path) -> None:
    before = sorted(case.place.rglob("*"))
    with pytest.raises(UsageError, match=words):
        adapterkit.merge(case.base, [case.adapter], tmp_path / "out", **options)  # type: ignore[arg-type]
    assert sorted(case.place.rglob("*")) == before


def test_a_forecast_counts_bytes_time_and_money(case: Case) -> None:
    done = adapterkit.merge(
        case.base, [case.adapter], dry_run=True, workers="1,2,8", part_size=SMALL, bandwidth="8Gb/s", price=36
    )
    found = [asdict(row) for row in done.forecast]
    assert [row["workers"] for row in found] == [1, 2, 8]
    nbytes = sum(path.stat().st_size for path in (case.place / "whole").glob("*.safetensors"))
    assert {row["bytes_up"] for row in found} == {nbytes}
    assert {row["bandwidth"] for row in found} == {1e9}
    assert found[0]["busy"] == pytest.approx(1)
    for row in found:
        assert row["money"] == pytest.approx(36 * row["workers"] * row["seconds"] / 3600)
    assert found[0]["seconds"] >= found[1]["seconds"] >= found[2]["seconds"]


def test_forecast_by_hand() -> None:
    from adapterkit.checkpoint.cut import cut
    from adapterkit.checkpoint.plan import Plan, PlannedFile
    from adapterkit.checkpoint.plan_file import PlanStep
    from adapterkit.verbs.engines.forecast import CORE, forecast, opening

    copied = [PlanStep(f"c{i}", "U8", (10**9,), i * 10**9, 10**9, "copy", 10**9, "base", 0) for i in range(4)]
    parts = cut(Plan((PlannedFile("a", 4 * 10**9, tuple(copied)),)), 250_000_000)
    assert len(parts) == 4
    one, four = (forecast(parts, count, bandwidth=1e8, price=1, jobs=1) for count in (1, 4))
    assert one.seconds == pytest.approx(opening(4) + 40)
    assert four.seconds == pytest.approx(opening(4) + 10)
    computed = (PlanStep("x", "F32", (10**9,), 0, 4 * 10**9, "+ LoRA", 4 * 10**9),)
    bound = cut(Plan((PlannedFile("a", 4 * 10**9, computed),)))
    assert forecast(bound, 1, bandwidth=1e15, price=1, jobs=2).seconds == pytest.approx(opening(1) + 8e9 / (2 * CORE))
