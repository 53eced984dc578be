"""Adapters that are combined, extracted and resized in parts: the bytes of one process, in any order, wherever they go."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from models import edit_config, plain_adapter, plain_base, read_bytes

import adapterkit
from adapterkit.checkpoint import hub_bytes, listing
from adapterkit.checkpoint.plan import Plan
from adapterkit.disk import partial_folder
from adapterkit.errors import CheckpointError, NotFound, OutputError, UsageError
from adapterkit.verbs.engines.on_ray import Worker
from adapterkit.verbs.engines.pool import Reading, WorkerSetting
from adapterkit.verbs.execute import OpenPlan

SIZE = 2_000  # of a part: a few layers


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("results")
    base = plain_base(place / "base", layers=4)
    plain_adapter(place / "a", base, rank=4, seed=1)
    plain_adapter(place / "b", base, rank=3, seed=2, modules=("q_proj",))
    adapterkit.merge(base, place / "a", place / "tuned")
    return place


def asked(verb: str, place: Path) -> dict[str, Any]:
    """Of each verb the harder questions: ranks that are known when the values are, skipped layers, files of other programs."""
    return {
        "sum": {"adapters": [place / "a", place / "b"], "weights": [0.5, 2.0]},
        "svd": {"adapters": [place / "a", place / "b"], "method": "svd", "energy": 0.9, "own_ranks": True},
        "ties": {"adapters": [place / "a", place / "b"], "method": "ties", "rank": 3, "dtype": "f16"},
        "one is 0": {"adapters": [place / "a", place / "b"], "weights": [0.0, 1.0]},
        "mlx": {"adapters": [place / "a", place / "b"], "to": "mlx"},
        "extract": {"base": place / "base", "tuned": place / "tuned", "energy": 0.9},
        "resize": {"adapter": place / "a", "max_error": 0.3, "own_ranks": True},
    }[verb]


VERBS = {name: name if name in ("extract", "resize") else "combine" for name in
         ("sum", "svd", "ties", "one is 0", "mlx", "extract", "resize")}  # fmt: skip


def plan_of(verb: str, place: Path, tmp_path: Path) -> Plan:
    getattr(adapterkit, VERBS[verb])(**asked(verb, place), save_plan=tmp_path / "plan.json")
    return Plan.from_json((tmp_path / "plan.json").read_bytes())


@pytest.mark.parametrize("verb", VERBS)
def test_parts_in_any_order_make_the_same_adapter(verb: str, place: Path, tmp_path: Path) -> None:
    whole = getattr(adapterkit, VERBS[verb])(**asked(verb, place), out=tmp_path / "whole")
    plan, out = plan_of(verb, place, tmp_path), tmp_path / "out"
    workers = [OpenPlan(plan, out, SIZE) for _ in range(2)]
    parts = workers[0].parts
    assert len(parts) > 2
    with pytest.raises(OutputError, match="not done"):
        OpenPlan(plan, out, SIZE).finish()
    for number, part in enumerate(reversed(parts)):
        workers[number % 2].execute(part.index)
        if number == 1:
            workers[0].execute(part.index)  # again, as of a worker that was lost
            with pytest.raises(OutputError, match="not done"):
                OpenPlan(plan, out, SIZE).finish()
    assert not out.exists()
    assert OpenPlan(plan, out).left() == []  # however it is cut
    report = OpenPlan(plan, out, SIZE).finish()
    assert read_bytes(out, record=True) == read_bytes(tmp_path / "whole", record=True)
    assert report.modules == whole.modules
    assert (report.rank, report.nbytes, report.notes) == (whole.rank, whole.nbytes, whole.notes)
    assert not partial_folder(out).exists()


def test_tasks_of_an_array_and_what_they_find(place: Path, tmp_path: Path) -> None:
    whole = adapterkit.combine(**asked("svd", place), out=tmp_path / "whole")
    plan_of("svd", place, tmp_path)
    out, saved = tmp_path / "out", tmp_path / "plan.json"
    given: dict[str, Any] = {"tasks": 2, "part_size": str(SIZE)}
    shown = adapterkit.run(saved, out, dry_run=True, workers="1,2", part_size=str(SIZE))
    assert [row.workers for row in shown.forecast] == [1, 2]
    first = adapterkit.run(saved, out, task=0, **given)
    assert (first.finished, first.left > 0) == (False, True)
    again = adapterkit.run(saved, out, task=0, **given)
    assert again.found == first.parts - first.left
    done = adapterkit.run(saved, out, task=1, **given)
    assert done.finished
    assert done.report.modules
    assert done.nbytes == whole.nbytes  # of the output, and not of the results
    late = adapterkit.run(saved, out, task=0, **given)
    assert late.finished
    assert "is there already" in late.notes[0]
    assert read_bytes(out, record=True) == read_bytes(tmp_path / "whole", record=True)


def test_workers_of_this_machine_and_what_they_refuse(place: Path, tmp_path: Path) -> None:
    given = asked("ties", place)
    adapterkit.combine(**given, out=tmp_path / "whole")
    report = adapterkit.combine(**given, out=tmp_path / "out", on="local", workers=1, part_size=str(SIZE), attest=True)
    assert "parts by 1 worker (local)" in report.notes[-1]
    assert (tmp_path / "out" / "adapterkit.intoto.json").exists()
    made = read_bytes(tmp_path / "out", record=True)
    assert {name: made[name] for name in made if "intoto" not in name} == read_bytes(tmp_path / "whole", record=True)
    shown = adapterkit.extract(**asked("extract", place), dry_run=True, workers="1,8", part_size=str(SIZE))
    assert [row.workers for row in shown.forecast] == [1, 8]
    assert shown.forecast[0].parts > 2
    with pytest.raises(OutputError, match="exists"):
        adapterkit.combine(**given, out=tmp_path / "out", on="local")


@pytest.mark.usefixtures("pieces_alike")
def test_an_input_that_changes_between_two_parts(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", layers=4)
    adapter = plain_adapter(tmp_path / "a", base, seed=1)
    adapterkit.resize(adapter, rank=2, save_plan=tmp_path / "plan.json")
    plan = Plan.from_json((tmp_path / "plan.json").read_bytes())
    first, last = OpenPlan(plan, tmp_path / "out", SIZE), len(OpenPlan(plan, tmp_path / "out", SIZE).parts) - 1
    for index in range(last):
        first.execute(index)
    said = (adapter / "adapter_config.json").read_bytes()
    plain_adapter(adapter, base, seed=2)
    (adapter / "adapter_config.json").write_bytes(said)
    with pytest.raises(CheckpointError, match=r"a/adapter_.* changed while the parts were executed"):
        OpenPlan(plan, tmp_path / "out", SIZE).execute(last)
    with pytest.raises(OutputError, match="are not done"):
        OpenPlan(plan, tmp_path / "out", SIZE).finish()
    assert not (tmp_path / "out").exists()
    OpenPlan(plan, tmp_path / "again", SIZE).execute(0)
    edit_config(adapter, lora_alpha=3)  # the weights are the same, and what they mean is not
    with pytest.raises(CheckpointError, match=r"a/adapter_config\.json changed since the plan was made"):
        OpenPlan(plan, tmp_path / "again", SIZE).execute(1)
    plain_adapter(adapter, base, seed=2, rank=5)
    with pytest.raises(CheckpointError, match="changed since the plan was made"):
        OpenPlan(plan, tmp_path / "out", SIZE).execute(0)


def test_results_that_are_damaged_are_one_sentence(place: Path, tmp_path: Path) -> None:
    plan = plan_of("sum", place, tmp_path)
    file = partial_folder(tmp_path / "out") / plan.files[0].name
    for part in OpenPlan(plan, tmp_path / "out").parts:
        OpenPlan(plan, tmp_path / "out").execute(part.index)
    whole, starts = file.read_bytes(), [step.offset for step in plan.files[0].steps]
    for said in (b'{"row":{},"ranks":[4]}', b'{"row":7}', b"[]", b"{", b'{"ranks":[-1]}', whole[starts[0] + 8 :][:60]):
        damaged = len(said).to_bytes(8, "little") + said
        file.write_bytes(whole[: starts[0]] + damaged + whole[starts[0] + len(damaged) :])
        with pytest.raises(CheckpointError, match="are damaged"):
            OpenPlan(plan, tmp_path / "out").finish()
    text = whole[starts[0] + 8 :].split(b"\0", 1)[0]
    wide = text.replace(b'"ranks":[4]', b'"ranks":[9]')  # more than there is room for: bytes of another layer
    assert wide != text
    file.write_bytes(whole.replace(text, wide))
    with pytest.raises(CheckpointError, match="are damaged"):
        OpenPlan(plan, tmp_path / "out").finish()
    assert not (tmp_path / "out").exists()
    file.write_bytes(whole)
    OpenPlan(plan, tmp_path / "out").finish()


def test_a_worker_of_an_extraction_compares_only_what_the_plan_does_not_say(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adapterkit.verbs.extract import ModelPair

    base, tuned = plain_base(tmp_path / "base", layers=4), tmp_path / "tuned"
    adapterkit.merge(base, place / "b", tuned)
    adapterkit.extract(base, tuned, rank=2, save_plan=tmp_path / "plan.json")
    plan = Plan.from_json((tmp_path / "plan.json").read_bytes())
    seen: list[object] = []
    compare = ModelPair._differs

    def counted(*given: Any) -> bool:
        seen.append(given)
        return compare(*given)

    monkeypatch.setattr(ModelPair, "_differs", counted)
    assert not OpenPlan(plan, tmp_path / "out", SIZE).check()
    assert seen == []
    # Where the files are others, nothing of the plan is believed: another layer may differ now.
    adapterkit.merge(base, place / "a", tuned, force=True)
    with pytest.raises(CheckpointError, match="changed since the plan was made"):
        OpenPlan(plan, tmp_path / "out", SIZE).check()
    assert seen


def test_a_plan_names_its_inputs_as_they_were_given(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    adapterkit.merge("base", "a", save_plan=tmp_path / "plan.json")
    with pytest.raises(UsageError, match="a pod runs in another one"):
        adapterkit.run(tmp_path / "plan.json", tmp_path / "out", on="k8s", workers=2)
    adapterkit.run(tmp_path / "plan.json", tmp_path / "out", on="slurm", workers=2)
    assert f"#SBATCH --chdir={place}\n" in (tmp_path / "out.slurm.sh").read_text()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match="give whole paths"):
        adapterkit.run(tmp_path / "plan.json", tmp_path / "out", task=0, tasks=1)


def test_workers_read_as_their_driver_was_told_to(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `--follow-links` and `--no-verify-download`, which are of a process and not of a plan."""
    linked = tmp_path / "linked"
    asked_for: dict[str, Any] = {"adapters": [linked, place / "b"]}
    shutil.copytree(place / "a", linked)
    (linked / "adapter_config.json").rename(tmp_path / "config.json")
    (linked / "adapter_config.json").symlink_to(tmp_path / "config.json")
    monkeypatch.setattr(listing, "_follows", True)
    monkeypatch.setattr(hub_bytes, "_wanted", False)
    adapterkit.combine(**asked_for, out=tmp_path / "whole")
    adapterkit.combine(**asked_for, out=tmp_path / "out", on="local", workers=1)
    assert read_bytes(tmp_path / "out", record=True) == read_bytes(tmp_path / "whole", record=True)
    adapterkit.combine(**asked_for, out=tmp_path / "job", on="slurm", workers=2)
    assert " --follow-links --no-verify-download --task " in (tmp_path / "job.slurm.sh").read_text()
    adapterkit.combine(**asked_for, save_plan=tmp_path / "plan.json")
    setting = WorkerSetting((tmp_path / "plan.json").read_text(), "", str(tmp_path / "ray"), SIZE, 1, Reading.here())
    monkeypatch.setattr(listing, "_follows", False)
    monkeypatch.setattr(hub_bytes, "_wanted", None)
    actor = Worker(asdict(setting))  # in a process of its own, as Ray has it, nothing is told yet
    assert "failed" not in actor.ready()
    assert "failed" not in actor.execute(0)
    assert not hub_bytes.wanted()
