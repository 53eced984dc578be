"""Which devices a block may be computed on, and that it is computed there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from models import plain_adapter, plain_base

import adapterkit
from adapterkit.cli import app, main
from adapterkit.errors import UsageError
from adapterkit.ops.device import check_name, check_there
from adapterkit.registry.beside import beside_bytes, read_beside
from adapterkit.registry.canonical import thaw


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    base = plain_base(tmp_path / "base")
    return base, plain_adapter(tmp_path / "adapter", base)


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:12"])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "CPU", "gpu", "cuda:", "cuda:x", "cuda:1234", "meta", "cpu:0", "cuda\n"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="is no device"):
        check_name(name)


def test_the_cpu_is_always_there() -> None:
    check_there("cpu")


def test_cuda_that_is_not_there(inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"cuda cannot be used: .*CUDA"):
        adapterkit.merge(inputs[0], [inputs[1]], tmp_path / "out", device="cuda")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_more_devices_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_there("cuda")
    check_there("cuda:0")
    with pytest.raises(UsageError, match="there is no cuda:1 here"):
        check_there("cuda:1")


def test_exit_code_and_sentence(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        main(["merge", *map(str, inputs), "-o", str(tmp_path / "out"), "--device", "cuda"])
    assert end.value.code == 2
    assert "leave out --device" in capsys.readouterr().err


def test_a_plan_for_another_machine_needs_no_device_here(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = tmp_path / "plan.json"
    done = CliRunner().invoke(app, ["merge", *map(str, inputs), "--device", "cuda:1", "--save-plan", str(plan)])
    assert done.exit_code == 0
    assert json.loads(plan.read_text())["request"]["device"] == "cuda:1"


def test_named_or_not_the_cpu_gives_the_same_bytes(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    adapterkit.merge(inputs[0], [inputs[1]], tmp_path / "one")
    adapterkit.merge(inputs[0], [inputs[1]], tmp_path / "two", device="cpu")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_what_a_gpu_wrote_is_verified_without_one(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record is believed in all else: without it, the weight of one half would be taken for a mistake."""
    out = tmp_path / "out"
    adapterkit.merge(inputs[0], [inputs[1]], out, weights=[0.5])
    record = read_beside(out)
    assert record is not None
    assert record.operation is not None
    stated = replace(record.operation, parameters={**thaw(record.operation.parameters), "device": "cuda"})
    (out / "adapterkit.json").write_bytes(beside_bytes(replace(record, operation=stated)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert adapterkit.verify(out, base=inputs[0], adapters=[inputs[1]]).ok
    (out / "adapterkit.json").unlink()
    assert not adapterkit.verify(out, base=inputs[0], adapters=[inputs[1]]).ok
