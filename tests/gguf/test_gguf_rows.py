"""Every row of the newer files of the table: a tiny model to GGUF, back, and to the same bytes again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import arch_zoo as zoo
import arch_zoo_more
import arch_zoo_wholes

from adapterkit.verbs.convert import convert


@pytest.mark.parametrize("kind", [*arch_zoo_more.MODELS, *arch_zoo_wholes.MODELS])
def test_to_gguf_and_back_to_the_same_bytes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime's figures are `test_the_runtime_agrees`; here only that each row says both directions."""
    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", zoo.read_vocab)
    zoo.build(tmp_path / "hf", kind)
    convert(tmp_path / "hf", tmp_path / "one.gguf")
    convert(tmp_path / "one.gguf", tmp_path / "back", to="hf")
    convert(tmp_path / "back", tmp_path / "two.gguf")
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
