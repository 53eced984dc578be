"""Bases, adapters and outputs in buckets of the Hub, by the real clients: the bytes of a local run, counted as planned."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bases import gguf_adapter, gguf_base, wide_base
from hub import TOKEN, client_of
from hub_buckets import DROP, LOSE, BucketHub, Wanted
from models import plain_adapter, plain_base
from test_writing import here, within

import adapterkit
from adapterkit.checkpoint.store_out import StoreOut
from adapterkit.errors import AuthError, CheckpointError, NotFound, OutputError, StoreError, UsageError
from adapterkit.places import Address
from adapterkit.stores.connect import open_store
from adapterkit.stores.store import Store

for module in ("hf_xet", "huggingface_hub"):
    pytest.importorskip(module, reason=f"{module} is not installed")
NAME = "org/models"
ROOT = f"hf://buckets/{NAME}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BucketHub]:
    with BucketHub(tmp_path_factory.mktemp("xet")) as hub:
        yield hub


@pytest.fixture
def hub(served: BucketHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BucketHub]:
    """The Hub that the real client asks, with a bucket of its own for each test."""
    monkeypatch.setattr("adapterkit.stores.faults.FIRST_PAUSE", 0.001)
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    with client_of(served, tmp_path / "cache", monkeypatch, TOKEN):
        api().create_bucket(NAME, exist_ok=True)
        yield served
        served.clear()
        served.buckets.clear()


def api() -> "object":
    import huggingface_hub as hf

    return hf.HfApi()


@pytest.fixture
def store(hub: BucketHub) -> Store:
    return open_store(Address("hf", f"buckets/{NAME}", ""))


@pytest.fixture
def put(hub: BucketHub) -> Callable[[Path], str]:
    """Puts a folder or a file into the bucket by huggingface_hub; its address."""

    def one(path: Path) -> str:
        files = here(path) if path.is_dir() else {"": path.read_bytes()}
        names = {name: f"in/{path.name}/{name}".rstrip("/") for name in files}
        api().batch_bucket_files(NAME, add=[(data, names[name]) for name, data in files.items()])
        return f"{ROOT}/in/{path.name}"

    return one


def there(prefix: str, folder: Path) -> dict[str, bytes]:
    """What lies below a prefix, as huggingface_hub lists and downloads it."""
    found = [one.path for one in api().list_bucket_tree(NAME, prefix.rstrip("/"), recursive=True) if one.type == "file"]
    names = {path: folder / path.removeprefix(prefix) for path in found if path.startswith(prefix)}
    api().download_bucket_files(NAME, list(names.items()))
    return here(folder) if folder.exists() else {}


def test_merges_in_a_bucket_are_merges(hub: BucketHub, put: Callable[[Path], str], tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", layers=4, width=64, shards=3)
    (base / "tokenizer.json").write_text('{"model": {}}')
    adapter = plain_adapter(tmp_path / "adapter", base)
    adapterkit.merge(base, adapter, tmp_path / "out")
    stored, beside = put(base), put(adapter)
    out = f"{ROOT}/m e+r%20g/öut"
    planned = adapterkit.merge(stored, beside, out, dry_run=True)
    done = adapterkit.merge(stored, beside, out)
    assert there("m e+r%20g/öut/", tmp_path / "down") == here(tmp_path / "out")
    assert not any(path.startswith("m e+r%20g/.") for path in hub.buckets[NAME].files)
    print(planned, done)
    within(planned, done)
    assert any("keeps no conditions" in note for note in done.notes)
    assert adapterkit.verify(out, base=stored, adapters=beside).ok
