"""`combine` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from models import plain_adapter, plain_base, read_bytes

from adapterkit import combine
from adapterkit.cli import main
from adapterkit.ops.rules import RULES


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    base = plain_base(tmp_path / "base")
    return [plain_adapter(tmp_path / name, base, seed=i) for i, name in enumerate("ab")]


def test_methods_are_listed_with_their_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "combine", "--methods")
    assert code == 0
    for name, row in RULES.items():
        assert f"{name} " in out
        assert row.summary in out
        for parameter in row.parameters:
            assert parameter.option in out


def test_every_parameter_of_every_method_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "combine", "--help")
    for row in RULES.values():
        for parameter in row.parameters:
            assert parameter.option in out


@pytest.mark.parametrize(
    ("arguments", "how"),
    [
        (["--method", "ties", "--density", "0.5", "--rank", "3"], {"method": "ties", "density": 0.5, "rank": 3}),
        (["--method", "ties", "--space", "core", "--balanced"], {"method": "ties", "space": "core", "balanced": True}),
        (["--method", "core", "--rule", "ties", "--balanced"], {"method": "ties", "space": "core", "balanced": True}),
        (
            ["--method", "dare", "--seed", "7", "--rank", "4", "--lambda", "0.5"],
            {"method": "dare", "seed": 7, "rank": 4, "scale": 0.5},
        ),
        (
            ["--method", "della", "--no-elect", "--epsilon", "0.2", "--energy", "0.9"],
            {"method": "della", "elect": False, "epsilon": 0.2, "energy": 0.9},
        ),
        (["--weight", "0.5", "--weight", "-1", "--dtype", "bf16"], {"weights": [0.5, -1], "dtype": "bf16"}),
    ],
)
def test_options_reach_the_method(
    capsys: pytest.CaptureFixture[str],
    adapters: list[Path],
    tmp_path: Path,
    arguments: list[str],
    how: dict[str, object],
) -> None:
    code, out, _ = run(capsys, "combine", *adapters, "-o", tmp_path / "out", *arguments, "--json")
    report = json.loads(out)
    assert code == 0
    assert len(report["modules"]) == 6
    combine(adapters, tmp_path / "same", **how)  # type: ignore[arg-type]
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "same")


def test_what_is_printed(capsys: pytest.CaptureFixture[str], adapters: list[Path], tmp_path: Path) -> None:
    code, out, _ = run(capsys, "combine", *adapters, "-o", tmp_path / "out", "--method", "svd", "--rank", "4")
    assert code == 0
    assert "by svd: 6 layers, rank 4" in out
    assert "of the squared norm kept" in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["combine", "-o", "{tmp}/o"], 2, "Missing argument"),
        (["combine", "{a}"], 2, "--out"),
        (["combine", "{a}", "{b}", "-o", "{tmp}/o", "--method", "sum"], 2, "Invalid value for '--method'"),
        (["combine", "{a}", "{b}", "-o", "{tmp}/o", "--method", "ties"], 2, "full rank"),
        (["combine", "{a}", "{b}", "-o", "{tmp}/o", "--density", "0.5"], 2, "method linear has no parameter density"),
        (["combine", "{a}", "{b}", "-o", "{tmp}/o", "--weight", "1"], 2, "1 weight for 2 adapters"),
        (["combine", "{a}", "{b}", "-o", "{tmp}/o", "--rank", "100"], 2, "larger than every layer"),
        (["combine", "{a}", "{tmp}/nowhere", "-o", "{tmp}/o"], 7, "does not exist"),
        (["combine", "{a}", "{base}", "-o", "{tmp}/o"], 7, "is a model, not an adapter"),
        (["combine", "{a}", "{b}", "-o", "{a}"], 2, "lies in or over the input"),
    ],
)
def test_errors_are_one_sentence_with_their_code_and_leave_nothing(
    capsys: pytest.CaptureFixture[str],
    adapters: list[Path],
    tmp_path: Path,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    a, b = adapters
    given = [argument.format(a=a, b=b, base=tmp_path / "base", tmp=tmp_path) for argument in arguments]
    before = sorted(tmp_path.rglob("*"))
    got, out, err = run(capsys, *given)
    assert (got, out) == (code, "")
    assert words in err
    assert sorted(tmp_path.rglob("*")) == before
    got, out, _ = run(capsys, *given, "--json")
    assert words in json.loads(out)["error"]["message"] + json.loads(out)["error"]["hint"]


@pytest.mark.parametrize("verb", ["merge", "combine"])
def test_every_option_of_a_method_is_told(verb: str) -> None:
    """Also to who asks click for a command's parameters, as the reference of the documentation does."""
    import click

    from adapterkit.cli import app

    command = app.get_command(click.Context(app), verb)
    assert command is not None
    told = {name for one in command.get_params(click.Context(command)) for name in one.opts}
    assert {parameter.option for row in RULES.values() for parameter in row.parameters} <= told
