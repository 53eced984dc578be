"""Several processes at one bucket of the Hub, at one moment and killed at any: the bytes of one process, or nothing is seen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub import TOKEN, client_of
from hub_buckets import EMPTY, Bucket, BucketHub, Wanted
from models import plain_adapter, plain_base
from plain_xet import keep
from test_writing import here

import adapterkit

for module in ("hf_xet", "huggingface_hub"):
    pytest.importorskip(module, reason=f"{module} is not installed")
pytestmark = pytest.mark.slow
NAME = "org/models"
ROOT = f"hf://buckets/{NAME}"
Start = Callable[..., "subprocess.Popen[str]"]


class PlainHub(BucketHub):
    """Its bytes lie in a folder, by their sha256."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = folder
        self.buckets[NAME] = Bucket()

    def size(self, hash: str) -> int | None:
        path = self.folder / hash
        return 0 if hash == EMPTY else path.stat().st_size if path.exists() else None

    def keep(self, data: bytes) -> str:
        return keep(self.folder, data)

    def files(self, prefix: str) -> dict[str, bytes]:
        held = self.buckets[NAME].files
        return {
            name.removeprefix(prefix): (self.folder / one.hash).read_bytes() if one.size else b""
            for name, one in held.items()
            if name.startswith(prefix)
        }

    @property
    def working(self) -> list[str]:
        return [name for name in self.buckets[NAME].files if name.startswith(".")]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PlainHub]:
    (tmp_path / "bytes").mkdir()
    with PlainHub(tmp_path / "bytes") as found, client_of(found, tmp_path / "cache", monkeypatch, TOKEN):
        yield found


@pytest.fixture
def start(hub: PlainHub, tmp_path: Path) -> Iterator[Start]:
    """Starts adapterkit in a process of its own."""
    begun: list[subprocess.Popen[str]] = []
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    env = {**os.environ, **own, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0"}
    env["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])

    def one(*given: object) -> subprocess.Popen[str]:
        command = [sys.executable, str(Path(__file__).with_name("plain_xet.py")), str(hub.folder), *map(str, given)]
        made = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        begun.append(made)
        return made

    yield one
    for process in begun:
        process.kill()
        process.communicate()


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    base = plain_base(tmp_path / "base", layers=4, width=64, shards=3)
    return base, plain_adapter(tmp_path / "adapter", base)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=900)
    return process.returncode, out + err


@pytest.mark.parametrize("verb", ["merge", "combine"])
def test_tasks_at_one_moment(verb: str, hub: PlainHub, start: Start, small: tuple[Path, Path], tmp_path: Path) -> None:
    """They begin together, and no task of the array is refused."""
    plan, given = tmp_path / "plan.json", {"merge": {}, "combine": {"method": "svd", "rank": 2}}[verb]
    inputs: Any = small if verb == "merge" else ([small[1], small[1]],)
    getattr(adapterkit, verb)(*inputs, **given, save_plan=plan)
    getattr(adapterkit, verb)(*inputs, tmp_path / "whole", **given)
    size = "1GB" if verb == "merge" else "2KB"
    tasks = [start("run", plan, "-o", f"{ROOT}/out", "--task", n, "--tasks", 3, "--part-size", size) for n in range(3)]
    for process in tasks:
        code, said = ended(process)
        assert code == 0, said
    assert hub.files("out/") == here(tmp_path / "whole")
    assert hub.working == []


def test_two_runs_at_one_moment_are_kept_apart_or_seen(
    hub: PlainHub, start: Start, small: tuple[Path, Path], tmp_path: Path
) -> None:
    """The bucket keeps no conditions: whatever happens, what looks like a model is of one run."""
    wholes = {}
    for weight in ("1.0", "0.5"):
        adapterkit.merge(*small, tmp_path / weight, weights=float(weight))
        wholes[weight] = here(tmp_path / weight)
    met, gate = set[str](), time.monotonic() + 900

    def together(wanted: Wanted) -> None:
        """Both look for a claim before one of them makes it."""
        if any(line["path"].endswith("claim.json") and line["type"] == "addFile" for line in wanted.lines):
            met.add(str(wanted.number))
            while len(met) < 2 and time.monotonic() < gate:
                time.sleep(0.01)

    hub.rule = together  # type: ignore[assignment]
    runs = [start("merge", *small, "-o", f"{ROOT}/out", "--weight", weight) for weight in wholes]
    codes = [ended(process) for process in runs]
    hub.rule = None
    found = hub.files("out/")
    if {"config.json", "model.safetensors.index.json"} & found.keys():
        assert found in wholes.values(), codes
    assert 0 in [code for code, _ in codes] or "config.json" not in found
    assert any(code for code, _ in codes), "one of them is told"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_process_that_is_killed(
    share: float, hub: PlainHub, start: Start, small: tuple[Path, Path], tmp_path: Path
) -> None:
    adapterkit.merge(*small, tmp_path / "whole")
    assert ended(start("merge", *small, "-o", f"{ROOT}/first"))[0] == 0
    total = sum(1 for one in hub.asked if one.path.endswith("/batch"))
    hub.clear()
    running: list[subprocess.Popen[str]] = []

    def kill(wanted: Wanted) -> None:
        if sum(1 for one in hub.asked if one.path.endswith("/batch")) > share * total and running:
            os.kill(running[0].pid, signal.SIGKILL)

    hub.rule = kill  # type: ignore[assignment]
    running.append(start("merge", *small, "-o", f"{ROOT}/out", "--resume"))
    assert ended(running[0])[0] == -signal.SIGKILL
    hub.clear()
    assert "model.safetensors.index.json" not in hub.files("out/")
    assert hub.working
    code, said = ended(start("merge", *small, "-o", f"{ROOT}/out", "--resume"))
    assert code == 0, said
    assert hub.files("out/") == here(tmp_path / "whole")
    assert hub.working == []
