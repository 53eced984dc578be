"""llama.cpp's two ways to answer: its C functions, which decode once, and its server, which is asked for each position.

The server holds back a token that is a part of a character; its figures are asked for all the same.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

import adapterkit
from adapterkit.gguf.quantize import Quantization
from adapterkit.verbs.verify import runtime
from adapterkit.verbs.verify.decode_child import Refused, context_settings, model_settings
from adapterkit.verbs.verify.runtime import InLlamaCpp

pytest.importorskip("xllamacpp", reason="xllamacpp has no build for this machine")


def test_positions_after_which_a_part_of_a_character_is_likeliest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    _close(tmp_path / "m.gguf", ids, positions, expected, at_once=True)
    start = runtime._Inside._start

    def without(self: runtime._Inside, program: list[str], asked: str) -> None:
        start(self, ["-c", "print('NO such library')"] if self.at_once else program, asked)

    monkeypatch.setattr(runtime._Inside, "_start", without)
    _close(tmp_path / "m.gguf", ids, positions[:1], expected, at_once=False)


def _close(file: Path, ids: list[int], positions: list[int], expected: torch.Tensor, *, at_once: bool) -> None:
    """The answers of one way are transformers' own."""
    server = InLlamaCpp(file, "xllamacpp", 64, 257)
    try:
        assert isinstance(server._server, runtime._Inside)
        assert server._server.at_once is at_once
        found = torch.from_numpy(server.logprobs(ids, positions))
    finally:
        server.close()
    assert found.shape == (len(positions), 257)
    assert float((found - expected[positions]).abs().max()) <= 1e-3


def defaults(**changed: int) -> bytes:
    """The defaults of llama_context_params as a release of October 2026 has them, with some numbers changed."""
    numbers = [512, 2048, 512, 1, 0, 0, 1, 4, 4, 0, -1, -1, -1, -1, 0, 0, *[-1082130432] * 4, 0, -1082130432]
    numbers += [0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 16843008, 1]
    for at, number in changed.items():
        numbers[int(at.removeprefix("n"))] = number
    return struct.pack(f"<{len(numbers)}i", *numbers).ljust(1024, b"\0")


def test_settings_go_to_their_places() -> None:
    before, after = (struct.unpack_from("<30i", data, 0) for data in (defaults(), context_settings(defaults(), 700, 3)))
    changed = {at: after[at] for at in range(30) if after[at] != before[at]}
    # context, batch, threads, flash attention off, keys and values in float32 (type 0)
    assert changed == {0: 700, 1: 700, 7: 3, 8: 3, 13: 0, 26: 0, 27: 0}
    assert struct.unpack_from("<i", model_settings(bytes(16) + struct.pack("<i", -1) + bytes(8)), 16) == (0,)


@pytest.mark.parametrize("changed", [{"n0": 513}, {"n7": 5}, {"n12": 0}, {"n26": 8}, {"n25": 9}, {"n3": 2}])
def test_a_structure_that_is_not_as_it_is_known_is_left_alone(changed: dict[str, int]) -> None:
    with pytest.raises(Refused):
        context_settings(defaults(**changed), 700, 3)


def test_a_model_structure_that_is_not_as_it_is_known() -> None:
    with pytest.raises(Refused):
        model_settings(bytes(16) + struct.pack("<i", 7) + bytes(8))
    with pytest.raises(Refused):
        model_settings(b"\1" + bytes(23))
