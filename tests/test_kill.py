"""Runs that are killed: never half a result, and what `--resume` makes is what an undisturbed run makes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from typing import TYPE_CHECKING

import pytest
from children import fork, wait
from models import plain_adapter, plain_base, read_bytes, read_tensors, write_adapter

import adapterkit
from adapterkit.checkpoint.journal import JOURNAL
from adapterkit.checkpoint.publish import partial_folder

if TYPE_CHECKING:
    from pathlib import Path

KILLS = 8  # bench/proofs/kills.py does it a thousand times
WHOLE_PERIOD = 3  # every so many kills the run before them was finished, and a new one starts


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], dict[str, bytes]]:
    """Base, adapters, and the bytes of an undisturbed run."""
    folder = tmp_path_factory.mktemp("kill")
    base = plain_base(folder / "base", layers=6, width=256, shards=3)
    adapters = [plain_adapter(folder / "adapter", base)]
    (base / "tokenizer.json").write_text('{"a": 1}')
    adapterkit.merge(base, adapters, folder / "whole")
    return base, adapters, read_bytes(folder / "whole", record=True)


def test_killed_at_random_moments(case: tuple[Path, list[Path], dict[str, bytes]], tmp_path: Path) -> None:
    base, adapters, whole = case
    out = tmp_path / "out"
    started = time.monotonic()
    assert wait(fork(lambda: adapterkit.merge(base, adapters, out, resume=True, jobs=2))) == 0
    duration = time.monotonic() - started
    assert read_bytes(out, record=True) == whole
    os.rename(out, tmp_path / "old")
    chance, killed = random.Random(7), 0
    while killed < KILLS:
        pid = fork(lambda: adapterkit.merge(base, adapters, out, resume=True, jobs=2))
        time.sleep(chance.uniform(0, duration * 1.1))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        killed += wait(pid) == -signal.SIGKILL
        if out.exists():
            assert read_bytes(out, record=True) == whole
        else:
            assert set(os.listdir(tmp_path)) <= {"old", partial_folder(out).name}
        if killed % WHOLE_PERIOD == 0 or out.exists():
            if not out.exists():
                adapterkit.merge(base, adapters, out, resume=True)
            assert read_bytes(out, record=True) == whole
            assert set(os.listdir(tmp_path)) == {"old", "out"}
            for name in whole:
                os.unlink(out / name)
            out.rmdir()


# ------------------------------------------------------------------ what a resume trusts


@pytest.fixture
def stopped(case: tuple[Path, list[Path], dict[str, bytes]], tmp_path: Path) -> Path:
    """The hidden folder of a run that stopped just before its end."""

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapterkit.merge(case[0], case[1], tmp_path / "out", resume=True, progress=stop)
    return partial_folder(tmp_path / "out")


def finished(stopped: Path) -> int:
    lines = (stopped / JOURNAL).read_bytes().split(b"\n")
    return sum(b"digest" in line for line in lines)


def test_a_resume_uses_all_that_is_proved(
    case: tuple[Path, list[Path], dict[str, bytes]], stopped: Path, tmp_path: Path
) -> None:
    done = finished(stopped)
    assert done == 12
    report = adapterkit.merge(case[0], case[1], tmp_path / "out", resume=True, jobs=5)
    assert report.reused == done
    assert read_bytes(tmp_path / "out", record=True) == case[2]


@pytest.mark.parametrize("damage", ["torn", "garbage", "empty", "joined", "no newline", "binary", "not a map"])
def test_damaged_journal(
    damage: str, case: tuple[Path, list[Path], dict[str, bytes]], stopped: Path, tmp_path: Path
) -> None:
    journal = stopped / JOURNAL
    data = journal.read_bytes()
    first, rest = data.split(b"\n", 1)
    journal.write_bytes(
        {
            "torn": data[:-30],
            "garbage": first + b"\n{nope\n\n" + rest,
            "empty": b"",
            "joined": first + b"\n" + rest.replace(b"\n", b"", 3),
            "no newline": first,
            "binary": first + b"\n\xff\xfe\0\n" + rest,
            "not a map": first + b'\n[1]\n7\n{"file": 1}\n{"file": [], "tensor": {}, "digest": 0}\n' + rest,
        }[damage]
    )
    report = adapterkit.merge(case[0], case[1], tmp_path / "out", resume=True)
    assert report.reused == {"torn": 11, "empty": 0, "joined": 8, "no newline": 0}.get(damage, 12)
    assert read_bytes(tmp_path / "out", record=True) == case[2]


def test_damaged_block_is_computed_again(
    case: tuple[Path, list[Path], dict[str, bytes]], stopped: Path, tmp_path: Path
) -> None:
    step = next(s for s in adapterkit.plan_merge(case[0], case[1]).plan.steps if s.source is None)
    file = next(f.name for f in adapterkit.plan_merge(case[0], case[1]).plan.files if step in f.steps)
    with open(stopped / file, "r+b") as handle:
        handle.seek(step.offset + step.nbytes // 2)
        handle.write(b"\x55\xaa")
    report = adapterkit.merge(case[0], case[1], tmp_path / "out", resume=True)
    assert report.reused == 11
    assert read_bytes(tmp_path / "out", record=True) == case[2]


def test_damaged_copy_is_copied_again(
    case: tuple[Path, list[Path], dict[str, bytes]], stopped: Path, tmp_path: Path
) -> None:
    for file in stopped.glob("*.safetensors"):
        os.truncate(file, 100)
    adapterkit.merge(case[0], case[1], tmp_path / "out", resume=True)
    assert read_bytes(tmp_path / "out", record=True) == case[2]


def test_a_file_of_the_folder_became_something_else(
    case: tuple[Path, list[Path], dict[str, bytes]], stopped: Path, tmp_path: Path
) -> None:
    (stopped / "strange").mkdir()
    (stopped / "config.json").write_text("half a conf")
    adapterkit.merge(case[0], case[1], tmp_path / "out", resume=True)
    assert read_bytes(tmp_path / "out", record=True) == case[2]


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_an_input_that_changed_in_between_counts_for_nothing(which: str, tmp_path: Path) -> None:
    """Same names, shapes and sizes, other values: what was computed before must not be kept."""
    base = plain_base(tmp_path / "base")
    adapter = plain_adapter(tmp_path / "adapter", base)

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapterkit.merge(base, [adapter], tmp_path / "out", resume=True, progress=stop)
    time.sleep(0.02)
    if which == "base":
        from models import random_tensors, write_checkpoint

        shapes = {name: tuple(tensor.shape) for name, tensor in read_tensors(base).items()}
        config = json.loads((base / "config.json").read_text())
        write_checkpoint(base, random_tensors(shapes, "bfloat16", seed=99), config)
    else:
        fields = json.loads((adapter / "adapter_config.json").read_text())
        write_adapter(adapter, {k: v + 1 for k, v in read_tensors(adapter).items()}, **fields)
    report = adapterkit.merge(base, [adapter], tmp_path / "out", resume=True)
    assert report.reused == 0
    adapterkit.merge(base, [adapter], tmp_path / "whole")
    assert read_bytes(tmp_path / "out", record=True) == read_bytes(tmp_path / "whole", record=True)


@pytest.mark.parametrize("change", [{"weights": [2.0]}, {"dtype": "f32"}, {"max_shard_size": "300KB"}], ids=str)
def test_another_request_counts_for_nothing(
    change: dict[str, object], case: tuple[Path, list[Path], dict[str, bytes]], stopped: Path, tmp_path: Path
) -> None:
    report = adapterkit.merge(case[0], case[1], tmp_path / "out", resume=True, **change)  # type: ignore[arg-type]
    assert report.reused == 0
    adapterkit.merge(case[0], case[1], tmp_path / "whole", **change)  # type: ignore[arg-type]
    assert read_bytes(tmp_path / "out", record=True) == read_bytes(tmp_path / "whole", record=True)
