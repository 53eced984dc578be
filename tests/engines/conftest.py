"""What the tests of engines share; see `engine_case`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from models import plain_adapter, plain_base

sys.path.insert(0, str(Path(__file__).parent))
from engine_case import Case

import adapterkit
from adapterkit.verbs.plan_merge import plan_merge


@pytest.fixture
def case(tmp_path: Path) -> Case:
    base = plain_base(tmp_path / "base", layers=6, width=64, shards=2)
    adapter = plain_adapter(tmp_path / "adapter", base)
    adapterkit.merge(base, [adapter], tmp_path / "whole")
    (tmp_path / "plan.json").write_text(plan_merge(base, [adapter]).plan.to_json())
    return Case(tmp_path, base, adapter)
