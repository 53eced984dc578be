"""Ray executes a plan: actors of a cluster that is started for the run, or of one that is there."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from engine_case import Case, events, kill_workers

from adapterkit.errors import MissingPackage, OutputError
from adapterkit.verbs.engines.on_ray import RayPool
from adapterkit.verbs.engines.pool import WorkerSetting

SMALL = "20KB"
SETTING = WorkerSetting("", "", "out", None, 1)


def test_ray_makes_every_byte_though_actors_are_killed(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    log, out = tmp_path / "events", tmp_path / "out"
    command = case.command("run", case.plan, "-o", out, "--on", "ray", "--workers", 2, "--part-size", SMALL)
    running = subprocess.Popen([*command, "--events", str(log), "--json"], stdout=subprocess.PIPE, text=True)
    killed = kill_workers(running, log, 2)
    report = json.loads(running.communicate(timeout=250)[0])
    assert running.returncode == 0, report
    assert report["lost"] == killed == 2
    assert (report["on"], report["workers"]) == ("ray", 2)
    assert case.same(out)
    assert report["bytes_written"] == report["nbytes"]
    found = events(log)
    assert report["parts"] == sum(one["event"] == "part-ended" for one in found) > 4
    assert sum(one["reads"] for one in found if one["event"] == "part-ended") == report["bytes_read"]


@pytest.mark.slow
def test_a_cluster_that_is_there(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    port = 26379
    start = [*ray, "start", "--head", "--block", f"--port={port}", "--num-cpus=4", "--include-dashboard=false"]
    head = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        with socket.socket() as probe:
            while probe.connect_ex(("127.0.0.1", port)):
                assert head.poll() is None
                time.sleep(0.2)
        given = ("--on", "ray", "--jobs", 1, "--address", f"127.0.0.1:{port}")
        report = case.run(*("run", case.plan, "-o", tmp_path / "out", "--part-size", SMALL, "--workers", 4), *given)
        assert report["workers"] == 4
        assert case.same(tmp_path / "out")
        case.run("merge", case.base, case.adapter, "-o", tmp_path / "other", "--weight", 2, "--workers", 2, *given)
        assert not case.same(tmp_path / "other")
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(60)


def test_without_ray_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackage, match=r"adapterkit\[ray\]"):
        RayPool(SETTING, None, 1)


def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoRay:
        @staticmethod
        def is_initialized() -> bool:
            return False

        @staticmethod
        def init(**_: object) -> None:
            raise ConnectionError("Failed to connect to head\nand much more")

    monkeypatch.setitem(sys.modules, "ray", NoRay)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match=r"Ray does not answer at auto \(Failed to connect to head\)"):
        RayPool(SETTING, "auto", 1)


def test_ray_that_starts_too_slowly_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence is that of ray/_private/node.py, where 30 seconds are fixed; a busy machine may need more."""
    said: list[str] = []

    class Slow:
        is_initialized = staticmethod(lambda: False)
        shutdown = staticmethod(lambda: said.append("shutdown"))

        @staticmethod
        def init(**how: object) -> None:
            said.append("init")
            if said.count("init") == 3 and how["address"] == "local":
                raise ConnectionError("another cause")
            raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setitem(sys.modules, "ray", Slow)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="another cause"):
        RayPool(SETTING, None, 1)
    assert said == ["init", "shutdown", "init", "shutdown", "init"]
    said.clear()
    with pytest.raises(OutputError, match="timed out"):
        RayPool(SETTING, "auto", 1)
    assert said == ["init"]  # a cluster that is there is not ours to start
