"""`convert` of adapters on the command line: plans, what is printed, and refusals that leave nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import make_adapter

from adapterkit.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.fixture
def dora(make_base: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    from peft import LoraConfig

    base = make_base("llama")
    config = LoraConfig(r=4, lora_alpha=9, use_dora=True, target_modules=["q_proj"])
    return base, make_adapter(tmp_path / "adapter", base, config)


def test_the_error_of_a_decomposition_is_printed(
    dora: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = dora
    assert "LORA (DoRA)" in run(capsys, "inspect", adapter)[1]
    how = ("--to", "peft", "--plain", "--base", base)
    code, out, err = run(capsys, "convert", adapter, *how, "--energy", 0.9, "-o", tmp_path / "plain")
    assert code == 0, err
    assert "of the squared norm kept, error 0." in out
    assert "worst 0." in out
    code, out, _ = run(capsys, "convert", adapter, *how, "--rank", 3, "-o", tmp_path / "three", "--json")
    report = json.loads(out)
    assert {row["rank"] for row in report["modules"]} == {3}
    assert all(0 < row["error"] < 1 for row in report["modules"])
    assert report["types"] == {"F32": 4}
    assert json.loads((tmp_path / "three" / "adapterkit.json").read_text())["operation"]["name"] == "convert"


def test_the_output_of_plain_loads_in_a_server_that_knows_one_rank_and_alpha(
    dora: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = dora
    assert run(capsys, "check", base, adapter, "--for", "vllm")[0] == 3
    assert run(capsys, "convert", adapter, "--to", "peft", "--plain", "--base", base, "-o", tmp_path / "plain")[0] == 0
    code, out, err = run(capsys, "check", base, tmp_path / "plain", "--for", "vllm", "--json")
    found = json.loads(out)
    assert "dora" not in out.lower(), (code, found, err)


def test_a_dry_run_writes_nothing(dora: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter = dora
    for form in (("peft", "--plain"), ("peft",), ("mlx",)):
        code, out, err = run(
            capsys, "convert", adapter, "--to", *form, "--base", base, "-o", tmp_path / "o", "--dry-run"
        )
        assert code == 0, err
        assert "would write" in out
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "peft", "--plain"), "computed against its base"),
        (("--to", "peft", "--rank", "3"), "add --plain"),
        (("--to", "gguf-lora", "--plain"), "--plain does not apply to --to gguf-lora"),
        (("--to", "mlx", "--quant", "Q8_0"), "--quant does not apply to --to mlx"),
        (("--to", "peft", "--plain", "--base", "BASE", "--energy", "1.5"), "energy must be in"),
        (("--to", "peft", "--plain", "--base", "BASE", "--rank", "4000"), "larger than every layer"),
        (("--to", "safetensors"), "is no format to convert to; use one of gguf, "),
    ],
)
def test_what_is_refused_leaves_nothing(
    arguments: tuple[str, ...],
    words: str,
    dora: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, adapter = dora
    given = [str(base) if one == "BASE" else one for one in arguments]
    before = sorted(tmp_path.iterdir())
    code, _, err = run(capsys, "convert", adapter, *given, "-o", tmp_path / "out")
    assert code in (1, 2), err
    assert words in err
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before
