"""Bad input as the command line meets it: one sentence on stderr, the documented exit code, and nothing left behind.

The readers' own tests go through every kind of damage; this is one of each, from the outside, in both forms of output.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import edit_config, plain_adapter, plain_base, read_tensors, write_adapter

from adapterkit.cli import main

Case = Callable[[Path, Path], object]
WEIGHTS = "adapter_model.safetensors"


def shard(base: Path) -> Path:
    return sorted(base.glob("*.safetensors"))[-1]


def edit_index(base: Path, file: str) -> None:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: file if old == shard(base).name else old for name, old in index["weight_map"].items()}
    path.write_text(json.dumps(index))


def edit_header(path: Path, change: Callable[[str], str]) -> None:
    """Change a header as text; its length goes along."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length].decode()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def overlap(text: str) -> str:
    entries = json.loads(text)
    names = [name for name in entries if name != "__metadata__"]
    for name in names[:2]:
        entries[name]["data_offsets"] = entries[names[0]]["data_offsets"]
        entries[name]["shape"] = entries[names[0]]["shape"]
    return json.dumps(entries)


def twice(text: str) -> str:
    entries = json.loads(text)
    name = next(name for name in entries if name != "__metadata__")
    return text[:-1].rstrip()[:-1] + f', "{name}": {json.dumps(entries[name])}}}'


def rewrite(adapter: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    tensors = dict(change(name, tensor) for name, tensor in read_tensors(adapter).items())
    write_adapter(adapter, tensors, **json.loads((adapter / "adapter_config.json").read_text()))


def symlink(base: Path) -> None:
    outside = base.parent / "outside.json"
    (base / "config.json").rename(outside)
    (base / "config.json").symlink_to(outside)


def other_base(base: Path, adapter: Path) -> None:
    other = plain_base(base.parent / "other", width=24)
    plain_adapter(adapter, other)


def pickle_only(base: Path, adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")


def zero_size(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name, torch.empty(0)


def not_a_number(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name, tensor * float("nan") if name.endswith("lora_B.weight") else tensor


def wrong_prefix(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    return name.replace("base_model.model.model.", "base_model.model.language_model.decoder."), tensor


CASES: dict[str, tuple[Case, int, str]] = {
    "missing shard": (lambda base, _: shard(base).unlink(), 7, "does not exist"),
    "truncated shard": (lambda base, _: shard(base).write_bytes(shard(base).read_bytes()[:-9]), 1, "truncated"),
    "index that climbs": (lambda base, _: edit_index(base, "../model.safetensors"), 6, "../model.safetensors"),
    "index that is absolute": (lambda base, _: edit_index(base, "/etc/passwd"), 6, "/etc/passwd"),
    "link out of the folder": (lambda base, _: symlink(base), 6, "link out of its folder"),
    "corrupt header": (lambda base, _: edit_header(shard(base), lambda text: text.replace(":", ";", 1)), 1, "JSON"),
    "huge header": (lambda base, _: shard(base).write_bytes((1 << 40).to_bytes(8, "little") + b"{}"), 1, "claims"),
    "overlapping tensors": (lambda base, _: edit_header(shard(base), overlap), 1, "overlaps"),
    "duplicate keys": (lambda _, adapter: edit_header(adapter / WEIGHTS, twice), 1, "appears twice"),
    "adapter of another base": (other_base, 1, "trained on another base"),
    "wrong prefix": (lambda _, adapter: rewrite(adapter, wrong_prefix), 1, "has no target in the base"),
    "field of a newer PEFT": (lambda _, adapter: edit_config(adapter, use_miracle=True), 1, "use_miracle"),
    "method of a newer PEFT": (lambda _, adapter: edit_config(adapter, peft_type="MIRACLE"), 1, "MIRACLE"),
    "pickle-only adapter": (pickle_only, 6, "pickle"),
    "zero-size factors": (lambda _, adapter: rewrite(adapter, zero_size), 1, "ZeRO"),
    "NaN": (lambda _, adapter: rewrite(adapter, not_a_number), 1, "holds NaN"),
    "regex bomb": (lambda _, adapter: edit_config(adapter, rank_pattern={"a+" * 3000: 8}), 6, "made to hang"),
    "prompt method": (lambda _, adapter: edit_config(adapter, peft_type="PROMPT_TUNING"), 1, "PROMPT_TUNING"),
    "config that is none": (lambda _, adapter: (adapter / "adapter_config.json").write_text("{"), 1, "adapter_config"),
    "output that exists": (lambda base, _: (base.parent / "out").mkdir(), 1, "exists"),
}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, code, words = CASES[name]
    base = plain_base(tmp_path / "base", shards=2)
    adapter = plain_adapter(tmp_path / "adapter", base)
    change(base, adapter)
    before = sorted(tmp_path.rglob("*"))
    got, out, err = run(capsys, "merge", base, adapter, "-o", tmp_path / "out")
    assert (got, out) == (code, "")
    *progress, message = err.strip().splitlines()
    assert all(line.startswith("merging") for line in progress)
    assert message.startswith("error: ")
    assert words in message
    assert sorted(tmp_path.rglob("*")) == before
    got, out, _ = run(capsys, "merge", base, adapter, "-o", tmp_path / "out", "--json")
    error = json.loads(out)["error"]
    assert got == code
    assert words in error["message"] + error["hint"]
    assert error["hint"]
    assert sorted(tmp_path.rglob("*")) == before


def test_the_inputs_of_the_cases_are_good_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = plain_base(tmp_path / "base", shards=2)
    assert run(capsys, "merge", base, plain_adapter(tmp_path / "adapter", base), "-o", tmp_path / "out")[0] == 0
