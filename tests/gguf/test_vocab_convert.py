"""Tokenizers on their way through `convert`: what is wrong is said in one sentence, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_vocab import gpt2, other_split
from vocab_zoo import sentencepiece_model

from adapterkit.errors import CheckpointError
from adapterkit.gguf.checkpoint import open_gguf
from adapterkit.verbs.convert import convert


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("model") / "hf"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=320, num_key_value_heads=2, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(gpt2()))
    return folder


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"tokenizer.json": None}, "no tokenizer files"),
    "contradiction": ({"tokenizer.model": "spm"}, "keep the files of one tokenizer"),
    "pre": ({"tokenizer.json": "split"}, "llama.cpp has no pre-tokenizer that splits by"),
    "larger": ({"tokenizer.json": "large"}, "tokens and the embedding 320 rows"),
    "template": ({"chat_template.jinja": b"{% if %}"}, "chat_template.jinja does not parse: line 1"),
    "cut": ({"tokenizer.json": b'{"model": {"vo'}, "tokenizer.json is not valid JSON"),
}


def changed(model: Path, folder: Path, changes: dict[str, Any]) -> Path:
    large = gpt2()
    large["model"]["vocab"] |= {f"word{n}": n for n in range(310, 330)}
    made = {
        "spm": sentencepiece_model("bpe"),
        "split": json.dumps(gpt2(pre_tokenizer=other_split())).encode(),
        "large": json.dumps(large).encode(),
    }
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name, data in changes.items():
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(made.get(data, data) if isinstance(data, str) else data)
    return folder


@pytest.mark.parametrize("name", WRONG)
def test_refused_and_nothing_left(name: str, model: Path, tmp_path: Path) -> None:
    changes, says = WRONG[name]
    source = changed(model, tmp_path / "hf", changes)
    with pytest.raises(CheckpointError, match=says):
        convert(source, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_pre_by_name_and_its_note_on_the_command_line(model: Path, tmp_path: Path) -> None:
    source = changed(model, tmp_path / "hf", WRONG["pre"][0])
    command = [sys.executable, "-m", "adapterkit", "convert", source, "-o", tmp_path / "out.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1
    assert done.stderr.startswith("error: llama.cpp has no pre-tokenizer")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out.gguf").exists()
    done = subprocess.run([*command, "--pre", "qwen2"], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    header = open_gguf(tmp_path / "out.gguf").header
    assert header["tokenizer.ggml.pre"] == "qwen2"
    assert len(header["tokenizer.ggml.tokens"]) == 320
