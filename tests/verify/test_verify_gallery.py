"""Every exhibit of the gallery is caught by the tensor level, and called by its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("peft")
pytest.importorskip("gguf")
from adapterkit.verbs.verify import verify
from bench.proofs import gallery

if TYPE_CHECKING:
    from bench.proofs.gallery import Broken

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")


@pytest.mark.parametrize("name", gallery.CASES)
def test_a_broken_merge_is_called_by_its_name(name: str, tmp_path: Path) -> None:
    if name == "NF4 on NF4":
        pytest.importorskip("bitsandbytes")
    broken: Broken = gallery.CASES[name](tmp_path)
    report = verify(broken.merged, base=broken.base, adapters=broken.adapters, **broken.options)
    assert not report.ok
    assert broken.kind in [finding.kind for finding in report.errors], report.errors
    # One mistake, one name: nothing else is made of it, but for what follows from it.
    assert {finding.kind for finding in report.errors} - {broken.kind} <= gallery.FOLLOWS.get(broken.kind, set())
