"""Jobs for Slurm and Kubernetes: the files are what those systems take, and an array that is executed gives the bytes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import adapterkit
from adapterkit.errors import NotFound, OutputError, UsageError
from adapterkit.verbs.engines.written import filled, template_of

sys.path.insert(0, str(Path(__file__).parent))
from engine_case import Case

SMALL = "20KB"

# A scheduler that executes an array here, in the order of its numbers but the last one first, each task in a shell.
SBATCH = """#!/bin/sh
array=$(sed -n 's/^#SBATCH --array=0-//p' "$1")
echo "$1" > "$(dirname "$0")/asked"
for task in $array $(seq 0 $((array - 1))); do
  SLURM_ARRAY_TASK_ID=$task sh "$1" >> "$(dirname "$0")/said" 2>&1 || exit 1
done
echo "Submitted batch job 7"
"""


def tool(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def test_a_slurm_array_gives_the_bytes_of_one_process(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path / "bin", "sbatch", SBATCH)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    out = tmp_path / "out"
    report = adapterkit.run(case.plan, out, on="slurm", workers=2, part_size=SMALL, submit=True)
    assert "Submitted batch job 7" in report.notes
    said = (tmp_path / "bin" / "said").read_text()
    assert re.search(r"task 1 of 2: .* parts are left to others", said)
    assert re.search(r"task 0 of 2: ", said)
    assert f"{out}: " in said
    assert case.same(out, record=True)
    again = adapterkit.run(case.plan, out, task=0, tasks=2, part_size=SMALL)
    assert again.finished
    assert "is there already" in again.notes[0]


def test_the_directives_of_a_slurm_script(case: Case, tmp_path: Path) -> None:
    out = tmp_path / "an out put"
    adapterkit.run(case.plan, out, on="slurm", workers=3, part_size=SMALL, jobs=2, set={"time": "01:00:00"}, force=True)
    text = (tmp_path / "an out put.slurm.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert directives["array"] == "0-2"
    assert directives["cpus-per-task"] == "2"
    assert directives["time"] == "01:00:00"
    assert directives["output"] == f"'{tmp_path}/an out put.%A_%a.log'"
    assert int(directives["mem"].removesuffix("M")) > 250
    assert "requeue" in directives
    assert f"-o '{out}'" in text
    assert "--force" in text


def test_never_more_tasks_than_parts(case: Case, tmp_path: Path) -> None:
    adapterkit.run(case.plan, tmp_path / "out", on="slurm", workers=500)
    assert "#SBATCH --array=0-1\n" in (tmp_path / "out.slurm.sh").read_text()


# Fields of batch/v1 Job, PodSpec and Container with their types, from the Kubernetes API reference (v1.33): those that the
# manifest may use. A field that is not here is an error, as it is to `kubectl apply --validate=strict`.
NAME = {"type": "string", "pattern": r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$"}


def strict(required: list[str], **fields: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": fields}


RULE = strict(
    ["action"],
    action={"enum": ["FailIndex", "FailJob", "Ignore", "Count"]},
    onExitCodes=strict(
        ["operator", "values"],
        containerName=NAME,
        operator={"enum": ["In", "NotIn"]},
        values={"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "minItems": 1, "maxItems": 255},
    ),
    onPodConditions={"type": "array", "items": strict(["type"], type={"type": "string"}, status={"enum": ["True"]})},
)
CONTAINER = strict(
    ["name", "image"],
    name=NAME,
    image={"type": "string", "minLength": 1},
    command={"type": "array", "items": {"type": "string"}},
    args={"type": "array", "items": {"type": "string"}},
    env={"type": "array", "items": strict(["name"], name={"type": "string"}, value={"type": "string"})},
    resources=strict(
        [],
        requests={"type": "object", "additionalProperties": QUANTITY},
        limits={"type": "object", "additionalProperties": QUANTITY},
    ),
    volumeMounts={"type": "array", "items": strict(["name", "mountPath"], name=NAME, mountPath={"type": "string"})},
)
JOB = strict(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "batch/v1"},
    kind={"const": "Job"},
    metadata=strict(["name"], name=NAME),
    spec=strict(
        ["template"],
        completionMode={"enum": ["Indexed", "NonIndexed"]},
        completions={"type": "integer", "minimum": 1},
        parallelism={"type": "integer", "minimum": 1},
        backoffLimitPerIndex={"type": "integer", "minimum": 0},
        maxFailedIndexes={"type": "integer", "minimum": 0},
        podFailurePolicy=strict(["rules"], rules={"type": "array", "items": RULE, "maxItems": 20}),
        template=strict(
            ["spec"],
            spec=strict(
                ["containers", "restartPolicy"],
                restartPolicy={"const": "Never"},  # the only one that a podFailurePolicy goes with
                containers={"type": "array", "items": CONTAINER, "minItems": 1},
                volumes={
                    "type": "array",
                    "items": strict(["name"], name=NAME, persistentVolumeClaim=strict(["claimName"], claimName=NAME)),
                },
            ),
        ),
    ),
)


def test_a_kubernetes_job_is_one(case: Case, tmp_path: Path) -> None:
    import jsonschema

    values = {"image": "registry.example/adapterkit:1", "claim": "weights"}
    report = adapterkit.run(case.plan, tmp_path / "Out_1", on="k8s", workers=4, part_size=SMALL, set=values)
    path = tmp_path / "Out_1.k8s.yaml"
    assert any(f"kubectl apply -f {path}" in note for note in report.notes)
    made = yaml.safe_load(path.read_text())
    jsonschema.validate(made, JOB)
    spec = made["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    assert container["image"] == "registry.example/adapterkit:1"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "weights"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    rules = {rule["action"]: rule for rule in spec["podFailurePolicy"]["rules"]}
    assert rules["FailJob"]["onExitCodes"]["containerName"] == container["name"]
    assert 0 not in rules["FailJob"]["onExitCodes"]["values"]
    # What Kubernetes makes of $(JOB_COMPLETION_INDEX) is executed here, index by index.
    for index in range(spec["completions"]):
        words = [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in container["args"]]
        assert "$" not in "".join(words)
        if index in (0, 3):
            continue
        given = dict(zip(words[2::2], words[3::2], strict=False))
        assert (given["--task"], given["--tasks"]) == (str(index), "4")
    for index in (3, 1, 2, 0):
        done = adapterkit.run(case.plan, tmp_path / "Out_1", task=index, tasks=4, part_size=SMALL)
    assert done.finished
    assert case.same(tmp_path / "Out_1")


def test_a_template_of_ones_own(case: Case, tmp_path: Path) -> None:
    mine = tmp_path / "mine.sh"
    mine.write_text(template_of("slurm").replace("#SBATCH --requeue", "#SBATCH --partition={{partition=small}}"))
    how: dict[str, Any] = {"on": "slurm", "workers": 2, "template": mine}
    adapterkit.run(case.plan, tmp_path / "out", **how)
    assert "--partition=small\n" in (tmp_path / "out.slurm.sh").read_text()
    adapterkit.run(case.plan, tmp_path / "out", **how, set=["partition=large"])
    assert "--partition=large\n" in (tmp_path / "out.slurm.sh").read_text()
    with pytest.raises(UsageError, match="no place 'queue'"):
        adapterkit.run(case.plan, tmp_path / "out", **how, set={"queue": "x"})
    mine.write_text("{{account}}")
    with pytest.raises(UsageError, match=r"nothing says what \{\{account\}\} is"):
        adapterkit.run(case.plan, tmp_path / "out", **how)
    with pytest.raises(NotFound, match=r"nowhere\.sh does not exist"):
        adapterkit.run(case.plan, tmp_path / "out", on="k8s", workers=2, template=tmp_path / "nowhere.sh")


def test_the_places_of_a_template() -> None:
    assert filled("{{a}}-{{ b = x y }}-{{c=}}", {"a": "1"}, {}, "it") == "1- x y -"
    assert filled("{{a=1}}", {}, {"a": "2"}, "it") == "2"


def test_a_scheduler_that_refuses(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    given: dict[str, Any] = {"on": "slurm", "workers": 2, "submit": True}
    with pytest.raises(NotFound, match="sbatch is not here"):
        adapterkit.run(case.plan, tmp_path / "out", **given)
    tool(tmp_path / "bin", "sbatch", "#!/bin/sh\necho 'sbatch: error: invalid account' >&2\nexit 1\n")
    with pytest.raises(OutputError, match=r"refused the job .*invalid account"):
        adapterkit.run(case.plan, tmp_path / "out", **given)


def test_a_job_is_not_written_over_an_output(case: Case, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for how in ({"on": "slurm", "workers": 2}, {"task": 0, "tasks": 2}):
        with pytest.raises(OutputError, match="exists"):
            adapterkit.run(case.plan, tmp_path / "out", **how)  # type: ignore[arg-type]
    assert not (tmp_path / "out.slurm.sh").exists()


def test_a_merge_as_a_job(case: Case, tmp_path: Path) -> None:
    report = adapterkit.merge(case.base, [case.adapter], tmp_path / "out", on="slurm", workers=2)
    assert report.dry_run
    assert json.loads((tmp_path / "out.plan.json").read_text())["request"]["verb"] == "merge"
    assert str(tmp_path / "out.plan.json") in (tmp_path / "out.slurm.sh").read_text()
    assert not (tmp_path / "out").exists()
