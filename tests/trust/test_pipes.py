"""A pipe in the place of a file is refused and not waited for; bytes that no such file holds are one sentence."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from models import plain_adapter, plain_base

import adapterkit
from adapterkit.errors import AdapterkitError, CheckpointError, UnsafeError
from adapterkit.recipe.lock import read_lock
from adapterkit.serving.handover import _generation
from adapterkit.verbs.engines.written import _template
from adapterkit.verbs.evaluate import _check_peft, _null_adapter
from adapterkit.verbs.verify.prompts import read_prompts


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it waits for the pipe")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Asked:
    """As much of a request as reads a template."""

    on = "slurm"

    def __init__(self, template: Path) -> None:
        self.template = template


READERS: dict[str, Callable[[Path], Any]] = {
    "a saved plan": lambda path: adapterkit.run(path, out=path.with_name("out")),
    "a template of a job": lambda path: _template(Asked(path)),
    "a file of prompts": read_prompts,
    "a lock": read_lock,
}


@pytest.mark.parametrize("what", READERS)
def test_a_named_pipe_is_refused(what: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafeError, match="pipe"):
        READERS[what](tmp_path / "pipe")


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"r":' + b"9" * 6000 + b"}", b'{"x":"\xff"}'], ids=["deep", "long", "odd"]
)
def test_bytes_that_no_sensible_file_holds_are_one_sentence(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        _check_peft(tmp_path)
    for read in (READERS["a lock"], READERS["a saved plan"]):
        with pytest.raises(AdapterkitError):
            read(file)
    (tmp_path / "generation_config.json").write_bytes(data)
    assert _generation(tmp_path) == {}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_that_is_evaluated_holds_no_pipes(name: str, tmp_path: Path) -> None:
    adapter = plain_adapter(tmp_path / "adapter", plain_base(tmp_path / "base"))
    _check_peft(adapter)
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    with pytest.raises(UnsafeError, match="pipe"):
        _check_peft(adapter)


def test_a_pipe_beside_a_model_is_no_sampling(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "generation_config.json")
    assert _generation(tmp_path) == {}


def test_a_null_adapter_keeps_its_config(tmp_path: Path) -> None:
    adapter = plain_adapter(tmp_path / "adapter", plain_base(tmp_path / "base"))
    _null_adapter(adapter, tmp_path / "zeros", "zeros")
    config = "adapter_config.json"
    assert json.loads((tmp_path / "zeros" / config).read_bytes()) == json.loads((adapter / config).read_bytes())
