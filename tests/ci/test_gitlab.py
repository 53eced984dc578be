"""The GitLab template: its inputs put in as GitLab does, and its script run by a shell against this checkout."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from models import plain_adapter, plain_base

ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "templates/adapterkit.yml"


def job(**given: str) -> dict[str, Any]:
    """The job that the template makes of inputs."""
    head, body = TEMPLATE.read_text().split("\n---\n")
    known = yaml.safe_load(head)["spec"]["inputs"]
    assert set(given) <= set(known)
    inputs = {name: row["default"] for name, row in known.items()} | given
    filled = re.sub(r"\$\[\[ inputs\.([\w-]+) \]\]", lambda found: str(inputs[found[1]]), body)
    assert "$[[" not in filled
    made: dict[str, Any] = yaml.safe_load(filled)["adapterkit"]
    return made


def run(made: dict[str, Any], where: Path) -> subprocess.CompletedProcess[str]:
    """Run the script of a job, with its variables."""
    around = {name: str(value).replace("$CI_PROJECT_DIR", str(where)) for name, value in made["variables"].items()}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    more = {"PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(where), "HF_OIDC_ID_TOKEN": "x", "HF_HUB_OFFLINE": "1"}
    script = "set -eo pipefail\n" + "\n".join(made["script"])
    return subprocess.run(
        ["bash", "-c", script], cwd=where, env={**around, **more}, capture_output=True, text=True, timeout=240
    )


def test_a_build_against_its_lock(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "style", plain_base(tmp_path / "base"), base_model_name_or_path="someone/base")
    (tmp_path / "my.toml").write_text('base = "base"\nadapters.style = "style"\noutputs.merged = "build/merged"\n')
    # What is installed is there already, and the script's own commands for it are run all the same.
    with_what = {"recipe": "my.toml", "lock": "my.lock", "install": "--no-index pip", "torch-index": ""}
    made = job(**with_what, args="")
    done = run(made, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "adapterkit-report.json").read_text())["changed"] == 1
    assert made["cache"]["key"]["files"] == ["my.lock"]
    assert (tmp_path / made["cache"]["key"]["files"][0]).is_file()
    assert made["artifacts"]["paths"] == ["adapterkit-report.json", "build/"]
    # The next pipeline holds everything against the lock, the plan too.
    assert run(job(**with_what), tmp_path).returncode == 0
    config = tmp_path / "style/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    moved = run(job(**with_what), tmp_path)
    assert moved.returncode == 3
    assert "my.lock is of something" in moved.stderr
    assert "Traceback" not in moved.stderr


def test_the_build_without_cuda_is_the_default() -> None:
    made = job()
    assert made["variables"]["TORCH_INDEX"] == "https://download.pytorch.org/whl/cpu"
    install = [line for line in made["script"] if "pip install" in line]
    assert "torch --index-url" in install[0]
    assert install[1].endswith("$INSTALL")
