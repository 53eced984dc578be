"""Uploads that nobody ends: told, and aborted with the notes that name them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from models import plain_adapter, plain_base, read_bytes
from store_server import Asked, Proxy, client_of, download

import adapterkit
from adapterkit.checkpoint.plan import PlannedFile
from adapterkit.checkpoint.store_out import StoreOut
from adapterkit.checkpoint.store_uploads import FileUpload, Uploads
from adapterkit.checkpoint.uploads import sweep_uploads
from adapterkit.errors import UsageError


def open_uploads(s3: Proxy, place: str) -> int:
    return len(client_of(s3.server).list_multipart_uploads(Bucket="models", Prefix=f"{place}/").get("Uploads", []))


def test_a_run_that_is_killed_leaves_nothing_to_be_seen(s3: Proxy, place: str, tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", layers=4, width=64, shards=3)
    adapter = plain_adapter(tmp_path / "adapter", base)
    out = f"s3://models/{place}/out"
    command = [sys.executable, "-m", "adapterkit", "merge", str(base), str(adapter), "-o", out, "--jobs", "1"]
    running: list[subprocess.Popen[bytes]] = []

    def kill(asked: Asked) -> None:
        """In the middle: one part is there, and another is on its way."""
        if "partNumber=1" in asked.query and "00002" in asked.path and running:
            os.kill(running[0].pid, signal.SIGKILL)

    s3.rule = kill
    running.append(subprocess.Popen([*command, "--resume"], stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    assert running[0].wait() == -signal.SIGKILL
    for pipe in (running[0].stdout, running[0].stderr):
        assert pipe is not None
        pipe.close()
    s3.clear()
    assert download(s3.server, "models", f"{place}/out") == {}
    assert open_uploads(s3, place)
    first = sweep_uploads(f"s3://models/{place}", keep_days=0)
    assert len(first.uploads) == open_uploads(s3, place)
    assert not first.applied
    assert sweep_uploads(f"s3://models/{place}").young == len(first.uploads)
    # It goes on where it was, and what is there then is whole.
    adapterkit.merge(base, adapter, out, resume=True)
    adapterkit.merge(base, adapter, tmp_path / "out")
    assert download(s3.server, "models", f"{place}/out/") == read_bytes(tmp_path / "out", record=True)
    assert open_uploads(s3, place) == 0


def test_an_upload_that_a_killed_run_could_not_note_is_ended(
    s3: Proxy, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the upload's beginning and its note lies one request."""
    base = plain_base(tmp_path / "base", layers=4, width=64, shards=3)
    adapter = plain_adapter(tmp_path / "adapter", base)
    out = f"s3://models/{place}/out"
    client = client_of(s3.server)
    client.create_multipart_upload(Bucket="models", Key=f"{place}/outside/x.safetensors")  # of somebody else
    put = Uploads._new

    def killed(self: Uploads, file: PlannedFile) -> FileUpload:
        self.store.begin(self.targets[file.name], {}, self.work)
        raise SystemExit

    monkeypatch.setattr(Uploads, "_new", killed)
    monkeypatch.setattr(StoreOut, "abandon", lambda self: None)
    with pytest.raises(SystemExit):
        adapterkit.merge(base, adapter, out, resume=True, jobs=1)
    assert open_uploads(s3, place) > 1
    monkeypatch.setattr(Uploads, "_new", put)
    adapterkit.merge(base, adapter, out, resume=True, jobs=1)
    left = client.list_multipart_uploads(Bucket="models", Prefix=f"{place}/")["Uploads"]
    assert [one["Key"] for one in left] == [f"{place}/outside/x.safetensors"]
    client.abort_multipart_upload(Bucket="models", Key=left[0]["Key"], UploadId=left[0]["UploadId"])


def test_what_is_swept_is_gone(s3: Proxy, place: str, tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base", layers=4, width=64, shards=3)
    adapter = plain_adapter(tmp_path / "adapter", base)
    out = f"s3://models/{place}/out"

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapterkit.merge(base, adapter, out, resume=True, progress=stop)
    done = subprocess.run(
        [sys.executable, "-m", "adapterkit", "gc", "--uploads", out, "--keep-days", "0", "--apply"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "aborted" in done.stdout
    assert open_uploads(s3, place) == 0
    assert download(s3.server, "models", f"{place}/") == {}
    adapterkit.merge(base, adapter, out)  # nothing stands in its way
    for other in ("out", "ftp://models/x", "hf://org/name"):
        with pytest.raises(UsageError, match="has no uploads"):
            sweep_uploads(other)
