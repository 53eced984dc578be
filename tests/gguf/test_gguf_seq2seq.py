"""T5, mT5 and UMT5: a real llama.cpp encodes the prompt and decodes what transformers does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("xllamacpp")
import arch_zoo as zoo
from gguf_runtime import PROMPTS, far, lora
from llama_c import seq2seq
from models import load_model, make_adapter, randomize

import adapterkit
from adapterkit.errors import CheckpointError, TargetError
from adapterkit.verbs.convert import convert

_T5 = {"vocab_size": 288, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", {}),
    "t5_1_1": ("T5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "umt5": ("UMT5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu"}),
    "mt5": ("MT5ForConditionalGeneration", {"feed_forward_proj": "gated-gelu", "num_decoder_layers": 1}),
}


@pytest.fixture(autouse=True)
def _vocab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapterkit.gguf.vocab.read_vocab", zoo.read_vocab)


def build(folder: Path, kind: str) -> Any:
    import torch
    import transformers

    cls = getattr(transformers, KINDS[kind][0])
    torch.manual_seed(0)
    model = cls(cls.config_class(**_T5, decoder_start_token_id=0, **KINDS[kind][1])).float().eval()
    randomize(model, scale=0.15)
    model.save_pretrained(folder)
    return model


def answers(model: Any) -> Any:
    import numpy as np
    import torch

    rows = []
    with torch.no_grad():
        for prompt in PROMPTS:
            found = model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0]])).logits[0, -1]
            rows.append(torch.log_softmax(found.double(), -1).numpy())
    return np.array(rows)


@pytest.mark.parametrize(
    "kind", ["t5", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind != "t5")]
)
def test_the_runtime_agrees(kind: str, tmp_path: Path) -> None:
    plain = answers(build(tmp_path / "hf", kind))
    convert(tmp_path / "hf", tmp_path / "one.gguf")
    assert far(seq2seq(tmp_path / "one.gguf", PROMPTS), plain) < 2e-3  # ggml has its caches in half precision
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "hf", lora(target_modules=["q", "v", "wo"]), scale=0.1)
    from peft import PeftModel

    expected = answers(PeftModel.from_pretrained(load_model(tmp_path / "hf"), adapter).float().eval())
    assert far(expected, plain) > 0.01
    adapterkit.merge(tmp_path / "hf", [adapter], tmp_path / "merged.gguf")
    assert far(seq2seq(tmp_path / "merged.gguf", PROMPTS), expected) < 2e-3
    convert(tmp_path / "one.gguf", tmp_path / "back", to="hf")
    convert(tmp_path / "back", tmp_path / "two.gguf")
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()
    assert far(answers(load_model(tmp_path / "back").float().eval()), plain) < 1e-5


def test_other_activations_and_distances_are_refused(tmp_path: Path) -> None:
    import json

    build(tmp_path / "hf", "t5")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for change, named in (
        ({"feed_forward_proj": "gated-silu"}, "gated-silu"),
        ({"relative_attention_max_distance": 64}, "relative_attention_max_distance"),
        ({"num_decoder_layers": 3}, "num_decoder_layers"),
    ):
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises((CheckpointError, TargetError), match=named):
            convert(tmp_path / "hf", tmp_path / "no.gguf")
        assert not (tmp_path / "no.gguf").exists()
