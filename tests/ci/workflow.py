"""The steps of a composite action as a runner would run them: expressions are put in, scripts run by bash, outputs read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml


@dataclass
class Run:
    """What a run of an action left behind.

    Attributes:
        outputs: of the action.
        used: other actions that it asked for, with their inputs.
    """

    code: int
    log: str
    outputs: dict[str, str]
    summary: str
    steps: dict[str, dict[str, str]] = field(default_factory=dict)
    used: dict[str, dict[str, str]] = field(default_factory=dict)


def run_action(
    path: Path, given: Mapping[str, str], where: Path, env: Mapping[str, str], leave_out: Collection[str] = ()
) -> Run:
    """Run the steps of an ``action.yml`` that are shell scripts.

    Args:
        given: inputs; every one of them must be one that the action has.
        where: the folder that the job starts in, with a checkout in it.
        env: of the job, beside PATH.
        leave_out: names of steps whose work is done.
    """
    action = yaml.safe_load(path.read_text())
    assert action["runs"]["using"] == "composite"
    assert set(given) <= set(action["inputs"])
    inputs = {name: str(row.get("default", "")) for name, row in action["inputs"].items()} | dict(given)
    temp = where / ".runner"
    temp.mkdir()
    files = {name: temp / name for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY", "GITHUB_ENV", "GITHUB_PATH")}
    run = Run(0, "", {}, "")
    context = {"inputs": inputs, "runner": {"os": "Linux"}, "github": {"action_path": str(path.parent)}}
    for step in action["runs"]["steps"]:
        context["steps"] = {name: {"outputs": found} for name, found in run.steps.items()}
        if run.code or step.get("name") in leave_out or not holds(step.get("if", "true"), context):
            continue
        if "uses" in step:
            run.used[step["uses"]] = {name: fill(str(value), context) for name, value in step["with"].items()}
            continue
        for file in files.values():
            if file.name != "GITHUB_STEP_SUMMARY":
                file.write_text("")
        files["GITHUB_STEP_SUMMARY"].touch()
        assert step["shell"] == "bash"
        script = temp / "step.sh"
        assert "${{" not in step["run"], "inputs go through env, so that they are never code"
        script.write_text(step["run"])
        names = {name: fill(str(value), context) for name, value in step.get("env", {}).items()}
        # The Python of the job is the one that runs the tests, whatever else a shell would find.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        around = {"PATH": path, "RUNNER_TEMP": str(temp), "GITHUB_ACTIONS": "true", **env, **names}
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=where / fill(step.get("working-directory", "."), context),
            env={**around, **{name: str(file) for name, file in files.items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
        run.log += done.stdout
        run.code = done.returncode
        if "id" in step:
            lines = files["GITHUB_OUTPUT"].read_text().splitlines()
            run.steps[step["id"]] = dict(line.split("=", 1) for line in lines)
    context["steps"] = {name: {"outputs": found} for name, found in run.steps.items()}
    run.outputs = {name: fill(row["value"], context) for name, row in action["outputs"].items()}
    run.summary = files["GITHUB_STEP_SUMMARY"].read_text()
    return run


def fill(text: str, context: Mapping[str, Any]) -> str:
    """Text with its expressions put in; something that is not there is empty, as on a runner."""
    return re.sub(r"\$\{\{\s*([\w.-]+)\s*\}\}", lambda found: str(lookup(found[1], context)), text)


def lookup(name: str, context: Any) -> Any:
    for part in name.split("."):
        context = context.get(part, "") if isinstance(context, Mapping) else ""
    return context


def holds(condition: str, context: Mapping[str, Any]) -> bool:
    """A condition of comparisons joined by ``&&``."""
    for part in condition.split("&&"):
        found = re.fullmatch(r"\s*([\w.-]+)\s*(==|!=)\s*'([^']*)'\s*|\s*true\s*", part)
        assert found is not None, f"this runner does not understand {part!r}"
        if found[1] is not None and (lookup(found[1], context) == found[3]) != (found[2] == "=="):
            return False
    return True
