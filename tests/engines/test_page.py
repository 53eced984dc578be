"""The page on clusters: its commands are executed as they stand there, with small models in the place of large ones."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from adapterkit.cli import app, main

PAGE = (Path(__file__).parents[2] / "docs/cluster.md").read_text(encoding="utf-8")
COMMANDS = [
    line.removeprefix("$ ")
    for block in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
# What is another here: models of a few kilobytes, workers of this machine, another name for each output.
HERE = {
    "s3://models/base": "base",
    "s3://models/adapter": "adapter",
    "s3://models/merged": "merged",
    "--address auto": "",
}


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("adapterkit ")])
def test_a_command_of_the_page(command: str, case: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for word, other in HERE.items():
        command = command.replace(word, other)
    command = command.replace("--on ray", "--on local").replace("--workers 64", "--workers 2")
    words = shlex.split(command.partition(" > ")[0])[1:]
    monkeypatch.chdir(tmp_path)
    if "mine.sh" in words:
        (tmp_path / "mine.sh").write_text("{{command}} {{partition=small}}\n")
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    if "--on" in words:
        engine = words[words.index("--on") + 1]
        made = {"local": "merged", "slurm": "merged.slurm.sh", "k8s": "merged.k8s.yaml"}[engine]
        assert os.path.lexists(tmp_path / made)


def test_the_other_commands_are_those_of_the_schedulers() -> None:
    others = [line for line in COMMANDS if not line.startswith("adapterkit ")]
    assert others == ["pip install 'adapterkit[ray]'", "sbatch merged.slurm.sh", "kubectl apply -f merged.k8s.yaml"]


def test_every_option_that_the_page_names_is_one() -> None:
    import click

    known = set()
    for verb in ("run", "merge", "combine", "verify"):
        command = app.get_command(click.Context(app), verb)
        assert command is not None
        known |= {flag for parameter in command.params for flag in parameter.opts}
    assert set(re.findall(r"--[a-z][a-z-]+", PAGE)) - {"--json"} <= known | {"--json"}
