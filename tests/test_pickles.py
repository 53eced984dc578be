"""Pickled weights: converted when asked for, refused as unsafe when they are more than tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import plain_adapter, plain_base, read_tensors

from adapterkit.adapters.load import load_adapter
from adapterkit.bases import open_model
from adapterkit.cli import main
from adapterkit.errors import CheckpointError, NotFound, UnsafeError, UsageError
from adapterkit.pickles import unpickled
from adapterkit.verbs.convert import convert

pytestmark = pytest.mark.usefixtures("warm_processes")


@pytest.fixture
def pickled(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """An adapter as PEFT saved it by default until 2023."""
    folder = plain_adapter(tmp_path / "adapter", plain_base(tmp_path / "base"))
    tensors = read_tensors(folder)
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    return folder, tensors


def test_an_old_adapter_is_converted_when_asked(
    pickled: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tensors = pickled
    for name in ("modules.json", "1_Pooling/config.json", "checkpoint-9/config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    with pytest.raises(UnsafeError, match="--allow-pickle"):
        load_adapter(folder)
    with pytest.raises(SystemExit) as stopped:
        main(["convert", str(folder), "--to", "peft", "--allow-pickle", "-o", str(tmp_path / "new"), "--json"])
    assert not stopped.value.code
    assert json.loads(capsys.readouterr().out)["src"] == str(folder)
    found = read_tensors(tmp_path / "new")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert (tmp_path / "new/1_Pooling/config.json").is_file()
    assert not (tmp_path / "new/checkpoint-9").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "new"]


def test_no_plan_is_saved_that_would_be_refused(pickled: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be saved with allow_pickle=True"):
        convert(pickled[0], tmp_path / "new", to="peft", allow_pickle=True, save_plan=tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()


def test_every_dtype_and_layout(tmp_path: Path) -> None:
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    tensors: dict[str, torch.Tensor] = {f"t.{kind}": torch.randint(0, 2, (3, 4)).to(kind) for kind in kinds}
    tensors |= {"turned": torch.randn(3, 5).T, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}
    tensors["tied"] = tensors["turned"]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    torch.save(tensors, folder / "pytorch_model.bin")
    with unpickled(folder, tmp_path) as place:
        found = read_tensors(place)
        opened = open_model(place)
        assert opened.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_shards(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    parts = {
        "pytorch_model-00001-of-00002.bin": {"a": torch.ones(2)},
        "pytorch_model-00002-of-00002.bin": {"b": torch.zeros(3)},
    }
    for name, tensors in parts.items():
        torch.save(tensors, folder / name)
    index = {"weight_map": {key: name for name, tensors in parts.items() for key in tensors}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with unpickled(folder, tmp_path) as place:
        assert {name: tensor.tolist() for name, tensor in read_tensors(place).items()} == {"a": [1, 1], "b": [0, 0, 0]}
        assert set(open_model(place).tensors) == {"a", "b"}
    index["weight_map"]["c"] = "../outside.bin"
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeError, match="out of its folder"), unpickled(folder, tmp_path):
        pass


class Harmful:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("what", ["code", "noise", "list", "number"])
def test_what_is_no_mapping_of_tensors(what: str, tmp_path: Path) -> None:
    folder = plain_adapter(tmp_path / "adapter", plain_base(tmp_path / "base"))
    (folder / "adapter_model.safetensors").unlink()
    path = folder / "adapter_model.bin"
    mark = tmp_path / "ran"
    content: dict[str, Any] = {"code": {"a": Harmful(mark)}, "list": [torch.ones(1)], "number": {"a": 3}}
    if what == "noise":
        path.write_bytes(b"PK\3\4" + bytes(range(64)))
    else:
        torch.save(content[what], path)
    kind = UnsafeError if what == "code" else CheckpointError
    with pytest.raises(kind, match="more than tensors" if what == "code" else "adapter_model.bin c"):
        convert(folder, tmp_path / "out", to="peft", allow_pickle=True)
    assert not mark.exists()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "notes.txt"])
def test_a_link_out_of_the_folder_does_not_become_a_file_of_the_output(
    name: str, pickled: tuple[Path, Any], tmp_path: Path
) -> None:
    adapter, _ = pickled
    (tmp_path / "secret").write_text("private")
    (adapter / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeError, match="is a link out of its folder"):
        convert(adapter, tmp_path / "out", to="peft", allow_pickle=True)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["adapter", "base", "secret"]


@pytest.mark.parametrize("when", ["read", "recorded"])
def test_pickles_that_change_while_they_are_converted(
    when: str, pickled: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the record names is what was read."""
    import adapterkit.pickles as module
    from adapterkit.provenance import record

    adapter, _ = pickled
    place, name = (module, "_convert") if when == "read" else (record, "converted_parent")
    real = getattr(place, name)

    def late(*args: Any) -> Any:
        found = real(*args)
        data = (adapter / "adapter_model.bin").read_bytes()
        (adapter / "adapter_model.bin").write_bytes(data[:-1] + b"x")
        return found

    monkeypatch.setattr(place, name, late)
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin changed while it was read"):
        convert(adapter, tmp_path / "out", to="peft", allow_pickle=True)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["adapter", "base"]


def test_only_folders_here(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="download it first"), unpickled("org/name", tmp_path):
        pass
