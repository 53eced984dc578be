"""Hand-over: what a Modelfile's template writes is what the model's own chat template writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf_files import random_array, write_gguf
from jinja2.sandbox import ImmutableSandboxedEnvironment
from test_vocab import gpt2, packed
from vocab_runtime import write_model

from adapterkit.errors import UsageError
from adapterkit.gguf.vocab import read_vocab, render
from adapterkit.gguf.vocab.turns import turns_of
from adapterkit.serving.handover import handover, write_handover
from adapterkit.serving.modelfile import go_template

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{% for m in messages %}{% set content = '<|h|>' + m['role'] + '<|/h|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}"
)
# The system's text is part of the first turn, as in Gemma 3.
INSIDE = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first = messages[0]['content'] + '\n\n' -%}"
    "{%- set rest = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- for m in rest -%}{{ '<start>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "(first if loop.first else '') }}{{ m['content'] | trim }}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start>model\n' }}{%- endif -%}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}{{ raise_exception('no') }}{% endif %}"
    "{% endfor %}"
)
LINES = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n{% else %}\n"
    "{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
SIMPLE = {"chatml": CHATML, "headers": HEADERS, "inside": INSIDE, "no_system": NO_SYSTEM, "lines": LINES}
TOKENS = {"bos_token": "<|start|>", "eos_token": "<|end|>"}

U, A, S = {"role": "user"}, {"role": "assistant"}, {"role": "system"}
TALKS: list[list[dict[str, str]]] = [
    [U | {"content": "Hello?"}],
    [U | {"content": "a"}, A | {"content": "b"}, U | {"content": "What is 2 + 2?"}],
    [S | {"content": "Be brief."}, U | {"content": "Hi"}],
    [S | {"content": "Be brief."}, U | {"content": "1"}, A | {"content": "2"}, U | {"content": "3"}],
]


def by_jinja(template: str, talk: list[dict[str, str]]) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=talk, add_generation_prompt=True, **TOKENS)


def by_go(template: str, talk: list[dict[str, str]]) -> str:
    """A small interpreter of Go's template language: actions, if, else if, range, and the functions that are used here."""
    pieces = re.split(r"(\{\{.*?\}\})", template)
    system = "\n".join(m["content"] for m in talk if m["role"] == "system")

    def value(words: list[Any], scope: dict[str, Any]) -> Any:
        def one() -> Any:
            word = words.pop(0)
            if word == "(":
                found = call()
                assert words.pop(0) == ")"
                return found
            if word.startswith('"'):
                return word[1:-1]
            return int(word) if word.isdigit() else scope[word]

        def call() -> Any:
            name = words[0]
            if name not in ("eq", "ne", "and", "not", "len", "slice"):
                return one()
            words.pop(0)
            given = []
            while words and words[0] != ")":
                given.append(one())
            do: dict[str, Any] = {
                "eq": lambda a, b: a == b,
                "ne": lambda a, b: a != b,
                "and": lambda *all_: all_[-1] if all(all_) else False,
                "not": lambda a: not a,
                "len": len,
                "slice": lambda a, b: a[b:],
            }
            return do[name](*given)

        return call()

    def words(text: str) -> list[str]:
        return re.findall(r'"[^"]*"|[()]|[^\s()]+', text)

    def run(at: int, scope: dict[str, Any], live: bool) -> tuple[str, int]:
        """Text up to the ``else`` or ``end`` that closes this level, and where that stands."""
        out = ""
        while at < len(pieces):
            piece = pieces[at]
            if not piece.startswith("{{"):
                out += piece if live else ""
                at += 1
                continue
            action = words(piece[2:-2])
            if action[0] in ("else", "end"):
                return out, at
            if action[0] == "if":
                taken, told = False, action
                while told[0] != "end":
                    asked = told[2:] if told[0] == "else" else told[1:]
                    now = live and not taken and (not asked or bool(value(list(asked), scope)))
                    taken = taken or now
                    text, at = run(at + 1, scope, now)
                    out += text
                    told = words(pieces[at][2:-2])
                at += 1
            elif action[0] == "range":
                start, end = at + 1, at
                rows = talk if live else []
                for number, message in enumerate(rows):
                    inner = scope | {"$i": number, ".Role": message["role"], ".Content": message["content"]}
                    text, end = run(start, inner, live)
                    out += text
                if not rows:
                    _, end = run(start, scope | {"$i": 0, ".Role": "", ".Content": ""}, False)
                at = end + 1
            else:
                out += str(value(action, scope)) if live else ""
                at += 1
        return out, at

    scope = {".System": system, "$.System": system, "$.Messages": talk, ".Messages": talk}
    return run(0, scope, True)[0]


