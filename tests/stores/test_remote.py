"""Versions of the registry in a bucket: pushed, pulled elsewhere, tampered with, and interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import plain_adapter, plain_base, read_bytes
from store_server import FLIP_UP, LOSE_ANSWER, Asked, Proxy, client_of, download

import adapterkit
from adapterkit.bucket import push as pushing
from adapterkit.bucket.pull import pull_bucket
from adapterkit.bucket.push import push_bucket
from adapterkit.cli import main
from adapterkit.errors import AdapterkitError, AuthError, CheckFailed, NotFound, OutputError, UnsafeError, UsageError
from adapterkit.integrations.resolving import find_adapter, sources_of
from adapterkit.provenance.register import register
from adapterkit.registry import verbs
from adapterkit.registry.canonical import canonical, sha256
from adapterkit.registry.checkout import checkout


@pytest.fixture
def tickets(home: Path, tmp_path: Path) -> Path:
    """A registered adapter with a licence and a card; its folder."""
    base = plain_base(tmp_path / "base")
    folder = plain_adapter(tmp_path / "a1", base, base_model_name_or_path="org/base")
    (folder / "README.md").write_text("# Tickets\n")
    (folder / "LICENSE").write_text("do as you like\n")
    register(folder, "tickets", base=base)
    return folder


def put(s3: Proxy, key: str, data: bytes) -> None:
    client_of(s3.server).put_object(Bucket="models", Key=key, Body=data)


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> Any:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([*words, "--json"])
    out, err = capsys.readouterr()
    assert (end.value.code or 0) == code, out + err
    return json.loads(out)


def test_push_and_pull_elsewhere(
    s3: Proxy, tickets: Path, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to, other = f"s3://models/{place}/tickets", tmp_path / "elsewhere"
    done = run(capsys, "push", "tickets@1", to, "--tag", "v1")
    assert done["address"] == f"{to}@v1"
    assert done["new"]
    pulled = pull_bucket(f"{to}@v1", home=other)
    first, again = verbs.show("tickets@1").record, pulled.record
    assert (again.name, again.content, again.base, again.kind) == ("tickets", first.content, first.base, first.kind)
    assert (checkout("tickets@1", home=other) / "adapter_model.safetensors").read_bytes() == (
        tickets / "adapter_model.safetensors"
    ).read_bytes()
    # It is a folder that every verb reads, and what was pulled is the same version when it is pushed again.
    adapterkit.merge(tmp_path / "base", done["folder"], tmp_path / "merged")
    adapterkit.merge(tmp_path / "base", tickets, tmp_path / "same")
    assert read_bytes(tmp_path / "merged/model.safetensors") == read_bytes(tmp_path / "same/model.safetensors")
    repeat = push_bucket("tickets@1", f"{to}@v1", home=other)
    assert (repeat.digest, repeat.new, repeat.uploaded) == (done["digest"], False, ())
    assert pull_bucket(f"{to}@sha256:{done['digest']}", home=other).new is False

    # A tag that means another version stays where it is, unless it is asked to move.
    (tickets / "LICENSE").write_text("all rights reserved\n")
    register(tickets, "tickets", base=tmp_path / "base")
    said = run(capsys, "push", "tickets@2", f"{to}@v1", code=1)
    assert "is not moved" in json.dumps(said)
    run(capsys, "push", "tickets@2", f"{to}@v1", "--move-tag")
    assert pull_bucket(f"{to}@v1", home=other).record.version == 2
    assert pull_bucket(f"{to}@sha256:{done['digest']}", home=other).record.content == first.content

    # A server asks by name and digest, and gets an older version too.
    digest = first.content[:12]
    found = find_adapter(
        f"tickets@{digest}", sources=sources_of(f"registry,s3://models/{place}"), home=tmp_path / "new"
    )
    assert found.served == f"tickets@{digest}"
    with pytest.raises(NotFound, match="no source has"):
        find_adapter("tickets@prod", sources=(f"s3://models/{place}",), home=tmp_path / "new")


def test_what_was_tampered_with_is_refused(s3: Proxy, tickets: Path, place: str, tmp_path: Path) -> None:
    to = f"s3://models/{place}/tickets"
    done, other = push_bucket("tickets@1", to), tmp_path / "elsewhere"
    folder = f"{place}/tickets/{done.digest}"
    whole = download(s3.server, "models", f"{folder}/")
    weights = whole["adapter_model.safetensors"]
    spoilt = weights[:-1] + bytes([weights[-1] ^ 1])
    for data, words in ((spoilt, "not those of its digest"), (weights + b"x", "not what the manifest says")):
        put(s3, f"{folder}/adapter_model.safetensors", data)
        with pytest.raises(CheckFailed, match=words):
            pull_bucket(to, home=other)
    put(s3, f"{folder}/adapter_model.safetensors", weights)
    put(s3, f"{folder}/manifest.json", whole["manifest.json"].replace(b"LICENSE", b"LICENCE"))
    with pytest.raises(CheckFailed, match="not that of its digest"):
        pull_bucket(to, home=other)
    assert push_bucket("tickets@1", to).uploaded  # nothing vouches for what lies there
    client_of(s3.server).delete_object(Bucket="models", Key=f"{folder}/LICENSE")
    assert push_bucket("tickets@1", to).uploaded == ("LICENSE",)
    assert pull_bucket(to, home=other).record.content == done.content
    rows = json.loads(whole["manifest.json"])["files"]

    def named(*paths: str) -> str:
        data = canonical({"schema": 1, "files": [{**rows[0], "path": path} for path in paths]})
        put(s3, f"{place}/tickets/{sha256(data)}/manifest.json", data)
        return f"{to}@sha256:{sha256(data)}"

    for paths in (
        ("../x.safetensors",),
        ("/x.safetensors",),
        ("a.gguf", "A.gguf"),
        ("a.gguf", "a.gguf/b"),
        ("manifest.json",),
    ):
        with pytest.raises(UnsafeError):
            pull_bucket(named(*paths), home=other)
    for data in (b"{}", b"[1]", b'{"schema": 1, "files": [{"path": "a", "sha256": "b", "size": -1}]}', b"\xff"):
        put(s3, f"{place}/tickets/{sha256(data)}/manifest.json", data)
        with pytest.raises(CheckFailed):
            pull_bucket(f"{to}@sha256:{sha256(data)}", home=other)
    for data in (b"", b"[]", b'{"manifest": "../../x"}', b"x" * 5000):
        put(s3, f"{place}/tickets/tags/odd", data)
        with pytest.raises(CheckFailed, match="no tag"):
            pull_bucket(f"{to}@odd", home=other)
    assert not list((other / "pulling").iterdir())


def test_a_push_that_fails_is_found_under_no_name_and_finished_by_the_next(
    s3: Proxy, tickets: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = f"s3://models/{place}/tickets"

    def refused(end: str) -> Any:
        return lambda asked: (403, "AccessDenied") if asked.method == "PUT" and asked.path.endswith(end) else None

    for end in ("adapter_model.safetensors", "manifest.json", "tags/latest"):
        s3.rule = refused(end)
        with pytest.raises(AuthError):
            push_bucket("tickets@1", to)
        s3.rule = None
        with pytest.raises(NotFound):
            pull_bucket(to, home=tmp_path / "elsewhere")
    asked: list[str] = []

    def often(one: Asked) -> str | tuple[int, str] | None:
        if one.method != "PUT" or asked.count(one.path):
            return None
        asked.append(one.path)
        return (LOSE_ANSWER, (503, "SlowDown"), FLIP_UP)[len(asked) % 3]

    s3.rule = often
    # Larger files are sent in parts; a file that changes meanwhile is not completed.
    monkeypatch.setattr(pushing, "PART", 5 << 20)
    (tickets / "vocab.txt").write_bytes(b"word\n" * (5 << 18))
    register(tickets, "tickets", base=tmp_path / "base")
    done = push_bucket("tickets@2", to)
    s3.rule = None
    assert done.new
    pulled = pull_bucket(to, home=tmp_path / "elsewhere")
    assert pulled.record.content == done.content
    assert client_of(s3.server).list_multipart_uploads(Bucket="models", Prefix=f"{place}/").get("Uploads", []) == []

    # Somebody else sets the tag between the look and the write.
    def sooner(one: Asked) -> None:
        if one.method == "PUT" and one.path.endswith("tags/v2"):
            s3.rule = None
            put(s3, f"{place}/tickets/tags/v2", canonical({"manifest": "0" * 64}))

    s3.rule = sooner
    with pytest.raises(OutputError, match="somebody else"):
        push_bucket("tickets@1", f"{to}@v2")


def test_what_is_no_remote_is_refused_by_name(s3: Proxy, tickets: Path, place: str) -> None:
    for address in (
        "gs://models",
        "az://models@v1",
        "s3://models",
        "s3://models/x@",
        "s3://models/x@a b",
        "s3://models/x@sha256:12",
        "s3://models/../x",
    ):
        with pytest.raises(UsageError):
            push_bucket("tickets", address)
        with pytest.raises(UsageError):
            pull_bucket(address)
    with pytest.raises(UsageError, match="digest"):
        push_bucket("tickets", f"s3://models/x@sha256:{'0' * 64}")
    with pytest.raises(UsageError, match="two tags"):
        push_bucket("tickets", "s3://models/x@v1", tag="v2")
    with pytest.raises(AdapterkitError, match="does not exist"):
        pull_bucket(f"s3://models/{place}/nothing")
