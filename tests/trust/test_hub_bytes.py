"""Bytes from the Hub are those of the commit, whichever verb reads them; odd answers are one sentence; bodies are bounded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hub import client_of
from hub_writes import WritableHub
from models import read_bytes

import adapterkit
from adapterkit.checkpoint import hub as reading
from adapterkit.checkpoint import hub_bytes
from adapterkit.errors import CheckFailed, HubError
from adapterkit.hub.pull import pull

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: tuple[Path, Path], home: Path
) -> Iterator[WritableHub]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with WritableHub() as served:
        served.add("o/base", inputs[0], "main")
        served.add("o/adapter", inputs[1], "main")
        with client_of(served, tmp_path / "hf", monkeypatch):
            yield served


VERBS: dict[str, Callable[[Path], object]] = {
    "merge": lambda out: adapterkit.merge("o/base", ["o/adapter"], out),
    "convert": lambda out: adapterkit.convert("o/base", to="f16", out=out),
    "combine": lambda out: adapterkit.combine(["o/adapter", "o/adapter"], out),
    "verify": lambda out: adapterkit.verify("o/base", base="o/base", adapters=["o/adapter"]),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 255
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("offline", [False, True])
def test_bytes_that_were_damaged_in_the_cache(
    verb: str, offline: bool, hub: WritableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    adapterkit.merge("o/base", ["o/adapter"], tmp_path / "right")
    for blob in (tmp_path / "hf").rglob("blobs/*"):
        if len(blob.name) == 64:
            flip(blob)
    if offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckFailed, match=r"the bytes of o/\S+ are not those of commit .*remove .*blobs"):
        VERBS[verb](tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["weights", "config"])
def test_bytes_that_were_damaged_on_the_way(
    what: str, hub: WritableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = hub.handler._bytes

    def send(self: Any, data: bytes, headers: Any) -> None:
        if (("/storage/" in self.path) == (what == "weights") and self.command == "GET" and b"llama" in data) or (
            what == "weights" and "/storage/" in self.path
        ):
            data = data[:-3] + bytes(255 ^ one for one in data[-3:])
        real(self, data, headers)

    monkeypatch.setattr(hub.handler, "_bytes", send)
    with pytest.raises(CheckFailed, match="are not those of commit"):
        adapterkit.merge("o/base", ["o/adapter"], tmp_path / "out")
    with pytest.raises(CheckFailed, match="are not those of commit"):
        pull("o/base")


def test_a_file_is_hashed_once(hub: WritableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_bytes, "_SETTLED", -(10**18))
    adapterkit.merge("o/base", ["o/adapter"], tmp_path / "one")
    read: list[Path] = []
    real = hub_bytes.disk.hash_file
    monkeypatch.setattr(hub_bytes.disk, "hash_file", lambda path: (read.append(path), real(path))[1])
    adapterkit.merge("o/base", ["o/adapter"], tmp_path / "two")
    assert [path for path in read if "o--base" in str(path)] == []
    assert read_bytes(tmp_path / "one") == read_bytes(tmp_path / "two")
    blob = next(path for path in (tmp_path / "hf" / "models--o--base").rglob("blobs/*") if len(path.name) == 64)
    os.utime(blob, ns=(1, 1))
    adapterkit.merge("o/base", ["o/adapter"], tmp_path / "three")
    assert [path for path in read if "o--base" in str(path)] == [blob.resolve()]


@pytest.mark.parametrize("how", ["option", "environment"])
def test_who_must_can_leave_it_out(how: str, hub: WritableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adapterkit.cli import main

    adapterkit.merge("o/base", ["o/adapter"], tmp_path / "right")
    for blob in (tmp_path / "hf").rglob("blobs/*"):
        if len(blob.name) == 64:
            flip(blob)
    command = ["merge", "o/base", "o/adapter", "-o", str(tmp_path / "out")]
    if how == "option":
        command.append("--no-verify-download")
    else:
        monkeypatch.setenv("ADAPTERKIT_NO_VERIFY_DOWNLOAD", "1")
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 0
    monkeypatch.delenv("ADAPTERKIT_NO_VERIFY_DOWNLOAD", raising=False)
    assert hub_bytes.wanted()


def test_weights_of_which_nothing_is_stated(hub: WritableHub, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"x")
    with pytest.raises(CheckFailed, match="states no digest"):
        hub_bytes.check_bytes("o/m", "a" * 40, {"model.safetensors": path}, {})
    hub_bytes.check_bytes("o/m", "a" * 40, {"notes.txt": path}, {})


@pytest.mark.parametrize(
    "answer",
    [
        *(b"[" * 200_000, b"null", b"[]", b"7", b'"x"', b"{}", b'{"sha": null}', b"\xff\xfe", b"", b'{"sha": 7}'),
        *(
            b'{"id": "o/m", "sha": "../../../x", "siblings": []}',
            b'{"id": "o/m", "sha": "' + b"a" * 40 + b'", "siblings": 3}',
        ),
        b'{"id": "o/m", "sha": "' + b"a" * 40 + b'", "siblings": [{"rfilename": 3}]}',
        b'{"id": "o/m", "sha": "' + b"a" * 40 + b'", "siblings": [3]}',
        b'{"id": "o/m", "sha": "' + b"a" * 40 + b'", "siblings": [{"rfilename": "config.json", "size": "x"}]}',
        b'{"id": "o/m", "sha": "' + b"a" * 40 + b'", "lastModified": "never", "siblings": []}',
    ],
)
def test_answers_that_make_no_sense(
    answer: bytes, hub: WritableHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub.handler, "_route", lambda self, path: self._answer(200, answer))
    for work in (
        lambda: adapterkit.inspect("o/base"),
        lambda: adapterkit.merge("o/base", ["o/adapter"], tmp_path / "out"),
        lambda: pull("o/base"),
    ):
        with pytest.raises((HubError, adapterkit.errors.NotFound)):
            work()


class _Response:
    """A body that never ends."""

    def __init__(self, status: int, headers: dict[str, str]) -> None:
        self.status_code, self.headers, self.given = status, headers, 0

    def iter_raw(self, size: int) -> Iterator[bytes]:
        while True:
            self.given += size
            yield b"x" * size

    def __enter__(self) -> _Response:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("status", [200, 206])
def test_no_more_of_a_body_is_read_than_was_asked_for(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import utils

    size = 10**12
    said = {"Content-Length": str(size)}
    if status == 206:
        said = {"Content-Range": f"bytes 0-99/{size}"}
    sent = _Response(status, said)
    monkeypatch.setattr(utils, "http_stream_backoff", lambda *_, **__: sent)
    file = reading.HubFile("http://x/y", "y")
    assert (len(file.read(0, 1000)), file.size) == (1000, size)
    assert sent.given <= reading.FIRST_BYTES + (1 << 16)
    if status == 200:
        assert len(file.read(1 << 20, 100)) == 100
        assert sent.given <= 3 << 20
    else:
        with pytest.raises(HubError, match="another part"):
            file.read(1 << 20, 100)


@pytest.mark.parametrize("said", ["", "x", "-5", "9" * 40])
def test_a_size_that_makes_no_sense(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import utils

    monkeypatch.setattr(utils, "http_stream_backoff", lambda *_, **__: _Response(200, {"Content-Length": said}))
    with pytest.raises(HubError, match="how large"):
        reading.HubFile("http://x/y", "y")


def test_what_is_remembered_may_be_anything(hub: WritableHub, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "adapterkit"
    folder.mkdir(parents=True)
    for said in (b"{", b"[]", b"7", b'{"x": 3}', json.dumps({"sha256:/x": [1]}).encode(), b"[" * 100_000):
        (folder / "hub-files.json").write_bytes(said)
        adapterkit.inspect("o/adapter")