@pytest.mark.parametrize("name", SIMPLE)
def test_the_modelfiles_template_writes_what_the_chat_template_writes(name: str) -> None:
    turns = turns_of(SIMPLE[name], TOKENS)
    assert turns is not None
    written = go_template(turns)
    assert written is not None
    for talk in TALKS:
        if name == "no_system" and talk[0]["role"] == "system":
            continue
        assert by_go(written, talk) == by_jinja(SIMPLE[name], talk)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content.split('x')[0] }}{% endfor %}",
        "{% for m in messages %}{% if not loop.last or m.role == 'user' %}{{ m.role }}:{{ m.content }}{% endif %}{% endfor %}",
        "{{ missing.field.of.nothing }}",
    ],
)
def test_a_template_that_does_more_is_not_pretended_to_be_simple(template: str) -> None:
    assert turns_of(template, TOKENS) is None


def test_a_template_without_end_does_not_stop_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "LIMIT", 1.0)
    row = "{% for a in range(99999) %}"
    assert turns_of(row * 3 + "{% endfor %}" * 3, TOKENS) is None


def model(folder: Path, template: str, **config: Any) -> Path:
    settings = {"bos_token": "<|start|>", "eos_token": "<|end|>", "chat_template": template, "add_bos_token": True}
    data = gpt2(post_processor=None)
    data["added_tokens"].append({"id": 310, "content": "<|im_end|>", "special": True})
    vocab = read_vocab(packed(data, tokenizer_config__json=settings), config, kind="bpe", rows=320)
    return write_model(folder / "model.gguf", vocab)


def test_a_modelfile(tmp_path: Path) -> None:
    path = model(tmp_path, HEADERS)
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": true}'
    )
    found = write_handover(path, "ollama", beside=tmp_path)
    assert found.path == str(tmp_path / "model.gguf.Modelfile")
    text = Path(found.path).read_text()
    assert text.startswith("FROM ./model.gguf\n")
    assert 'PARAMETER stop "<|end|>"\nPARAMETER stop "<|im_end|>"\n' in text
    assert "PARAMETER temperature 0.6\nPARAMETER top_k 20\nPARAMETER top_p 0.95\n" in text
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.S)
    assert template is not None
    # The server puts <|start|> before a text itself.
    assert "<|start|>" + by_go(template[1], TALKS[1]) == by_jinja(HEADERS, TALKS[1])


def test_a_template_that_cannot_be_said_is_left_out_and_named(tmp_path: Path) -> None:
    found = handover(model(tmp_path, "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"), "ollama")
    assert "TEMPLATE" not in found.text
    assert "no TEMPLATE" in found.notes[0]


def test_llama_server(tmp_path: Path) -> None:
    path = model(tmp_path, HEADERS)
    found = handover(path, "llama.cpp", generation={"temperature": 0.7, "top_k": None})
    assert found.text == f"llama-server -m {path} --jinja --temp 0.7"
    script = Path(write_handover(path, "llama.cpp").path)
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "llama-server").write_text('#!/bin/sh\npwd; echo "$@"\n')
    (fake / "llama-server").chmod(0o755)
    said = subprocess.check_output([script, "--port", "1"], env={"PATH": f"{fake}:/usr/bin:/bin"}, text=True)
    assert said == f"{tmp_path}\n-m ./model.gguf --jinja --port 1\n"


def test_a_lora_file_is_loaded_beside_a_base(tmp_path: Path) -> None:
    said = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0}
    factors = {f"blk.0.attn_q.weight.lora_{side}": random_array(4, 4) for side in "ab"}
    path = write_gguf(tmp_path / "lora.gguf", factors, metadata=said)
    found = handover(path, "llama.cpp")
    assert found.text == f"llama-server -m BASE.gguf --lora {path}"
    assert "BASE.gguf" in found.notes[0]
    assert handover(path, "ollama").text.endswith(f"FROM BASE.gguf\nADAPTER {path}\n")


def test_by_the_command_line(tmp_path: Path) -> None:
    path = model(tmp_path, CHATML)
    command = [
        sys.executable,
        "-m",
        "adapterkit",
        "convert",
        path,
        "-o",
        tmp_path / "out.gguf",
        "--for",
        "ollama",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf.Modelfile").read_text().startswith("FROM ./out.gguf\nTEMPLATE ")
    done = subprocess.run([*command[:5], "-o", tmp_path / "folder", "--for", "ollama"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "for a GGUF output" in done.stderr
    assert not (tmp_path / "folder").exists()


def test_another_server(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'vllm' here"):
        handover(tmp_path / "model.gguf", "vllm")
