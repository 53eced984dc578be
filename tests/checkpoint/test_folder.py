"""Folders and indexes: names are data, links stay inside, and what is missing is named."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import INDEX, plain_base, random_tensors, read_tensors, write_checkpoint

from adapterkit.checkpoint.hub_ref import parse_hub
from adapterkit.checkpoint.listing import set_follow_links
from adapterkit.checkpoint.open import open_checkpoint
from adapterkit.errors import AdapterkitError, CheckpointError, NotFound, UnsafeError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return plain_base(tmp_path / "base", shards=2)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_every_tensor_is_read_as_the_library_reads_it(sharded: Path) -> None:
    opened, theirs = open_checkpoint(sharded), read_tensors(sharded)
    assert set(opened) == set(theirs)
    for name, tensor in theirs.items():
        handle = opened[name]
        assert (handle.shape, handle.dtype.torch, handle.nbytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
        assert torch.equal(handle.read(0, handle.numel), tensor.flatten())
        assert torch.equal(handle.read(3, 9), tensor.flatten()[3:9])
        extent = handle.extent
        assert extent is not None
        assert extent.source.read(extent.offset, extent.nbytes) == bytes(tensor.view(torch.uint8).numpy())


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("../outside.safetensors", "out of its folder"),
        ("/etc/passwd", "out of its folder"),
        ("sub/model.safetensors", "out of its folder"),
        ("..", "out of its folder"),
        ("", "out of its folder"),
        ("a\nb.safetensors", "out of its folder"),
        ("a\0b.safetensors", "out of its folder"),
        (7, "out of its folder"),
        (None, "out of its folder"),
        ("model.bin", "not a safetensors file"),
    ],
)
def test_transformers_46097_index_that_leads_out_of_its_folder(sharded: Path, file: Any, words: str) -> None:
    (sharded.parent / "outside.safetensors").write_bytes((sharded / FIRST).read_bytes())
    name = next(iter(open_checkpoint(sharded)))
    edit_index(sharded, lambda index: index["weight_map"].update({name: file}))
    with pytest.raises(UnsafeError, match=words) as caught:
        open_checkpoint(sharded)
    assert str(caught.value).isprintable()


def test_index_with_a_tensor_name_that_is_a_path(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"../x": FIRST}))
    with pytest.raises(UnsafeError, match="plain name"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "\xff", "[" * 100_000])
def test_broken_index(sharded: Path, text: str) -> None:
    (sharded / INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(sharded)


def test_missing_shard(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    with pytest.raises(NotFound, match=f"{SECOND} does not exist"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_truncated_shard(sharded: Path, left: int) -> None:
    data = (sharded / SECOND).read_bytes()
    (sharded / SECOND).write_bytes(data[:left])
    with pytest.raises(CheckpointError, match=SECOND):
        open_checkpoint(sharded)


def test_shard_that_lacks_a_tensor_of_the_index(sharded: Path) -> None:
    edit_index(sharded, lambda index: index["weight_map"].update({"model.extra.weight": FIRST}))
    with pytest.raises(CheckpointError, match=rf"{FIRST} does not hold 'model\.extra\.weight'"):
        open_checkpoint(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    """The index decides; where it says nothing, there is no telling which one is meant."""
    from safetensors.torch import save_file

    twice = {"model.norm.weight": torch.ones(3)}
    for number, file in enumerate((FIRST, SECOND)):
        tensors = {k: v for k, v in read_tensors(sharded).items() if open_checkpoint(sharded).shards.get(k) == file}
        save_file({**tensors, "model.norm.weight": twice["model.norm.weight"] * number}, sharded / f"{number}.new")
    os.replace(sharded / "0.new", sharded / FIRST)
    os.replace(sharded / "1.new", sharded / SECOND)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight' a second time"):
        open_checkpoint(sharded)
    edit_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": SECOND}))
    assert open_checkpoint(sharded)["model.norm.weight"].read(0, 3).tolist() == [1, 1, 1]


# ------------------------------------------------------------------ links


def test_side_file_that_is_a_link_out_of_the_folder(sharded: Path) -> None:
    """What would travel with the merge must not be a secret from elsewhere."""
    (sharded / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(UnsafeError, match=r"tokenizer\.json is a link out of its folder"):
        open_checkpoint(sharded)


def test_link_inside_the_folder(sharded: Path) -> None:
    (sharded / SECOND).rename(sharded / "stored.bin")
    (sharded / SECOND).symlink_to("stored.bin")
    assert set(open_checkpoint(sharded)) == set(read_tensors(sharded))


def test_weights_that_are_links_are_read(sharded: Path, tmp_path: Path) -> None:
    """As in a DVC or git-annex work tree, or on a mounted volume."""
    (tmp_path / "cache").mkdir()
    (sharded / SECOND).rename(tmp_path / "cache" / "9f86d081")
    (sharded / SECOND).symlink_to(tmp_path / "cache" / "9f86d081")
    assert set(open_checkpoint(sharded)) == set(read_tensors(sharded))


def test_side_files_that_are_links_are_followed_when_asked(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.json").write_text('{"a": 1}')
    (sharded / "tokenizer.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(UnsafeError, match="out of its folder") as caught:
        open_checkpoint(sharded)
    assert "follow_links" in (caught.value.hint or "")
    set_follow_links(True)
    try:
        files = {file.name: file.bytes() for file in open_checkpoint(sharded).side_files}
    finally:
        set_follow_links(False)
    assert files["tokenizer.json"] == b'{"a": 1}'


def test_a_link_that_is_called_weights_must_be_weights(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("root:x:0:0")
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError):
        open_checkpoint(sharded)


def test_folder_that_is_itself_a_link(sharded: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(sharded)
    assert len(open_checkpoint(tmp_path / "link")) == len(open_checkpoint(sharded))


@pytest.mark.parametrize("sub", ["", "adapters/first"])
def test_snapshot_of_the_hub_cache_may_link_to_its_blobs(tmp_path: Path, sub: str) -> None:
    cache = tmp_path / "hub"
    snapshot = cache / "models--org--name" / "snapshots" / ("0" * 40) / sub
    blobs = cache / "models--org--name" / "blobs"
    plain_base(tmp_path / "base")
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((tmp_path / "base").iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    assert len(open_checkpoint(snapshot)) == 11
    (snapshot / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(UnsafeError, match="out of its folder"):
        open_checkpoint(snapshot)


def test_what_is_no_file_is_left_alone(sharded: Path) -> None:
    """A pipe would block whoever opens it, a linked folder cannot be read."""
    os.mkfifo(sharded / "tokenizer.json")
    (sharded / "chat_template.jinja").symlink_to(sharded.parent)
    assert "tokenizer.json" not in {file.name for file in open_checkpoint(sharded).side_files}


def test_dead_link(sharded: Path) -> None:
    (sharded / "tokenizer.json").symlink_to("gone.json")
    with pytest.raises(NotFound, match=r"tokenizer\.json does not exist"):
        open_checkpoint(sharded)


# ------------------------------------------------------------------ what a folder may be


def test_pickles_only(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsafeError, match=r"pickle \(pytorch_model\.bin\)") as caught:
        open_checkpoint(base)
    assert caught.value.exit_code == 6


def test_adapter_given_as_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(NotFound, match="is an adapter, not a checkpoint"):
        open_checkpoint(tmp_path)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no safetensors weights"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("ref", ["./nowhere", "/nowhere/at/all", "a b", "one", "org/name/../..", ""])
def test_neither_path_nor_hub_id(ref: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    if ref == "":
        with pytest.raises(NotFound, match="a reference is empty"):  # not the current folder
            open_checkpoint(ref)
        return
    with pytest.raises(NotFound, match="does not exist"):
        open_checkpoint(ref)


def test_file_alone(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    assert open_checkpoint(base / "model.safetensors").config["model_type"] == "llama"
    (base / "config.json").unlink()
    assert open_checkpoint(base / "model.safetensors").config == {}
    (base / "x.pt").write_bytes(b"")
    with pytest.raises(UnsafeError, match="not a safetensors file"):
        open_checkpoint(base / "x.pt")


def test_several_files_without_an_index(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", shards=2)
    (base / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"2 safetensors files and no model\.safetensors\.index\.json"):
        open_checkpoint(base)


@pytest.mark.parametrize("text", ["[]", "", "{", "\xff"])
def test_broken_config(tmp_path: Path, text: str) -> None:
    base = plain_base(tmp_path / "base")
    (base / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json is not"):
        open_checkpoint(base)


def test_custom_code_is_noted_and_never_run(tmp_path: Path) -> None:
    base = write_checkpoint(
        tmp_path, random_tensors({"a.weight": (2, 2)}), {"auto_map": {"AutoModel": "evil.Model"}, "model_type": "x"}
    )
    (base / "evil.py").write_text("raise SystemExit('was run')")
    assert any("auto_map" in note for note in open_checkpoint(base).notes)


TRAVELS = """tokenizer.json generation_config.json chat_template.jinja 1_Pooling/config.json
2_Dense/model.safetensors"""
STAYS = """README.md pytorch_model.bin optimizer.pt model.gguf .env .git/config onnx/model.onnx original/params.json
a/b/c/deep.json training_args.bin"""


def test_what_travels_and_what_stays(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    travels, stays = TRAVELS.split(), STAYS.split()
    for name in (*travels, *stays):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("{}")
    assert {file.name for file in open_checkpoint(base).side_files} == {"config.json", *travels}


# ------------------------------------------------------------------ references


@pytest.mark.parametrize(
    ("ref", "parts"),
    [
        ("org/name", ("org/name", "", None)),
        ("org/na.me-1@main", ("org/na.me-1", "", "main")),
        ("org/name/sub/folder@refs/pr/3", ("org/name", "sub/folder", "refs/pr/3")),
        ("hf://org/name", ("org/name", "", None)),
        ("name", None),
        ("../org/name", None),
        ("org/name/..", None),
        ("/org/name", None),
        ("org/name@", None),
        ("örg/name", None),
    ],
)
def test_hub_references(ref: str, parts: tuple[str, str, str | None] | None) -> None:
    found = parse_hub(ref)
    assert (None if found is None else (found.repo, found.subfolder, found.revision)) == parts


def test_unreadable_file_is_one_sentence(tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").mkdir()
    with pytest.raises(AdapterkitError) as caught:
        open_checkpoint(base)
    assert "\n" not in str(caught.value)
