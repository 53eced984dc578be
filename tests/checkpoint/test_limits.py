"""What containers have: limits by cgroups(7), and cores by them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapterkit.checkpoint import limits
from adapterkit.checkpoint.plan import default_jobs


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(limits, "OF_PROCESS", tmp_path / "own")
    monkeypatch.setattr(limits, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    return tmp_path


def test_a_container_may_have_fewer_cores(place: Path) -> None:
    """Version 2 has `cpu.max`, version 1 two files, and the smallest share of all groups around the process counts."""
    assert limits.cores() == 64
    assert default_jobs() == 8  # the default is bounded; the option is not
    (place / "own").write_text("0::/box/inner\n")
    inner = place / "groups/box/inner"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    assert limits.cores() == 64
    (inner.parent / "cpu.max").write_text("290000 100000\n")
    assert limits.cores() == default_jobs() == 3
    (place / "own").write_text("4:cpu,cpuacct:/old\n3:memory:/old\n")
    old = place / "groups/cpu/old"
    old.mkdir(parents=True)
    (old / "cpu.cfs_period_us").write_text("100000\n")
    assert limits.cores() == 64  # half of a limit is none
    (old / "cpu.cfs_quota_us").write_text("-1\n")
    assert limits.cores() == 64
    (old / "cpu.cfs_quota_us").write_text("50000\n")
    assert limits.cores() == 1


def test_odd_lines_are_passed_over(place: Path) -> None:
    (place / "own").write_bytes(b"odd\n1:name=systemd:/x\xff\n0::/box\n")
    (place / "groups/box").mkdir(parents=True)
    (place / "groups/box/cpu.max").write_text("")
    assert list(limits._said("cpu", "cpu.max")) == [""]
    assert limits.cores() == 64
