"""RWKV's World tokenizer: llama.cpp takes the longest token of bytes, as its own code does."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("xllamacpp")
from vocab_runtime import tokenized, values, write_model

from adapterkit.errors import CheckpointError
from adapterkit.gguf.vocab import read_vocab
from adapterkit.gguf.vocab.world import FILE

WORDS = ("\n\n", " the", "the", "hello", "hell", "é", "日本", "日", "'s", '"', "\\", "  ")
TOKENS = [*(bytes([number]) for number in range(256)), *(word.encode() for word in WORDS if len(word.encode()) > 1)]


def vocabulary() -> bytes:
    """The file: bytes that are text as text, others as bytes, as the published one has them."""
    lines = []
    for number, token in enumerate(TOKENS, 1):
        try:
            shown: object = token.decode()
        except UnicodeDecodeError:
            shown = token
        lines.append(f"{number} {shown!r} {len(token)}")
    return ("\n".join(lines) + "\n").encode()


def longest(text: str) -> list[int]:
    rest, found = text.encode(), []
    while rest:
        token = max((one for one in TOKENS if rest.startswith(one)), key=len)
        found.append(TOKENS.index(token) + 1)
        rest = rest[len(token) :]
    return found


def test_llama_cpp_cuts_as_the_longest_token_does(tmp_path: Path) -> None:
    vocab = read_vocab({FILE: vocabulary()}, {"model_type": "rwkv7"}, kind="world", rows=288)
    said = values(vocab.entries)
    assert said["tokenizer.ggml.model"] == "rwkv"
    assert [said[f"tokenizer.ggml.{one}_token_id"] for one in ("bos", "eos")] == [0, 0]
    assert said["tokenizer.ggml.tokens"][said["tokenizer.ggml.eot_token_id"]] == "\\n\\n"
    texts = ["hello the hell", "日本日 é\n\n\n'quoted' \"x\" \\n", "it's\t\x00\x7fß", "  the   é\u00e9e\u0301 😀"]
    path = write_model(tmp_path / "m.gguf", vocab)
    answers = tokenized({path: [(text, False) for text in texts]})[path]
    assert answers == [longest(text) for text in texts]


@pytest.mark.parametrize("damage", [b"1 'a' 2\n", b"1 'a\n", b"x 'a' 1\n", b"1 print('a') 1\n", b"1\n"])
def test_a_damaged_file_is_one_sentence(damage: bytes) -> None:
    with pytest.raises(CheckpointError, match="damaged at line 1"):
        read_vocab({FILE: damage}, {}, kind="world", rows=288)
