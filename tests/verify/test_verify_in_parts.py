"""A verification by parts says what one process says, of outputs that are right and of outputs that are not."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from models import plain_adapter, plain_base, read_tensors, write_checkpoint

import adapterkit
from adapterkit.checkpoint.plan import Plan
from adapterkit.cli import main
from adapterkit.errors import OutputError, UsageError
from adapterkit.verbs.execute import OpenPlan
from adapterkit.verbs.verify.report import VerifyReport

SIZE = 2_000  # of a part: a few tensors


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("verified")
    base = plain_base(place / "base", layers=4)
    adapter = plain_adapter(place / "adapter", base)
    adapterkit.merge(base, adapter, place / "merged", weights=0.5)
    adapterkit.merge(base, adapter, place / "nf4", quant="nf4")
    before, after = read_tensors(base), read_tensors(place / "merged")
    after = {name: before[name] if ".layers.2." in name else value for name, value in after.items()}
    after["model.layers.1.mlp.up_proj.weight"][3, 4] += 1
    after["lm_head.weight"][0, 0] = float("nan")
    del after["model.layers.3.input_layernorm.weight"]
    write_checkpoint(place / "tampered", after, json.loads((base / "config.json").read_text()))
    return place


def without_time(report: VerifyReport) -> dict[str, Any]:
    assert report.tensors is not None
    plain = replace(report, seconds=0, peak_memory=0, nbytes=0, tensors=replace(report.tensors, seconds=0))
    return asdict(plain)


@pytest.mark.parametrize(
    ("merged", "given"),
    [
        ("merged", {}),
        ("tampered", {"weights": 0.5}),
        ("tampered", {"weights": 0.5, "min_cosine": 0.999, "max_dead": 0}),
        ("nf4", {"scale": 2.0}),
        ("merged", {"weights": 1.0}),
        ("merged", {"only": ("layers.1",)}),
    ],
)
def test_the_findings_of_parts_are_those_of_one_process(
    merged: str, given: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    same_by_parts(place / merged, {"base": place / "base", "adapters": place / "adapter", **given}, tmp_path)


def test_a_gguf_file_that_is_wrong(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("gguf")
    from bench.proofs import gallery

    (tmp_path / "made").mkdir()
    (tmp_path / "here").mkdir()
    broken = gallery.CASES["GGUF: change of q/k not interleaved"](tmp_path / "made")
    same_by_parts(broken.merged, {"base": broken.base, "adapters": broken.adapters}, tmp_path / "here")


def same_by_parts(merged: Path, asked: dict[str, Any], tmp_path: Path) -> None:
    whole = adapterkit.verify(merged, **asked)
    shown = adapterkit.verify(merged, **asked, save_plan=tmp_path / "plan.json")
    assert (shown.ok, shown.dry_run) == (False, True)
    plan, out = Plan.from_json((tmp_path / "plan.json").read_bytes()), tmp_path / "report.json"
    workers = [OpenPlan(plan, out, SIZE) for _ in range(2)]
    assert len(workers[0].parts) > 3
    for part in reversed(workers[0].parts):
        workers[part.index % 2].execute(part.index)
    there = merged / "config.json" if merged.is_dir() else merged
    with pytest.raises((OutputError, UsageError), match=r"exists|lies in or over"):
        OpenPlan(plan, there, SIZE).check()
    report = OpenPlan(plan, out, SIZE).finish()
    assert without_time(report) == without_time(whole)
    said = json.loads(out.read_text())
    assert (said["ok"], len(said["findings"])) == (whole.ok, len(whole.findings))
    assert len(out.read_bytes()) == report.nbytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "report.json"]


def test_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*given: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main(list(given))
        return int(ended.value.code or 0)

    inputs = ("--base", str(place / "base"), "--adapter", str(place / "adapter"))
    plan, out = str(tmp_path / "plan.json"), str(tmp_path / "report.json")
    assert run("verify", str(place / "tampered"), *inputs, "--weight", "0.5", "--save-plan", plan) == 0
    assert "would compare" in capsys.readouterr().out
    given = (plan, "-o", out, "--part-size", str(SIZE))
    assert run("run", *given, "--task", "0", "--tasks", "2") == 0
    assert run("run", *given, "--task", "1", "--tasks", "2") == 3
    assert "not verified" in capsys.readouterr().out
    assert run("execute", plan, "-o", str(tmp_path / "other.json")) == 3
    assert "error: missing" in capsys.readouterr().out
    assert run("verify", str(place / "merged"), *inputs, "--dry-run", "--workers", "1,8", "--json") == 0
    assert [row["workers"] for row in json.loads(capsys.readouterr().out)["forecast"]] == [1, 8]
    assert run("verify", str(place / "merged"), *inputs, "--on", "local", "--workers", "1") == 0
    assert "verified" in capsys.readouterr().out
    assert run("verify", str(place / "merged"), *inputs, "-o", out) == 1
    assert "exists" in capsys.readouterr().err
    assert run("verify", str(place / "merged"), *inputs, "-o", out, "--force") == 0
    assert f"report written to {out}" in capsys.readouterr().err
    assert json.loads(Path(out).read_text())["ok"] is True
    for page in (("--html", out), ("--markdown", out), ("--attach",)):
        for shown in (("--dry-run",), ("--save-plan", plan), ("--on", "k8s", "--workers", "2", "-o", plan)):
            assert run("verify", str(place / "merged"), *inputs, *page, *shown) == 2
            assert f"{page[0]} needs the report" in capsys.readouterr().err


def test_the_evidence_of_a_saved_verification(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` and `execute` do with the report what `verify` does; what they cannot do is refused by name."""

    def run(*given: object) -> int:
        with pytest.raises(SystemExit) as ended:
            main([str(one) for one in given])
        return int(ended.value.code or 0)

    def evidence() -> object:
        return json.loads((merged / "adapterkit.json").read_text()).get("evidence", {})

    base, adapter, merged = place / "base", place / "adapter", tmp_path / "merged"
    adapterkit.merge(base, adapter, merged)
    record = (merged / "adapterkit.json").read_bytes()
    plan, other = tmp_path / "plan.json", tmp_path / "other.json"
    adapterkit.verify(merged, base=base, adapters=adapter, save_plan=plan)
    adapterkit.merge(base, adapter, save_plan=other)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "job.md"))
    asked = ("--html", tmp_path / "page.html", "--markdown", tmp_path / "page.md", "--step-summary")
    read, counted = Plan.from_json, list[object]()
    monkeypatch.setattr(Plan, "from_json", lambda text: counted.append(text) or read(text))
    for verb, given in (
        ("run", ("--on", "local", "--workers", "1")),
        ("run", ("--task", "0", "--tasks", "1")),
        ("execute", ()),
    ):
        counted.clear()
        (merged / "adapterkit.json").write_bytes(record)
        out = tmp_path / f"{verb}-{len(given)}-{given[0] if given else ''}.json"
        assert run(verb, plan, "-o", out, *given, *asked) == 0
        assert len(counted) == 1  # the plan is read once
        assert "evidence written to" in capsys.readouterr().err
        assert evidence() != {}
        assert "What is deployed is what was trained" in (tmp_path / "page.html").read_text()
        for page in ("page.html", "page.md", "job.md"):
            assert (tmp_path / page).read_text()
            (tmp_path / page).unlink()
    (merged / "adapterkit.json").write_bytes(record)
    assert run("execute", plan, "-o", tmp_path / "none.json", "--no-attach") == 0
    assert evidence() == {}
    for option in (("--html", "x.html"), ("--markdown", "x.md"), ("--step-summary",), ("--attach",)):
        for call in (
            ("run", other, "-o", tmp_path / "x", "--on", "local"),
            ("execute", other, "-o", tmp_path / "x"),
            ("run", plan, "-o", tmp_path / "x", "--on", "slurm", "--workers", "2"),
            ("run", plan, "--dry-run"),
            ("execute", plan, "-o", tmp_path / "x", "--part", "0"),
        ):
            capsys.readouterr()
            assert run(*call, *option) == 2
            assert capsys.readouterr().err.startswith(f"error: {option[0]} ")
    assert not (tmp_path / "x").exists()


