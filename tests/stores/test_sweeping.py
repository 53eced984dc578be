"""Every name that a run can leave in a store, made by the code that leaves it: swept when it is old, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bases import gguf_adapter, gguf_base
from models import plain_adapter, plain_base, read_bytes
from store_server import Proxy, client_of, download
from test_computed import failing_for

import adapterkit
from adapterkit.checkpoint.plan import Plan
from adapterkit.checkpoint.store_out import StoreOut
from adapterkit.checkpoint.uploads import sweep_uploads
from adapterkit.errors import OutputError
from adapterkit.verbs.execute import OpenPlan


def interrupt(done: int, total: int) -> None:
    if done:
        raise KeyboardInterrupt


def hidden(s3: Proxy, prefix: str) -> tuple[list[str], list[str]]:
    """Keys of working objects, and keys of open uploads."""
    client = client_of(s3.server)
    keys = [one["Key"] for one in client.list_objects_v2(Bucket="models", Prefix=prefix).get("Contents", [])]
    begun = client.list_multipart_uploads(Bucket="models", Prefix=prefix).get("Uploads", [])
    return [key for key in keys if "/." in key], [one["Key"] for one in begun]


def test_every_name_that_a_run_leaves(s3: Proxy, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = plain_base(tmp_path / "base", shards=2)
    adapter, where, client = plain_adapter(tmp_path / "adapter", base), f"s3://models/{place}", client_of(s3.server)
    plans = {name: tmp_path / f"{name}.json" for name in ("merge", "resize")}
    adapterkit.merge(base, adapter, save_plan=plans["merge"])
    adapterkit.resize(adapter, rank=2, save_plan=plans["resize"])
    made = {name: Plan.from_json(path.read_bytes()) for name, path in plans.items()}

    def claimed(out: str) -> None:
        """Killed before the first upload."""
        _ = OpenPlan(made["merge"], out).in_store

    def split(out: str) -> None:
        """Uploads to keys that do not begin with the output's."""
        with pytest.raises(KeyboardInterrupt):
            adapterkit.merge(
                *(gguf_base(tmp_path), gguf_adapter(tmp_path), f"{out}.gguf"),
                max_shard_size="40KB",
                resume=True,
                progress=interrupt,
                jobs=1,
            )

    def parts(out: str) -> None:
        """Parts of a plan, and of results, that nobody goes on with."""
        OpenPlan(made["merge"], out).execute(0)
        OpenPlan(made["resize"], f"{out}-r", 2_000).execute(0)

    def results(out: str) -> None:
        """Results that are one object by then."""
        with monkeypatch.context() as patched:
            patched.setattr(StoreOut, "_complete", failing_for(StoreOut._complete, "adapter_model"))
            with pytest.raises(OutputError, match="killed"):
                adapterkit.run(plans["resize"], out, task=0, tasks=1)

    for leave in (claimed, split, parts, results):
        out = f"{place}/{leave.__name__}/out"
        outer = f"{place}/{leave.__name__}/outer"  # of another run
        claimed(f"s3://models/{outer}")
        leave(f"s3://models/{out}")
        before = hidden(s3, f"{place}/{leave.__name__}/")
        assert len(before[0]) > 1, leave
        asked = f"s3://models/{out}.gguf" if leave is split else f"s3://models/{out}"
        assert sweep_uploads(asked, apply=True).uploads == ()  # it is young
        assert hidden(s3, f"{place}/{leave.__name__}/") == before
        for one in [asked, *([f"{asked}-r"] if leave is parts else [])]:
            shown = sweep_uploads(one, keep_days=0)
            assert shown.notes
            assert not shown.unfinished
            assert sweep_uploads(one, keep_days=0, apply=True) == type(shown)(**{**vars(shown), "applied": True})
        assert hidden(s3, f"{place}/{leave.__name__}/") == ([f"{place}/{leave.__name__}/.outer.partial/claim.json"], [])
        sweep_uploads(f"{where}/{leave.__name__}", keep_days=0, apply=True)
        assert hidden(s3, f"{place}/{leave.__name__}/") == ([], [])

    # Killed at the very end: some files have their names, so --resume has to find its notes.
    def killed(self: StoreOut, key: str, data: bytes) -> Any:
        raise OutputError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(StoreOut, "_put", killed)
        with pytest.raises(OutputError, match="killed"):
            adapterkit.merge(base, adapter, f"{where}/out", resume=True)
    swept = sweep_uploads(where, keep_days=0, apply=True)
    assert (swept.unfinished, swept.uploads, swept.notes) == ((f"{place}/out",), (), ())
    adapterkit.merge(base, adapter, f"{where}/out", resume=True)
    adapterkit.merge(base, adapter, tmp_path / "out")
    assert download(s3.server, "models", f"{place}/out/") == read_bytes(tmp_path / "out", record=True)

    # Of others: what is called like ours and is none.
    keys = [f"{place}/.a.partial.txt/x", f"{place}/.a.results-0123456789ab/x", f"{place}/.a.results-0123456789abc/x"]
    for key in keys:
        client.put_object(Bucket="models", Key=key, Body=b"mine")
    assert sweep_uploads(where, keep_days=0, apply=True).notes == ()
    assert hidden(s3, f"{place}/")[0] == sorted(keys)
