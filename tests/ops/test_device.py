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
from adapterkit.ops import device as devices
from adapterkit.ops.device import Sort, check_name, check_there
from adapterkit.registry.beside import beside_bytes, read_beside
from adapterkit.registry.canonical import thaw
from adapterkit.verbs.engines.on_ray import gpu_of


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


def test_workers_that_are_refused_a_device_leave_nothing(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = tmp_path / "plan.json"
    adapterkit.merge(inputs[0], [inputs[1]], save_plan=plan)
    there = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="cuda cannot be used"):
        adapterkit.run(plan, tmp_path / "out", on="local", workers=1, device="cuda")
    assert {path.name for path in tmp_path.iterdir()} == there


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


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cudaa", "did you mean 'cuda'"),
        ("CUDA", "did you mean 'cuda'"),
        ("gpu", "did you mean 'cuda'"),
        ("mps:1", "use cpu, cuda"),
    ],
)
def test_a_misspelled_name_is_told_the_right_one(name: str, hint: str) -> None:
    with pytest.raises(UsageError, match="is no device") as refused:
        check_name(name)
    assert hint in refused.value.hint


def test_every_verb_that_computes_refuses_a_device_that_is_not_there(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base, adapter = inputs
    adapterkit.merge(base, [adapter], tmp_path / "tuned")
    there = {path.name for path in tmp_path.iterdir()}
    from adapterkit.verbs.imatrix import imatrix

    (tmp_path / "text").write_text("a text")
    for run in (
        lambda **how: adapterkit.convert(base, tmp_path / "out", to="nf4", **how),
        lambda **how: adapterkit.extract(base, tmp_path / "tuned", tmp_path / "out", **how),
        lambda **how: adapterkit.resize(adapter, tmp_path / "out", rank=2, **how),
        lambda **how: adapterkit.combine([adapter], tmp_path / "out", **how),
        lambda **how: adapterkit.verify(tmp_path / "tuned", base=base, adapters=[adapter], **how),
        lambda **how: imatrix(base, tmp_path / "text", tmp_path / "out.gguf", **how),
    ):
        with pytest.raises(UsageError, match=r"cuda:1 cannot be used: .*CUDA"):
            run(device="cuda:1")
        with pytest.raises(UsageError, match="'cuda1' is no device"):
            run(device="cuda1")
    assert {path.name for path in tmp_path.iterdir()} == {*there, "text"}


def test_a_format_that_computes_nothing_takes_no_device(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--device does not apply to --to f32"):
        adapterkit.convert(inputs[0], tmp_path / "out", to="f32", device="cuda")


def test_products_that_are_rounded_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with pytest.raises(UsageError, match="TF32"):
            check_there("cuda")
    finally:
        torch.set_float32_matmul_precision(before)
    check_there("cuda")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    with pytest.raises(UsageError, match="NVIDIA_TF32_OVERRIDE=1"):
        check_there("cuda")


def test_what_a_worker_of_ray_asks_for() -> None:
    assert gpu_of("cpu", 0, 4) == {}
    assert gpu_of("cuda", 8, 4) == {"num_gpus": 1.0}
    assert gpu_of("cuda", 2, 4) == {"num_gpus": 0.5}
    assert gpu_of("cuda", 2, 3) == {"num_gpus": 0.5}
    with pytest.raises(UsageError, match="no machine of the cluster has a GPU"):
        gpu_of("cuda", 0, 4)
    with pytest.raises(UsageError, match="Ray gives each worker its GPU"):
        gpu_of("cuda:1", 2, 2)


def test_doctor_names_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    sort = Sort(lambda: "", lambda: 2, lambda index: {"name": f"Card {index}", "memory": 24_000_000_000})
    monkeypatch.setattr(devices, "SORTS", {"cuda": sort})
    assert devices.devices() == [("cuda:0", "Card 0, 24 GB"), ("cuda:1", "Card 1, 24 GB")]
