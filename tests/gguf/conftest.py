"""Tiny models that the GGUF tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from gguf_runtime import Tiny, of_model


@pytest.fixture(scope="package")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """A model of a kind of `gguf_zoo`, made once."""
    import gguf_zoo as zoo

    made: dict[str, Tiny] = {}

    def make(kind: str) -> Tiny:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = zoo.build(folder / "hf", kind)
            made[kind] = Tiny(
                folder / "hf", zoo.to_gguf(folder / "hf", kind, folder / "base.gguf"), of_model(model.float())
            )
        return made[kind]

    return make
