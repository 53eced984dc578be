"""A tiny language model that was trained here, its adapter, and merges of them, right and wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from adapterkit.verbs.verify import verify
from adapterkit.verbs.verify.report import VerifyReport


@dataclass(frozen=True)
class Trained:
    """Folders; ``broken`` is the merge without what the adapter does to layer 1."""

    base: Path
    adapter: Path
    merged: Path
    broken: Path
    prompts: Path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from models import read_tensors, write_checkpoint

    from adapterkit.verbs.demo import demo

    folder = tmp_path_factory.mktemp("trained")
    demo(folder)
    base, merged = folder / "base", folder / "merged"
    before, tensors = read_tensors(base), read_tensors(merged)
    for name in tensors:
        if ".layers.1." in name:
            tensors[name] = before[name]
    broken = write_checkpoint(folder / "broken", tensors, json.loads((merged / "config.json").read_text()))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, broken / name)
    prompts = folder / "prompts.txt"
    prompts.write_text("the sky is grey\n\nsnow is old\n\na lemon is bitter the grass is brown\n")
    return Trained(base, folder / "adapter", merged, broken, prompts)


@pytest.fixture(scope="session")
def broken_report(trained: Trained) -> VerifyReport:
    """Every level of the broken merge."""
    return verify(trained.broken, base=trained.base, adapters=[trained.adapter], level="model", prompts=trained.prompts)
