"""Inputs made to cost time or memory, and text made to be taken for a command."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import regex
from models import edit_config, plain_adapter, plain_base

import adapterkit
from adapterkit.adapters.config import AdapterConfig
from adapterkit.checkpoint.json_data import parse_json
from adapterkit.cli import main
from adapterkit.cli.output import clean, show_json
from adapterkit.errors import AdapterError, AdapterkitError, CheckpointError
from adapterkit.foreign import MAX_DEPTH
from adapterkit.gguf.vocab import render

# ------------------------------------------------------------------ patterns


def peft_value(patterns: dict[str, int], module: str) -> int | None:
    """The rule of PEFT's `get_pattern_key`: the first pattern that matches the end of the path, at a dot."""
    return next((value for key, value in patterns.items() if regex.match(rf"(.*\.)?({key})$", module)), None)


def test_patterns_are_looked_up_as_peft_matches_them() -> None:
    patterns = {
        "layers.1.q_proj": 1,
        r"layers\.[0-9]+\.q_proj": 2,
        "q.proj": 3,  # a dot is any character
        "q_proj": 4,
        "layers.10.up_proj": 5,
        "up_proj": 6,
        "model.layers.1.up_proj": 7,
        "l.yers.2.down_proj": 8,
        "k_proj|v_proj": 9,
    }
    config = AdapterConfig({"rank_pattern": patterns}, "x")
    leaves = ("q_proj", "qXproj", "up_proj", "down_proj", "v_proj", "o_proj", "xq_proj")
    for layer in (0, 1, 2, 10, 11):
        for leaf in leaves:
            for module in (leaf, f"model.layers.{layer}.{leaf}", f"layers.{layer}.{leaf}"):
                assert config.pattern("rank_pattern", module) == peft_value(patterns, module), module


def test_a_pattern_for_every_module_costs_no_square() -> None:
    """Operations are counted, not seconds: how many patterns are held against each module."""
    modules = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in range(24) for e in range(64)]
    config = AdapterConfig({"rank_pattern": dict.fromkeys(modules, 2)}, "x")
    tried = sum(len(list(config._patterns("rank_pattern").candidates(module))) for module in modules)
    assert tried <= 2 * len(modules)
    assert all(config.pattern("rank_pattern", module) == 2 for module in modules)


# ------------------------------------------------------------------ configs


BOMBS: dict[str, Any] = {
    "layers": {"layer_replication": [[0, 10**9]]},
    "ranges": {"layer_replication": [[0, 1]] * 300_000},
    "before": {"layer_replication": [[-5, 2]]},
    "huge": {"layer_replication": [[0, 10**30]]},
    "infinite": {"layer_replication": [[0, float("inf")]]},
    "alpha": {"lora_alpha": 10**400},
    "rank": {"r": 10**400},
    "pattern": {"rank_pattern": {"q_proj": 10**400}},
    "deep": {"eva_config": json.loads("[" * 900 + "]" * 900)},
    "half": {"base_model_name_or_path": "\ud800x"},
    "version": {"peft_version": "9" * 5000 + ".1"},
}


