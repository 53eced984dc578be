"""Tied embeddings: the merged model must answer as the live one, also where PEFT's merge does not.

The cases are those of PEFT issues 2018 and 2777 and transformers issue 45127.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import apart, live, load_model, logits, make_adapter, plain_adapter, plain_base, read_tensors, write_adapter

import adapterkit

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BOTH = ["embed_tokens", "lm_head"]

CASES: dict[str, dict[str, Any]] = {
    "lora_on_embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora_on_head": {"target_modules": ["q_proj", "lm_head"]},
    "lora_on_both": {"target_modules": BOTH},
    "dora_on_both": {"target_modules": BOTH, "use_dora": True},
    "kept_tied_on_both": {"target_modules": BOTH, "ensure_weight_tying": True},
    "kept_tied_on_embedding": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "saved_embedding": {"modules_to_save": ["embed_tokens"]},
    "saved_head": {"modules_to_save": ["lm_head"]},
    "saved_both": {"modules_to_save": BOTH},
    "saved_both_kept_tied": {"modules_to_save": BOTH, "ensure_weight_tying": True},
    "saved_embedding_kept_tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [3, 90]},
    "tokens_of_each": {"trainable_token_indices": {"embed_tokens": [3, 90], "lm_head": [5]}},
    "tokens_of_embedding": {"trainable_token_indices": {"embed_tokens": [3, 90]}},
    "tokens_of_head": {"trainable_token_indices": {"lm_head": [3, 90]}},
    "tokens_of_both": {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [3]}},
    "tokens_and_lora": {"trainable_token_indices": [3, 90], "target_modules": ["q_proj", "up_proj"]},
    "linear_only": {},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", CASES)
def test_peft_2018_tied_embeddings(
    name: str, kind: str, dtype: str, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    from peft import LoraConfig

    base = make_base(kind, dtype, tie_word_embeddings=True)
    assert HEAD not in read_tensors(base)
    fields = {"target_modules": ["q_proj"], **CASES[name]}
    if kind == "gpt2":
        text = json.dumps(fields).replace("embed_tokens", "wte")
        fields = json.loads(text.replace("q_proj", "c_attn").replace("up_proj", "c_fc"))
    trained: list[Any] = []
    adapter = make_adapter(tmp_path / "a", base, LoraConfig(r=4, lora_alpha=6, **fields), trained=trained)
    adapterkit.merge(base, [adapter], tmp_path / "out")

    # The model as it was saved is the oracle: PEFT drops keys of tied modules when it loads some of these files.
    merged = load_model(tmp_path / "out")
    assert apart(logits(merged), logits(trained[0])) < (2e-5 if dtype == "float32" else 0.05)
    assert merged.config.tie_word_embeddings is tied(trained[0])
    assert (HEAD in read_tensors(tmp_path / "out")) is not tied(trained[0])


def tied(model: Any) -> bool:
    """Whether embedding and output layer, as they act, have the same values."""
    width = model.get_input_embeddings().weight.shape[1]
    with torch.no_grad():
        rows = model.get_input_embeddings()(torch.arange(96))
        return torch.allclose(rows, model.get_output_embeddings()(torch.eye(width).to(rows.dtype)).T)


def test_head_of_the_same_values_stays_tied(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """An adapter that saved the tied module twice, with the same bytes, does not untie it."""
    base = make_base("llama", "bfloat16", tie_word_embeddings=True)
    weight = torch.randn(96, 32)
    keys = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
    adapter = write_adapter(
        tmp_path / "a", {key: weight.clone() for key in keys}, modules_to_save=["embed_tokens", "lm_head"]
    )
    adapterkit.merge(base, [adapter], tmp_path / "out")
    out = read_tensors(tmp_path / "out")
    assert HEAD not in out
    assert torch.equal(out[EMBED], weight.bfloat16())


def test_transformers_45127_extended_vocabulary_of_tied_model(make_base: Callable[..., Path], tmp_path: Path) -> None:
    """Tied, resized, and LoRA on the embedding: the saved, larger weight is what both sides start from."""
    from peft import LoraConfig

    base = make_base("llama", tie_word_embeddings=True)
    model = load_model(base)
    model.resize_token_embeddings(110, mean_resizing=False)
    model.save_pretrained(tmp_path / "grown")
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
    adapter = make_adapter(tmp_path / "a", tmp_path / "grown", config)
    adapterkit.merge(base, [adapter], tmp_path / "out")
    merged, theirs = load_model(tmp_path / "out"), logits(live(tmp_path / "grown", adapter))
    assert merged.config.vocab_size == 110
    assert apart(logits(merged), theirs) < 2e-5


def test_untied_base_is_not_tied_by_a_merge(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    adapterkit.merge(base, [plain_adapter(tmp_path / "a", base, modules=("lm_head",))], tmp_path / "out")
    before, after = read_tensors(base), read_tensors(tmp_path / "out")
    assert torch.equal(before[EMBED], after[EMBED])
    assert not torch.equal(before[HEAD], after[HEAD])
