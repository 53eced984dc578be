"""The action's own steps, run by bash against this checkout in the surroundings of a GitHub runner."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from models import edit_config, plain_adapter, plain_base
from workflow import Run, run_action

ROOT = Path(__file__).parents[2]
ACTION = ROOT / "action.yml"
# What pip has already. Without --no-deps it would look through every package that is installed for conflicts: two seconds.
NOTHING = "--no-index --no-deps pip"
RECIPE = """\
base = "base"
adapters.style = "style"
outputs.merged = "build/merged"
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the action's own step installs the package from this checkout."""
    return tmp_path_factory.mktemp("site")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    base = plain_base(tmp_path / "base")
    plain_adapter(tmp_path / "style", base, base_model_name_or_path="someone/base")
    (tmp_path / "adapterkit.toml").write_text(RECIPE)
    return tmp_path


def act(job: Path, installed: Path, **given: str) -> Run:
    """Run the action; what it installs, the first time, is this checkout, without its dependencies, which are there."""
    done = (installed / "adapterkit").is_dir()
    install = f"--no-deps --no-build-isolation --no-cache-dir --no-compile --target {installed} {ROOT}"
    names = {name.replace("_", "-"): value for name, value in {"install": install, **given}.items()}
    shutil.rmtree(job / ".runner", ignore_errors=True)
    env = {"PYTHONPATH": str(installed), "HOME": str(job), "ADAPTERKIT_HOME": str(job / "home"), "HF_HUB_OFFLINE": "1"}
    return run_action(ACTION, names, job, env, ["Install"] if done and "install" not in given else [])


def used(run: Run, name: str) -> Any:
    """What an action was given; it is named by a commit, since a tag may come to mean another one."""
    (pinned,) = [one for one in run.used if one.startswith(f"{name}@")]
    assert re.fullmatch(r"[0-9a-f]{40}", pinned.partition("@")[2]), pinned
    return run.used[pinned]


def test_a_build_with_everything_around_it(job: Path, installed: Path) -> None:
    first = act(job, installed, locked="false")
    assert first.code == 0, first.log
    assert (first.outputs["changed"], first.outputs["ok"]) == ("1", "true")
    report = json.loads(Path(first.outputs["report"]).read_text())
    assert json.loads(first.outputs["digests"]) == {"merged": report["outputs"][0]["digest"]}
    assert re.search(rf"\| merged \| build/merged \| .* \| `{report['outputs'][0]['digest']}` \|", first.summary)
    assert used(first, "actions/setup-python") == {"python-version": "3.12"}
    # The next run finds the lock, and its digest is the key of the cache.
    again = act(job, installed)
    assert (again.code, again.outputs["changed"]) == (0, "0")
    lock = subprocess.check_output(["sha256sum", job / "adapterkit.lock"], text=True)[:64]
    assert used(again, "actions/cache")["key"] == f"adapterkit-Linux-{lock}"
    assert used(again, "actions/cache")["path"].splitlines()[0] == "././.adapterkit"
    # Something moved: the job fails, and the line of the lock is annotated.
    edit_config(job / "style", lora_alpha=9)
    moved = act(job, installed)
    assert (moved.code, moved.outputs["ok"], moved.outputs["report"]) == (3, "false", "")
    assert (
        "::error file=adapterkit.lock,line=1,title=adapterkit%3A CheckFailed::adapterkit.lock is of something"
        in moved.log
    )


def test_a_wrong_recipe_is_annotated(job: Path, installed: Path) -> None:
    (job / "sub").mkdir()
    (job / "sub/my.toml").write_text("bas = 1\n")
    run = act(job, installed, recipe="my.toml", working_directory="sub", locked="false", cache="false")
    assert run.code == 2
    assert "::error file=my.toml,line=1,title=adapterkit%3A RecipeError::there is no key 'bas'; did you mean" in run.log
    assert not any(name.startswith("actions/cache@") for name in run.used)


def test_a_plan(job: Path, installed: Path) -> None:
    run = act(job, installed, command="plan", locked="false")
    assert (run.code, run.outputs["changed"]) == (0, "")
    assert json.loads(Path(run.outputs["report"]).read_text())["passes"] == 1
    assert "| merged | build/merged | new: not made yet | base, style |" in run.summary
    assert not (job / "build").exists()


