"""Bases and adapters that lie in an S3 bucket: the same bytes as from a disk, few requests, and faults in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from bases import gguf_adapter, gguf_base
from models import plain_adapter, plain_base, read_bytes
from store_server import CUT, HANG_UP, SLOW, Proxy, Seen, client_of, upload

import adapterkit
from adapterkit.checkpoint.objects import WINDOW, ObjectFolder, windows_of
from adapterkit.errors import AuthError, CheckpointError, NotFound, StoreError, UsageError
from adapterkit.places import Address
from adapterkit.stores.meter import moving


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = plain_base(folder / "base", layers=4, width=96, shards=3)
    return base, plain_adapter(folder / "adapter", base)


@pytest.fixture
def stored(s3: Proxy, pair: tuple[Path, Path], place: str) -> tuple[str, str]:
    base, adapter = pair
    upload(s3.server, base, "models", f"{place}/base")
    upload(s3.server, adapter, "models", f"{place}/adapter")
    return f"s3://models/{place}/base", f"s3://models/{place}/adapter"


def test_a_merge_from_a_bucket_equals_one_from_a_disk(
    s3: Proxy, pair: tuple[Path, Path], stored: tuple[str, str], tmp_path: Path
) -> None:
    adapterkit.merge(*pair, tmp_path / "here")
    with moving() as meter:
        adapterkit.merge(*stored, tmp_path / "there")
    assert read_bytes(tmp_path / "there", record=True) == read_bytes(tmp_path / "here", record=True)
    assert meter.moved.requests == s3.count()
    assert meter.moved.bytes_down == s3.down
    assert all(one.status < 300 for one in s3.seen)


def test_headers_alone_are_read_for_a_plan(s3: Proxy, pair: tuple[Path, Path], stored: tuple[str, str]) -> None:
    report = adapterkit.merge(*stored, dry_run=True)
    assert report.touched
    weights = [one for one in s3.seen if one.path.endswith(".safetensors")]
    assert len(weights) == 4  # each file once: its header fits into the first request
    assert sum(one.down for one in weights) <= 4 * (16 << 10)


def test_a_long_header_is_two_requests_and_no_byte_more(s3: Proxy, place: str, tmp_path: Path) -> None:
    import torch
    from models import write_checkpoint

    many = {f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(1, 512) for i in range(600)}
    base = write_checkpoint(tmp_path / "base", many)
    upload(s3.server, base, "models", place)
    opened = adapterkit.open(f"s3://models/{place}")
    weights = [one for one in s3.seen if one.path.endswith(".safetensors")]
    first = (base / "model.safetensors").read_bytes()[:8]
    assert [one.down for one in weights] == [16 << 10, 8 + int.from_bytes(first, "little") - (16 << 10)]
    assert len(opened) == 600


def test_files_by_name(s3: Proxy, pair: tuple[Path, Path], stored: tuple[str, str], tmp_path: Path) -> None:
    adapter = pair[1]
    single = plain_base(tmp_path / "single")
    upload(s3.server, single, "models", stored[0].removeprefix("s3://models/") + "-single")
    opened = adapterkit.open(f"{stored[0]}-single/model.safetensors")
    assert opened.shapes == adapterkit.open(single / "model.safetensors").shapes
    assert opened.config["model_type"] == "llama"
    beside = adapterkit.inspect(f"{stored[1]}/adapter_model.safetensors")
    assert beside.method == adapterkit.inspect(adapter).method
    with pytest.raises(NotFound, match="does not exist"):
        adapterkit.open(f"{stored[0]}/nothing.safetensors")
    with pytest.raises(NotFound, match="nothing lies below"):
        adapterkit.open(f"{stored[0]}-none")


def test_gguf_files_and_their_parts(s3: Proxy, place: str, tmp_path: Path) -> None:
    base = gguf_base(tmp_path)
    adapterkit.convert(base, tmp_path / "m.gguf", max_shard_size="20KB")
    base.unlink()
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 1
    upload(s3.server, tmp_path, "models", place)
    adapterkit.convert(parts[0], tmp_path / "here.gguf", quant="F16")
    adapterkit.convert(f"s3://models/{place}/{parts[0].name}", tmp_path / "there.gguf", quant="F16")
    assert (tmp_path / "there.gguf").read_bytes() == (tmp_path / "here.gguf").read_bytes()
    client_of(s3.server).delete_object(Bucket="models", Key=f"{place}/{parts[-1].name}")
    with pytest.raises(NotFound, match=r"1 of .* parts are missing"):
        adapterkit.open(f"s3://models/{place}/{parts[0].name}")


def test_a_source_that_is_replaced_is_an_error_that_names_it(
    s3: Proxy, pair: tuple[Path, Path], stored: tuple[str, str], tmp_path: Path
) -> None:
    key = stored[0].removeprefix("s3://models/") + "/model-00002-of-00003.safetensors"
    data = (pair[0] / "model-00002-of-00003.safetensors").read_bytes()

    done = []

    def replace_it(seen: Seen) -> None:
        """Once the headers of the base were read."""
        if seen.path.endswith("adapter_model.safetensors") and not done:
            done.append(client_of(s3.server).put_object(Bucket="models", Key=key, Body=data[:-1] + b"\x01"))

    s3.after = replace_it
    with pytest.raises(CheckpointError, match=r"00002-of-00003.safetensors changed while it was read"):
        adapterkit.merge(*stored, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert {one.status for one in s3.seen} == {200, 206, 412}


@pytest.mark.parametrize("fault", [(503, "SlowDown"), CUT, HANG_UP, SLOW])
def test_what_passes_is_tried_again(
    fault: object, s3: Proxy, pair: tuple[Path, Path], stored: tuple[str, str], tmp_path: Path
) -> None:
    seen: dict[str, int] = {}

    def every_other(asked: object) -> object:
        what = f"{asked.method}{asked.path}{asked.headers.get('range')}"  # type: ignore[attr-defined]
        seen[what] = seen.get(what, 0) + 1
        return fault if seen[what] == 1 and asked.method == "GET" and asked.headers.get("range") else None  # type: ignore[attr-defined]

    s3.rule = every_other  # type: ignore[assignment]
    adapterkit.merge(*pair, tmp_path / "here")
    with moving() as meter:
        adapterkit.merge(*stored, tmp_path / "there")
    assert read_bytes(tmp_path / "there") == read_bytes(tmp_path / "here")
    assert meter.moved.requests >= s3.count()


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ((403, "AccessDenied"), AuthError, "refused .*AccessDenied"),
        ((400, "ExpiredToken"), AuthError, "credentials expired"),
        ((403, "RequestTimeTooSkewed"), AuthError, "clock"),
        ((403, "SignatureDoesNotMatch"), AuthError, "does not accept the credentials"),
        ((404, "NoSuchKey"), NotFound, "does not exist"),
        ((503, "SlowDown"), StoreError, "in 7 attempts .SlowDown"),
        (CUT, StoreError, "cut short"),
    ],
)
def test_what_stays_is_one_sentence(
    fault: object, kind: type[Exception], words: str, s3: Proxy, stored: tuple[str, str], tmp_path: Path
) -> None:
    s3.rule = lambda asked: fault if "00002-of" in asked.path else None  # type: ignore[assignment,return-value]
    with pytest.raises(kind, match=words) as error:
        adapterkit.merge(*stored, tmp_path / "out")
    assert "00002-of-00003.safetensors" in str(error.value)
    assert "adapterkit-secret" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_nobody_there_is_said_soon(monkeypatch: pytest.MonkeyPatch, s3: Proxy) -> None:
    from store_server import free_port

    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StoreError, match=r"in 3 attempts .no connection"):
        adapterkit.open("s3://models/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    with pytest.raises(NotFound, match="bucket"):
        adapterkit.open("s3://no-such-bucket/x")


def test_windows_join_neighbours_and_are_bounded() -> None:
    assert windows_of([(5, 9), (0, 5), (20, 30), (30, 30)]) == [(0, 9), (20, 30)]
    big = windows_of([(7, 7 + 2 * WINDOW + 1)])
    assert [stop - start for start, stop in big] == [WINDOW, WINDOW, 1]


def test_names_that_would_lead_out_are_not_names(s3: Proxy, place: str) -> None:
    client = client_of(s3.server)
    for name in ("config.json", ".hidden", "sub/", "a/b/c/d.txt"):
        client.put_object(Bucket="models", Key=f"{place}/{name}", Body=b"" if name == "sub/" else b"{}")
    assert ObjectFolder(Address("s3", "models", place)).names == {"config.json"}


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for module in (
        "obstore.store",
        "obstore",
        "google.auth.transport.urllib3",
        "azure.storage.blob",
        "azure.core.exceptions",
        "hf_xet",
    ):
        monkeypatch.setitem(sys.modules, module, None)
    for module in ("azure", "hub", "xet"):
        monkeypatch.delitem(sys.modules, f"adapterkit.stores.{module}", raising=False)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr("adapterkit.stores.connect._open", {})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    for address in ("s3://models/x", "gs://models/y", "az://models/z", "hf://buckets/org/models/x"):
        with pytest.raises(UsageError, match=r"is not installed; pip install 'adapterkit\[stores\]'"):
            adapterkit.open(address)


def test_an_adapter_that_a_base_in_a_bucket_holds_is_named(
    s3: Proxy, pair: tuple[Path, Path], stored: tuple[str, str], place: str, tmp_path: Path
) -> None:
    """As of a base on a disk; a folder, and a GGUF file whose record lies beside it."""
    adapterkit.merge(*pair, tmp_path / "merged")
    gguf_base(tmp_path)
    held = gguf_adapter(tmp_path)
    adapterkit.merge(tmp_path / "base.gguf", held, tmp_path / "files" / "q.gguf")
    for folder in ("merged", "files"):
        upload(s3.server, tmp_path / folder, "models", f"{place}/{folder}")
    where = f"s3://models/{place}"
    for base, adapters in (("merged", (pair[1], stored[1])), ("files/q.gguf", (held,))):
        for adapter in adapters:
            again = adapterkit.merge(f"{where}/{base}", adapter, dry_run=True)
            assert [note for note in again.notes if note.startswith(f"{adapter} is in {where}/{base} already")]
    other = plain_adapter(tmp_path / "other", pair[0], seed=9)
    assert "already" not in str(adapterkit.merge(f"{where}/merged", other, dry_run=True).notes)