@pytest.mark.parametrize("name", BOMBS)
def test_configs_that_make_lists(name: str, tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", layers=2)
    adapter = plain_adapter(tmp_path / "adapter", base)
    edit_config(adapter, **BOMBS[name])
    started = time.thread_time()
    for work in (
        lambda: adapterkit.plan_merge(base, [adapter]),
        lambda: adapterkit.inspect(adapter, base=base),
        lambda: adapterkit.check(base, [adapter]),
    ):
        said = ""
        try:
            work()
        except AdapterkitError as error:
            said = str(error)
        assert len(said) < 2000
    if name != "version":  # which decides nothing here
        with pytest.raises(AdapterkitError):
            adapterkit.plan_merge(base, [adapter])
    assert time.thread_time() - started < 20


def test_a_replication_that_fits_is_still_made(tmp_path: Path) -> None:
    from adapterkit.adapters.replicate import replicated
    from adapterkit.checkpoint.open import open_checkpoint

    base = open_checkpoint(plain_base(tmp_path / "base", layers=2))
    made, _ = replicated(base, [[0, 2], [1, 2], [1, 1]], "x")
    assert sum("q_proj" in name for name in made) == 3
    for ranges in ([[0, 3]], [[0, 2]] * 20_000, [[1, 0]], "ab", 7, [[0, 2, 3]]):
        with pytest.raises(AdapterError):
            replicated(base, ranges, "x")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"a": ' + b"9" * 41 + b"}", "41 digits"),
        (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), "nest more than"),
        (b'{"a":' * (MAX_DEPTH + 2) + b"1" + b"}" * (MAX_DEPTH + 2), "nest more than"),
        (b"[" * 200_000, "nest more than"),
        (b'"\\ud800"', "half a character"),
        (b'{"\\udc00": 1}', "half a character"),
        (b"\xff", "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_json_that_no_sensible_file_holds(text: bytes, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        parse_json(text, "x")


def test_json_that_files_do_hold() -> None:
    deep = b"[" * 60 + b"1" + b"]" * 60
    assert parse_json(deep, "x") == json.loads(deep)
    assert parse_json(b'["\\ud83d\\ude00", 12345678901234567890, 1e400, NaN]', "x")[:2] == ["😀", 12345678901234567890]
    wide = json.dumps([[1]] * 1000).encode()
    assert len(parse_json(wide, "x")) == 1000


# ------------------------------------------------------------------ templates


@pytest.mark.parametrize(
    "template",
    [
        "{% set x = 'a' * 3000000000 %}{{ x }}",
        "{{ 'a' * 3000000000 }}",
        "{% for a in range(99999) %}{{ 'x' * 20000 }}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_templates_that_eat(template: str) -> None:
    assert render.render(template, [([("user", "x")], True)], {}) in (None, [None])


def test_a_template_that_does_what_templates_do() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos_token }}"
    assert render.render(template, [([("user", "x")], True)], {"eos_token": "</s>"}) == ["<user>x</s>"]


# ------------------------------------------------------------------ text


EVIL = "a/b\n::stop-commands::never\n  ::add-mask::e\r\n\x1b[2J\x07\u202e\u2028##[error]x"


def lines_of(text: str) -> list[str]:
    return text.replace("\r", "\n").split("\n")


def harmless(text: str) -> bool:
    return not any(line.strip().startswith("::") or "##[" in line for line in lines_of(text)) and not (
        set("\x1b\x07\u202e\u2028\r") & set(text)
    )


@pytest.mark.parametrize("lines", [False, True])
def test_foreign_text_is_no_command(lines: bool) -> None:
    assert harmless(clean(EVIL, lines=lines))
    assert ("\n" in clean(EVIL, lines=lines)) == lines
    assert clean("a::b c") == "a::b c"


@pytest.mark.parametrize("where", ["base_model_name_or_path", "field", "peft_type", "target_modules", "task_type"])
def test_foreign_text_in_every_verb(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = plain_base(tmp_path / "base", layers=1)
    adapter = plain_adapter(tmp_path / "adapter", base)
    edit_config(adapter, **{where if where != "field" else f"x{EVIL}": EVIL})
    for command in (
        ["inspect", adapter],
        ["check", base, adapter],
        ["check", base, adapter, "--output-format", "github"],
        ["merge", base, adapter, "-o", tmp_path / "out", "--dry-run"],
    ):
        with pytest.raises(SystemExit):
            main([str(word) for word in command])
        shown = capsys.readouterr()
        ours = ("::error ", "::warning ", "::notice ")
        kept = "\n".join(line for line in lines_of(shown.out) if not line.startswith(ours))
        assert harmless(f"{kept}\n{shown.err}"), command


def test_a_field_with_a_name_of_a_hundred_thousand_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = plain_base(tmp_path / "base", layers=1)
    adapter = plain_adapter(tmp_path / "adapter", base)
    edit_config(adapter, **{"x" * 100_000: 1})
    with pytest.raises(SystemExit):
        main(["check", str(base), str(adapter)])
    shown = capsys.readouterr()
    assert len(shown.out + shown.err) < 20_000


def test_json_output_holds_no_control_character(capsys: pytest.CaptureFixture[str]) -> None:
    show_json({"x": EVIL, "half": "\ud800"})
    text = capsys.readouterr().out
    assert harmless(text)
    assert json.loads(text) == {"x": EVIL, "half": "\ud800"}
