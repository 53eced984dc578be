"""Faults of a store, for every verb that reads or writes one: what passes changes no byte, what stays leaves nothing."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bases import gguf_adapter, gguf_base
from models import plain_adapter, plain_base
from store_server import CUT, FLIP_UP, HANG_UP, LOSE_ANSWER, SLOW, Asked, Proxy, client_of, download, upload

import adapterkit
from adapterkit.errors import AuthError, OutputError, StoreError

Run = Callable[[str, Any], Any]
"""A verb with inputs below a place, to an output."""

READ = ((503, "SlowDown"), CUT, HANG_UP, SLOW, (500, "InternalError"))
SEND = ((503, "SlowDown"), HANG_UP, FLIP_UP, LOSE_ANSWER, (409, "ConditionalRequestConflict"))
ASK = ((503, "SlowDown"), LOSE_ANSWER, HANG_UP)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of two files, one in NF4, what was trained of it, two adapters; a GGUF model and its adapter."""
    folder = tmp_path_factory.mktemp("made")
    base = plain_base(folder / "base", shards=2)
    for seed in (1, 2):
        plain_adapter(folder / f"a{seed}", base, seed=seed)
    adapterkit.convert(base, folder / "nf4", to="nf4")
    adapterkit.merge(base, folder / "a1", folder / "tuned")
    gguf_base(folder)
    gguf_adapter(folder)
    return folder


def in_parts(at: str, out: Any) -> Any:
    """A saved plan that one task of an array executes."""
    plan = Path(str(out).replace("s3://", "/nowhere/")).name + ".json"
    adapterkit.combine([f"{at}/a1", f"{at}/a2"], method="svd", energy=0.9, save_plan=plan)
    return adapterkit.run(plan, out, task=0, tasks=1, part_size="2KB")


VERBS: dict[str, Run] = {
    "keep": lambda at, out: adapterkit.merge(f"{at}/nf4", f"{at}/a1", out, quant="keep", keep_touched="bf16"),
    "split": lambda at, out: adapterkit.merge(f"{at}/base.gguf", f"{at}/gguf-adapter", f"{out}.gguf", max_shard_size="40KB"),
    "convert": lambda at, out: adapterkit.convert(f"{at}/base", out, to="f16", max_shard_size="3KB"),
    "combine": lambda at, out: adapterkit.combine([f"{at}/a1", f"{at}/a2"], out),
    "extract": lambda at, out: adapterkit.extract(f"{at}/base", f"{at}/tuned", out, rank=4),
    "resize": lambda at, out: adapterkit.resize(f"{at}/a1", f"{out}.safetensors", rank=2, to="kohya"),
    "in parts": in_parts,
    "verify": lambda at, out: adapterkit.verify(f"{at}/tuned", base=f"{at}/base", adapters=f"{at}/a1"),
}  # fmt: skip


def each_once() -> Callable[[Asked], Any]:
    """Every request fails the first time, in turn by each fault that its method can have."""
    turns = {"GET": itertools.cycle(READ), "PUT": itertools.cycle(SEND), "POST": itertools.cycle(ASK),
             "HEAD": itertools.cycle(((503, "SlowDown"), HANG_UP)), "DELETE": itertools.cycle(ASK)}  # fmt: skip
    seen: set[str] = set()
    lock = threading.Lock()

    def rule(asked: Asked) -> Any:
        what = f"{asked.method}{asked.path}{asked.query}{asked.headers.get('range')}"
        with lock:
            if what in seen:
                return None
            seen.add(what)
            return next(turns[asked.method])

    return rule


QUICK = ("keep", "verify")


@pytest.mark.parametrize(
    "verb", [pytest.param(verb, marks=() if verb in QUICK else pytest.mark.slow) for verb in VERBS]
)
def test_what_passes_changes_no_byte_and_what_stays_leaves_nothing(
    verb: str, s3: Proxy, made: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    client = client_of(s3.server)
    for path in made.iterdir():
        if path.is_dir():
            upload(s3.server, path, "models", f"{place}/{path.name}")
        else:
            client.put_object(Bucket="models", Key=f"{place}/{path.name}", Body=path.read_bytes())
    where, run = f"s3://models/{place}", VERBS[verb]
    (tmp_path / "here").mkdir()
    run(where, tmp_path / "here" / "out")
    s3.rule = each_once()
    report = run(where, f"{where}/there/out")
    s3.rule = None
    if verb == "verify":
        assert report.ok
        assert report.findings == run(where, None).findings
    else:
        folder = tmp_path / "here"
        local = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        assert download(s3.server, "models", f"{place}/there/") == local
    refused = (403, "AccessDenied")
    for method, fault, kind in (
        ("GET", refused, AuthError),
        ("GET", (503, "SlowDown"), StoreError),
        ("PUT", (403, "QuotaExceeded"), OutputError),
        ("POST", refused, AuthError),
    ):
        if verb == "verify" and method != "GET":
            continue

        def stays(asked: Asked, method: str = method, fault: Any = fault) -> Any:
            ours = asked.path.endswith((".safetensors", ".gguf")) or "/never" in asked.path
            return fault if asked.method == method and ours and "claim.json" not in asked.path else None

        s3.rule = stays
        with pytest.raises(kind) as error:
            run(where, f"{where}/never/out")
        s3.rule = None
        assert where in str(error.value), method
        assert "adapterkit-secret" not in str(error.value)
        if verb != "in parts":  # a task leaves what it did to others
            assert download(s3.server, "models", f"{place}/never") == {}, method
            assert not client.list_multipart_uploads(Bucket="models", Prefix=f"{place}/").get("Uploads"), method
