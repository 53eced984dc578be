"""From a Hugging Face folder to GGUF in one pass: a real llama.cpp computes what transformers and PEFT compute."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
import arch_zoo as zoo
from gguf_runtime import logprobs, of_model
from models import load_model, make_adapter

import adapterkit
from adapterkit.convert import convert

FAST = ("llama", "gemma2", "phi3_longrope")


@pytest.fixture(autouse=True)
def _vocab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", zoo.read_vocab)


@pytest.mark.parametrize("kind", [k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in zoo.ZOO])
def test_the_runtime_agrees(kind: str, tmp_path: Path) -> None:
    tiny, hf = zoo.ZOO[kind], tmp_path / "hf"
    plain = of_model(zoo.build(hf, kind))
    convert(hf, tmp_path / "base.gguf")
    assert far(logprobs(tmp_path / "base.gguf")[0], plain) < tiny.tolerance

    adapter = make_adapter(tmp_path / "adapter", hf, lora(tiny), scale=0.1)
    expected = live(hf, adapter, tiny.patch)
    assert far(expected, plain) > 0.01
    adapterkit.merge(hf, [adapter], tmp_path / "merged.gguf")
    assert far(logprobs(tmp_path / "merged.gguf")[0], expected) < tiny.tolerance


def lora(tiny: zoo.Tiny) -> Any:
    from peft import LoraConfig

    more = {"target_parameters": list(tiny.parameters)} if tiny.parameters else {}
    return LoraConfig(r=4, lora_alpha=8, target_modules=tiny.lora, **more)


def live(base: Path, adapter: Path, patch: Any = None) -> Any:
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(base), adapter).float().eval()
    if patch is not None:
        patch(model)
    return of_model(model)


def far(one: Any, other: Any) -> float:
    return float(abs(one - other).max())
