"""Small inputs, and disks that lack something."""

from __future__ import annotations

from pathlib import Path

import pytest
from lacking import lacking  # noqa: F401  (a fixture)
from models import plain_adapter, plain_base


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    base = plain_base(folder / "base", layers=2, shards=2)
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    return base, plain_adapter(folder / "adapter", base)