def test_what_means_nothing_is_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inputs: dict[str, Any] = {"base": place / "base", "adapters": place / "adapter"}
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"on": "slurm", "workers": 2}, "where the report goes"),
        ({"on": "ray", "address": "auto"}, "where the report goes"),
        ({"on": "local", "level": "load"}, "compares no tensor"),
        ({"save_plan": "never.json", "level": "load"}, "compares no tensor"),
        ({"save_plan": "never.json", "on_purpose": "general.name"}, "MERGED is a folder"),
        ({"resume": True}, "means nothing here"),
        ({"part_size": "1MB"}, "means nothing here"),
        ({"force": True}, "means nothing here"),
    )
    for given, words in cases:
        with pytest.raises(UsageError, match=words):
            adapterkit.verify(place / "merged", **inputs, **given)
    assert not any(tmp_path.iterdir())


def test_the_level_of_headers_alone(place: Path, tmp_path: Path) -> None:
    inputs: dict[str, Any] = {"base": place / "base", "adapters": place / "adapter"}
    whole = adapterkit.verify(place / "merged", **inputs, level="load")
    report = adapterkit.verify(place / "merged", **inputs, level="load", out=tmp_path / "report.json")
    assert (report.level, report.tensors, report.findings) == ("load", None, whole.findings)
    assert json.loads((tmp_path / "report.json").read_text())["level"] == "load"
    for folder, name in (("merged", "config.json"), ("base", "config.json"), ("adapter", "report.json")):
        with pytest.raises(UsageError, match="lies in or over"):  # as in parts
            adapterkit.verify(place / "merged", **inputs, out=place / folder / name, force=True)
    for asked, level in (("load", "load"), (None, "tensors"), ("layers", "layers")):
        assert adapterkit.verify(place / "merged", **inputs, level=asked, dry_run=True).level == level
    assert adapterkit.verify(place / "merged", **inputs, max_kl=0.1, dry_run=True).level == "model"
