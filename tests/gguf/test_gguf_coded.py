"""Architectures with code of their own: llama.cpp computes what their published formula says, and GGUF goes both ways."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("xllamacpp")
import arch_zoo as zoo
import coded_zoo
from coded_zoo_encoders import ENCODERS
from coded_zoo_moe import MOE
from coded_zoo_more import MORE
from gguf_runtime import PROMPTS, embeddings, far, logprobs

from adapterkit.errors import TargetError
from adapterkit.gguf.arch.config import TEXT_PARTS, Config
from adapterkit.gguf.arch.table import spec_of
from adapterkit.verbs.convert import convert

CODED = {**coded_zoo.DENSE, **MOE, **ENCODERS, **MORE}
FAST = ("openelm", "neobert")


@pytest.fixture(autouse=True)
def _vocab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", zoo.read_vocab)


@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in CODED])
def test_the_runtime_computes_the_formula(kind: str, tmp_path: Path) -> None:
    one = CODED[kind]
    weights = coded_zoo.build(tmp_path / "hf", one)
    convert(tmp_path / "hf", tmp_path / "base.gguf")
    if not one.causal:
        found, wanted = embeddings(tmp_path / "base.gguf"), coded_zoo.embeddings_of(one, weights, PROMPTS)
    elif one.run is not None:
        size = one.config.get("vocab_size", coded_zoo.VOCAB)
        found = logprobs(tmp_path / "base.gguf", vocab=size, ubatch=one.ubatch)[0]
        wanted = coded_zoo.logprobs_of(one, weights, PROMPTS)
    else:  # no formula here: the runtime loads it
        assert logprobs(tmp_path / "base.gguf")[0].std() > 0.1
        return
    assert far(found, wanted) < one.tolerance


@pytest.mark.parametrize("kind", CODED)
def test_to_gguf_and_back_to_the_same_bytes(kind: str, tmp_path: Path) -> None:
    coded_zoo.build(tmp_path / "hf", CODED[kind])
    convert(tmp_path / "hf", tmp_path / "one.gguf")
    convert(tmp_path / "one.gguf", tmp_path / "back", to="hf")
    convert(tmp_path / "back", tmp_path / "two.gguf")
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()


@pytest.mark.parametrize("kind", CODED)
def test_a_config_that_the_runtime_has_built_in_otherwise_is_refused(kind: str, tmp_path: Path) -> None:
    """Every `Fixed` of the row, with another value."""
    import dataclasses

    one = CODED[kind]
    spec = spec_of(Config(one.config))
    tried = 0
    for fixed in spec.fixed:
        if fixed.when is not None or callable(fixed.value):
            continue
        field = fixed.field.removeprefix("rope.")  # of any place that says how positions are rotated
        other = not fixed.value if isinstance(fixed.value, bool) else "tanh" if isinstance(fixed.value, str) else 11
        part = next((name for name in TEXT_PARTS if name in one.config), None)
        inner = {field: other} if part is None else {part: {**one.config[part], field: other}}
        wrong = dataclasses.replace(one, config={**one.config, **inner})
        folder = tmp_path / field
        coded_zoo.build(folder, wrong)
        with pytest.raises(TargetError, match=field):
            convert(folder, tmp_path / "no.gguf")
        tried += 1
    assert tried or all(callable(fixed.value) or fixed.when for fixed in spec.fixed)
    assert not (tmp_path / "no.gguf").exists()


def test_scaled_positions_of_a_row_with_keys_of_its_own_stay(tmp_path: Path) -> None:
    """CodeShell's files say a scaling by 1; a config that stretches positions says its own."""
    import dataclasses

    from gguf import GGUFReader

    one = CODED["codeshell"]
    for name, scaling, factor in (("plain", None, 1.0), ("twice", {"type": "linear", "factor": 2.0}, 2.0)):
        at = tmp_path / name
        coded_zoo.build(at / "hf", dataclasses.replace(one, config={**one.config, "rope_scaling": scaling}))
        convert(at / "hf", at / "one.gguf")
        assert GGUFReader(at / "one.gguf").fields["codeshell.rope.scaling.factor"].contents() == factor
        convert(at / "one.gguf", at / "back", to="hf")
        convert(at / "back", at / "two.gguf")
        assert (at / "two.gguf").read_bytes() == (at / "one.gguf").read_bytes()
