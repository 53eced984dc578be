"""llama.cpp holds back a token that is a part of a character; its figures are asked for all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import adapterkit
from adapterkit.gguf.quantize import Quantization
from adapterkit.verbs.verify.runtime import InLlamaCpp

pytest.importorskip("xllamacpp", reason="xllamacpp has no build for this machine")


def test_positions_after_which_a_part_of_a_character_is_likeliest(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(["<s>", *alphabet])}, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, bos_token_id=0, eos_token_id=0, **sizes)).eval()
    part = inner.token_to_id("é".encode()[:1].decode("latin-1"))  # the first of its two bytes
    with torch.no_grad():
        model.lm_head.weight[part] = 0.7 * torch.randn(64)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapterkit.convert(tmp_path / "base", tmp_path / "m.gguf", quantization=Quantization("F32"))
    ids = tokenizer("a few words")["input_ids"]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    positions = [at for at in range(len(ids)) if int(expected[at].argmax()) == part]
    assert positions
    server = InLlamaCpp(tmp_path / "m.gguf", "xllamacpp", 64, 257)
    try:
        found = torch.from_numpy(server.logprobs(ids, positions))
    finally:
        server.close()
    assert float((found - expected[positions]).abs().max()) <= 1e-3