def test_check(job: Path, installed: Path) -> None:
    adapter = plain_adapter(job / "rs", job / "base", use_rslora=True, base_model_name_or_path="/home/me/base")
    asked = {"command": "check", "base": "base", "adapters": "style\n  \nrs\n", "sarif": "check.sarif"}
    run = act(job, installed, **asked)
    assert (run.code, run.outputs["ok"]) == (0, "true")
    line = next(
        n for n, text in enumerate((adapter / "adapter_config.json").read_text().split("\n"), 1) if "/home" in text
    )
    assert (
        f"::warning file=rs/adapter_config.json,line={line},title=adapterkit%3A local-base::it names its base"
        in run.log
    )
    results = json.loads((job / "check.sarif").read_text())["runs"][0]["results"]
    assert {row["ruleId"] for row in results} == {"local-base", "no-revision"}
    assert "| warning | rs/adapter_config.json" in run.summary
    other = plain_adapter(job / "other", plain_base(job / "base2", width=24))
    run = act(job, installed, command="check", base="base", adapters=other.name)
    assert (run.code, run.outputs["ok"]) == (1, "false")
    assert "::error file=other/adapter_config.json" in run.log


def test_folders_need_no_installation(job: Path, installed: Path) -> None:
    edit_config(job / "style", base_model_name_or_path="../base")
    run = act(job, installed, command="folders", adapters="style", sarif="folders.sarif", install="/nowhere")
    assert (run.code, run.outputs["ok"]) == (3, "false")
    assert "::error file=style/adapter_config.json,line=1,title=adapterkit%3A local-base::" in run.log
    assert len(json.loads((job / "folders.sarif").read_text())["runs"][0]["results"]) == 1


def test_inputs_are_never_code(job: Path, installed: Path) -> None:
    run = act(job, installed, command="check", base="$(touch hacked)", adapters="`touch hacked`\n; touch hacked")
    assert run.code == 7
    assert not (job / "hacked").exists()


def test_an_unknown_command(job: Path, installed: Path) -> None:
    run = act(job, installed, command="deploy")
    assert run.code == 2
    assert "'deploy' is no command of this action" in run.log


def test_the_token_of_a_trusted_publisher_is_asked_for_only_when_it_is_named() -> None:
    step = next(step for step in yaml.safe_load(ACTION.read_text())["runs"]["steps"] if step.get("id") == "run")
    head = step["run"].split("\n")[0]
    for given, seen in (("org/name", "org/name"), ("", "unset")):
        script = f'HF_OIDC_RESOURCE={given}\nexport HF_OIDC_RESOURCE\n{head}\necho "${{HF_OIDC_RESOURCE-unset}}"'
        assert subprocess.check_output(["bash", "-ec", script], text=True).strip() == seen


def test_the_gitlab_template(job: Path) -> None:
    parts = list(yaml.safe_load_all((ROOT / "templates/adapterkit.yml").read_text()))
    spec, jobs = parts[0]["spec"]["inputs"], parts[1]
    text = json.dumps(jobs["adapterkit"])
    assert set(re.findall(r"\$\[\[ inputs\.([\w-]+) \]\]", text)) == set(spec)
    filled = json.loads(
        re.sub(r"\$\[\[ inputs\.([\w-]+) \]\]", lambda found: str(spec[found[1]].get("default", "")), text)
    )
    assert filled["id_tokens"] == {"HF_OIDC_ID_TOKEN": {"aud": "https://huggingface.co"}}
    script = "\n".join(["set -e", *filled["script"]])
    given = {name: value for name, value in filled["variables"].items() if "$" not in value}
    env = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HOME": str(job),
        "HF_HUB_OFFLINE": "1",
        "ADAPTERKIT_HOME": str(job / "home"),
        "HF_OIDC_ID_TOKEN": "x",
        **given,
        "INSTALL": NOTHING,
        "ARGS": "",
    }
    done = subprocess.run(["bash", "-c", script], cwd=job, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((job / "adapterkit-report.json").read_text())["changed"] == 1


def test_arguments_are_split_as_a_shell_splits_them(job: Path, installed: Path) -> None:
    """Several lines, and quotes around a name with a space."""
    run = act(job, installed, command="plan", locked="false", args="--jobs 1\n--report 'my report.json'\n")
    assert run.code == 0, run.log
    assert json.loads((job / "my report.json").read_text())["outputs"]


def test_unbalanced_quotes_end_the_step(job: Path, installed: Path) -> None:
    run = act(job, installed, command="plan", locked="false", args="--report 'my report.json")
    assert run.code != 0
    assert not (job / "my report.json").exists()
