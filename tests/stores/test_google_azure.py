"""Outputs in Google's and Azure's stores: the bytes of a local run, counted as planned, conditional, resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from bases import gguf_adapter, gguf_base, wide_base
from models import plain_adapter, plain_base
from store_server import CUT, HANG_UP, LOSE_ANSWER, Asked, Proxy, proxied
from store_server import SLOW as SLOW_BODY
from test_writing import first_of_each, here, within

import adapterkit
from adapterkit.bucket.layout import parse_bucket
from adapterkit.bucket.pull import pull_bucket
from adapterkit.bucket.push import push_bucket
from adapterkit.checkpoint.plan import Plan
from adapterkit.checkpoint.uploads import sweep_uploads
from adapterkit.errors import AuthError, CheckpointError, OutputError, StoreError, UsageError
from adapterkit.places import Address
from adapterkit.provenance.register import register
from adapterkit.stores.connect import open_store
from adapterkit.stores.store import Store
from adapterkit.verbs.execute import OpenPlan

BUCKET = "models"


@pytest.fixture
def put(store: Store, place: str) -> Callable[[Path], str]:
    """Puts a folder or a file into the store; its address."""

    def one(path: Path) -> str:
        for name, data in (here(path) if path.is_dir() else {"": path.read_bytes()}).items():
            store.put(f"{place}/{path.name}/{name}".rstrip("/"), data)
        return f"{store.root.scheme}://{BUCKET}/{place}/{path.name}"

    return one


def there(store: Store, prefix: str) -> dict[str, bytes]:
    return {one.key.removeprefix(prefix): store.read(one.key, 0, one.size, one.etag) for one in store.entries(prefix)}


@pytest.mark.slow
def test_merges_in_a_store_are_merges(store: Store, put: Callable[[Path], str], place: str, tmp_path: Path) -> None:
    base = wide_base(tmp_path)
    adapter = plain_adapter(tmp_path / "adapter", base, modules=("q_proj",))
    adapterkit.merge(base, adapter, tmp_path / "out")
    stored, beside = put(base), put(adapter)
    out = f"{store.root.scheme}://{BUCKET}/{place}/m e+r%20g/öut"
    planned = adapterkit.merge(stored, beside, out, dry_run=True)
    done = adapterkit.merge(stored, beside, out)
    assert there(store, f"{place}/m e+r%20g/öut/") == here(tmp_path / "out")
    assert [one.key for one in store.entries(f"{place}/m e+r%20g/.")] == []
    within(planned, done)
    assert adapterkit.verify(out, base=stored, adapters=beside).ok


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("small")
    base = plain_base(folder / "base", layers=4, width=64, shards=3)
    return base, plain_adapter(folder / "adapter", base)


@pytest.fixture(scope="module")
def merged(small: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("merged") / "out"
    adapterkit.merge(*small, out)
    return here(out)


def composed_over(store: Store, asked: Asked) -> tuple[int, str] | None:
    """Google's answer, as it documents it, where a name is taken: the emulator composes in any case."""
    if not asked.path.endswith("/compose") or "ifGenerationMatch=0" not in asked.query:
        return None
    key = unquote(asked.path.rpartition("/o/")[2].removesuffix("/compose"))
    return None if store.head(key) is None else (412, "conditionNotMet")


@pytest.mark.slow
def test_an_object_of_many_parts(proxy: Proxy, store: Store, place: str) -> None:
    """More than Google composes at a time; sent in any order; known to the next run by number."""

    proxy.rule = lambda asked: composed_over(store, asked)
    work = Address(store.root.scheme, BUCKET, f"{place}/.work")
    made = store.begin(f"{place}/whole", {"adapterkit-plan": "abc"}, work)
    pieces = {number: bytes([number]) * (number % 5 + 1) for number in range(1, 71)}
    for number in sorted(pieces, reverse=True):
        made.put(number, pieces[number])
    assert store.head(f"{place}/whole") is None
    again = store.resumed(made.key, made.id)
    held = again.parts()
    assert held is not None
    assert {number: part.size for number, part in held.items()} == {n: len(data) for n, data in pieces.items()}
    etag = again.complete({number: part.etag for number, part in held.items()}, absent=True)
    found = store.head(f"{place}/whole")
    assert found is not None
    assert (found.etag, found.marks) == (etag, {"adapterkit-plan": "abc"})
    assert found.written is not None
    assert [one.written for one in store.entries(f"{place}/")] == [found.written]
    assert store.read(found.key, 0, found.size, found.etag) == b"".join(pieces.values())
    assert [one.key for one in store.entries(f"{place}/")] == [f"{place}/whole"]
    assert made.parts() is None  # it is over
    another = store.begin(f"{place}/whole", {}, work)
    another.put(1, b"x")
    assert another.complete({1: ""}, absent=True) is None  # there is one
    assert another.complete({1: ""}, absent=False)


@pytest.mark.slow
def test_a_whole_file_is_copied_inside(store: Store, put: Callable[[Path], str], place: str, tmp_path: Path) -> None:
    """Google copies whole objects alone; Azure also ranges. A source that is another by now is an error."""
    base = wide_base(tmp_path)
    last = plain_adapter(tmp_path / "adapter", base, modules=("lm_head",))  # in the second of two files
    stored, beside = put(base), put(last)
    out = f"{stored.rpartition('/')[0]}/out"
    adapterkit.merge(base, last, tmp_path / "out")
    done = adapterkit.merge(stored, beside, out)
    assert there(store, f"{place}/out/") == here(tmp_path / "out")
    assert done.bytes_inside >= (base / "model-00001-of-00002.safetensors").stat().st_size

    adapterkit.merge(stored, beside, save_plan=tmp_path / "plan.json")
    plan = Plan.from_json((tmp_path / "plan.json").read_bytes())
    key = f"{place}/base/model-00001-of-00002.safetensors"
    found = store.head(key)
    assert found is not None
    store.put(key, store.read(key, 0, found.size - 2) + b"\x01\x01")
    with pytest.raises(CheckpointError, match="changed"):
        adapterkit.execute(plan, f"{out}2", part=0)


def test_who_comes_second_is_told(store: Store, small: tuple[Path, Path], merged: dict[str, bytes], place: str) -> None:
    out = f"{store.root.scheme}://{BUCKET}/{place}/out"
    other: list[str] = []

    def meanwhile(done: int, total: int) -> None:
        if not other:
            with pytest.raises(OutputError, match="another run writes") as error:
                adapterkit.merge(*small, out, weights=0.5)
            other.append(str(error.value))

    adapterkit.merge(*small, out, progress=meanwhile)
    assert there(store, f"{place}/out/") == merged
    assert other
    with pytest.raises(OutputError, match="exists"):
        adapterkit.merge(*small, out, weights=0.5)
    adapterkit.merge(*small, out, weights=0.5, force=True)
    assert there(store, f"{place}/out/").keys() == merged.keys()
    assert there(store, f"{place}/out/") != merged
    assert store.entries(f"{place}/.") == []


def test_a_run_that_is_replaced_ends(
    store: Store, small: tuple[Path, Path], merged: dict[str, bytes], place: str
) -> None:
    out = f"{store.root.scheme}://{BUCKET}/{place}/out"
    reports: list[Any] = []

    def meanwhile(done: int, total: int) -> None:
        if not reports:
            reports.append(None)
            reports[0] = adapterkit.merge(*small, out, force=True)

    with pytest.raises(OutputError, match=r"took over|is gone|appeared"):
        adapterkit.merge(*small, out, weights=0.5, progress=meanwhile)
    assert there(store, f"{place}/out/") == merged
    assert store.entries(f"{place}/.") == []


def test_an_interrupted_run_goes_on(
    proxy: Proxy, store: Store, small: tuple[Path, Path], merged: dict[str, bytes], place: str
) -> None:
    out = f"{store.root.scheme}://{BUCKET}/{place}/out"
    where = f"{store.root.scheme}://{BUCKET}/{place}"

    def interrupt(done: int, total: int) -> None:
        if done >= total // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        adapterkit.merge(*small, out, resume=True, progress=interrupt, jobs=1)
    assert there(store, f"{place}/out") == {}
    swept = sweep_uploads(where, keep_days=0)
    assert bool(swept.uploads) is (store.root.scheme == "gs")  # Azure drops blocks by itself
    assert f"{place}/.out.partial/claim.json" in swept.notes
    assert not swept.applied
    before = proxy.up
    done = adapterkit.merge(*small, out, resume=True)
    assert there(store, f"{place}/out/") == merged
    assert proxy.up - before < sum(map(len, merged.values()))  # what was sent is not sent again
    assert done.reused
    assert store.entries(f"{place}/.") == []


def test_what_is_swept_is_gone(store: Store, small: tuple[Path, Path], place: str, tmp_path: Path) -> None:
    """An upload; a part that came after its upload was ended; a claim and results of parts that nobody goes on with."""
    scheme = store.root.scheme
    where = f"{scheme}://{BUCKET}/{place}"
    if scheme == "gs":
        made = store.begin(f"{place}/out/x.safetensors", {}, Address("gs", BUCKET, f"{place}/.out.partial"))
        made.put(1, b"one")
        assert sweep_uploads(where).young == 1
        assert sweep_uploads(where, keep_days=0, apply=True).uploads == (f"{place}/out/x.safetensors",)
        assert store.entries(f"{place}/") == []
        made.put(2, b"late")
    adapterkit.resize(small[1], rank=2, save_plan=tmp_path / "plan.json")
    opened = OpenPlan(Plan.from_json((tmp_path / "plan.json").read_bytes()), f"{where}/out")
    opened.execute(0)
    opened._gathered(False)
    store.put(f"{place}/.out.results-0123456789ab/x", b"mine")
    assert sweep_uploads(f"{where}/out", apply=True).notes == ()  # young
    swept = sweep_uploads(f"{where}/out", keep_days=0, apply=True)
    names = {key.removeprefix(f"{place}/").partition("/")[0] for key in swept.notes}
    late = {".out.partial.parts"} if scheme == "gs" else set()
    assert names == {".out.partial", opened.place.name, *late}
    assert [one.key for one in store.entries(f"{place}/")] == [f"{place}/.out.results-0123456789ab/x"]


@pytest.mark.slow
def test_a_process_that_is_killed(
    proxy: Proxy, store: Store, small: tuple[Path, Path], merged: dict[str, bytes], place: str
) -> None:
    out, running = f"{store.root.scheme}://{BUCKET}/{place}/out", list[subprocess.Popen[bytes]]()

    def kill(asked: Asked) -> None:
        """When the second of three files is on its way."""
        sent = asked.path.encode() + unquote(asked.query).encode() + asked.body[:300]
        if asked.method in ("PUT", "POST") and b"00002-of-00003" in sent and b".upload" not in sent and running:
            os.kill(running[0].pid, signal.SIGKILL)

    proxy.rule = kill  # type: ignore[assignment]
    command = [sys.executable, "-m", "adapterkit", "merge", *map(str, small), "-o", out, "--jobs", "1", "--resume"]
    running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    assert running[0].wait(300) == -signal.SIGKILL
    proxy.clear()
    assert there(store, f"{place}/out") == {}
    assert store.entries(f"{place}/.")
    adapterkit.merge(*small, out, resume=True)
    assert there(store, f"{place}/out/") == merged
    assert store.entries(f"{place}/.") == []


def test_credentials_that_expire_are_looked_for_again(proxy: Proxy, store: Store, place: str) -> None:
    """Whoever hands them out has put new ones where the first came from."""
    from adapterkit.stores.azure import Account, Azure
    from adapterkit.stores.gcs import Gcs
    from adapterkit.stores.http import Http

    made: Store
    tokens, spoilt = ["new", "old"], list[str]()

    def token(fresh: bool) -> str:
        if fresh:
            tokens.pop()
        return f"Bearer {tokens[-1]}"

    def rule(asked: Asked) -> tuple[int, str] | None:
        """Of Azure, whose emulator has one key, the first request is refused; of Google every one with the old token."""
        old = asked.headers.get("authorization") == "Bearer old" if isinstance(made, Gcs) else not spoilt
        spoilt.append(asked.path)
        wrong = (401, "authError") if isinstance(made, Gcs) else (403, "AuthenticationFailed")
        return wrong if old else None

    if isinstance(store, Azure):
        service = store.account.service
        made = Azure(store.root, Account(service, "old"), lambda: Account(service, "new"), lambda address: made)
    else:
        made = Gcs(store.root, Http(), proxy.endpoint, token)
    proxy.rule = rule
    made.put(f"{place}/x", b"one")
    assert made.renewals == 1
    assert store.read(f"{place}/x", 0, 3) == b"one"
    again = made.begin(f"{place}/y", {}, Address(store.root.scheme, BUCKET, f"{place}/.w"))
    again.put(1, b"two")
    assert made.renewals == 1


def test_parts_by_several_workers(
    store: Store, small: tuple[Path, Path], merged: dict[str, bytes], place: str, tmp_path: Path
) -> None:
    out = f"{store.root.scheme}://{BUCKET}/{place}/out"
    adapterkit.merge(*small, save_plan=tmp_path / "plan.json")
    plan = Plan.from_json((tmp_path / "plan.json").read_bytes())
    for part in (2, 0, 1, 0):
        adapterkit.execute(plan, out, part=part)
    adapterkit.execute(plan, out)
    assert there(store, f"{place}/out/") == merged


def test_gguf_in_parts(store: Store, put: Callable[[Path], str], place: str, tmp_path: Path) -> None:
    base, adapter = gguf_base(tmp_path), gguf_adapter(tmp_path)
    (tmp_path / "out").mkdir()
    adapterkit.merge(base, adapter, tmp_path / "out/m.gguf", max_shard_size="40KB")
    adapterkit.merge(
        put(base), put(adapter), f"{store.root.scheme}://{BUCKET}/{place}/out/m.gguf", max_shard_size="40KB"
    )
    assert there(store, f"{place}/out/").keys() == here(tmp_path / "out").keys()
    for name, data in here(tmp_path / "out").items():
        if name.endswith(".gguf"):
            assert there(store, f"{place}/out/")[name] == data


SLOW = pytest.mark.slow
PASSING = [
    ((503, "ServerBusy"), "POST"),
    (LOSE_ANSWER, "POST"),
    (LOSE_ANSWER, "PUT"),
    (CUT, "GET"),
    pytest.param(SLOW_BODY, "GET", marks=SLOW),
    pytest.param((503, "ServerBusy"), "PUT", marks=SLOW),
    pytest.param((429, "rateLimitExceeded"), "GET", marks=SLOW),
    pytest.param(HANG_UP, "PUT", marks=SLOW),
    pytest.param(HANG_UP, "POST", marks=SLOW),
    pytest.param(LOSE_ANSWER, "DELETE", marks=SLOW),
]


@pytest.mark.parametrize(("fault", "method"), PASSING)
def test_what_passes_is_tried_again(
    fault: object,
    method: str,
    proxy: Proxy,
    store: Store,
    small: tuple[Path, Path],
    merged: dict[str, bytes],
    place: str,
) -> None:
    spoilt = first_of_each(fault, method)
    proxy.rule = lambda asked: spoilt(asked) or composed_over(store, asked)
    adapterkit.merge(*small, f"{store.root.scheme}://{BUCKET}/{place}/out")
    proxy.clear()
    assert there(store, f"{place}/out/") == merged
    assert store.entries(f"{place}/.") == []  # nor parts, where the answer to the last request for an object was lost


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ((403, "forbidden"), AuthError, "refused"),
        ((401, "authError"), AuthError, "credentials"),
        ((403, "AuthenticationFailed"), AuthError, "credentials"),
        ((403, "QuotaExceeded"), OutputError, "no room"),
        ((500, "InternalError"), StoreError, "7 attempts"),
    ],
)
def test_what_stays_leaves_nothing(
    fault: object, kind: type[Exception], words: str, proxy: Proxy, store: Store, small: tuple[Path, Path], place: str
) -> None:
    def rule(asked: Any) -> Any:
        sent = "comp=block&" in asked.query + "&" or asked.query.startswith("blockid") or b"/00001" in asked.body[:300]
        return fault if sent and b"00002-of-00003" in asked.path.encode() + asked.body[:300] else None

    proxy.rule = rule
    with pytest.raises(kind, match=words) as error:
        adapterkit.merge(*small, f"{store.root.scheme}://{BUCKET}/{place}/out")
    proxy.clear()
    assert "00002-of-00003.safetensors" in str(error.value)
    assert store.entries(f"{place}/") == []


def test_nobody_there_is_said_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("azure.storage.blob", reason="the extra stores is not installed")
    monkeypatch.setattr("adapterkit.stores.faults.FIRST_PAUSE", 0.001)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:9")
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", "http://127.0.0.1:9/one")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "one")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "b25l")
    for scheme in ("gs", "az"):
        with pytest.raises(StoreError, match=r"3 attempts \(no connection\)"):
            adapterkit.inspect(f"{scheme}://models/x")


def test_credentials_that_are_named_and_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("google.auth", reason="the extra stores is not installed")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    (tmp_path / "bad.json").write_text('{"type": "service_account"}')
    for name in ("bad.json", "gone.json"):
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / name))
        with pytest.raises(UsageError, match="names holds no credentials of Google; correct it, or unset it"):
            adapterkit.inspect("gs://models/x")


def test_an_account_that_nobody_names(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("azure.storage.blob", reason="the extra stores is not installed")
    for name in ("AZURE_STORAGE_ENDPOINT", "AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_CONNECTION_STRING"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=r"which account az:// is of; set AZURE_STORAGE_ACCOUNT_NAME"):
        adapterkit.inspect("az://models/x")


def test_a_remote_of_the_registry(store: Store, home: Path, place: str, tmp_path: Path) -> None:
    base = plain_base(tmp_path / "base")
    register(plain_adapter(tmp_path / "a1", base, base_model_name_or_path="org/base"), "tickets", base=base)
    to = f"{store.root.scheme}://{BUCKET}/{place}/tickets"
    done = push_bucket("tickets@1", f"{to}@v1")
    pulled = pull_bucket(f"{to}@v1", home=tmp_path / "elsewhere")
    assert pulled.record.content == done.content
    assert push_bucket("tickets@1", f"{to}@v1").new is False


def azure_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store of an account whose service is a proxy that answers everything itself."""
    pytest.importorskip("azure.storage.blob", reason="the extra stores is not installed")
    monkeypatch.setattr("adapterkit.stores.faults.FIRST_PAUSE", 0.001)
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING", raising=False)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"{endpoint}/one")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "one")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "b25l")
    return open_store(Address("az", BUCKET, ""))


def test_azures_words_are_those_of_its_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client gives some as words, some as members of a list (learn.microsoft.com, "Blob service error codes")."""
    with proxied("http://127.0.0.1:9") as proxy:
        found = azure_at(proxy.endpoint, monkeypatch)
        proxy.rule = lambda asked: (403, "AuthenticationFailed")
        with pytest.raises(
            AuthError, match=r"does not accept the credentials for az://models/a \(AuthenticationFailed\)"
        ):
            found.put("a", b"x")
        proxy.rule = lambda asked: (403, "UnauthorizedBlobOverwrite")
        assert not found.put("a", b"x", absent=True)
        proxy.rule = lambda asked: (400, "InvalidBlockList")
        assert found.begin("a", {}, Address("az", BUCKET, "w")).complete({1: ""}, absent=False) is None
        proxy.clear()
        proxy.rule = lambda asked: (400, "Md5Mismatch")  # the body was damaged on its way
        with pytest.raises(StoreError, match=r"in 7 attempts \(Md5Mismatch\)"):
            found.put("a", b"x")
        assert proxy.count() == 7


def test_an_identity_that_gives_no_token_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    with proxied("http://127.0.0.1:9") as proxy:
        found = azure_at(proxy.endpoint, monkeypatch)
        from azure.core.exceptions import ClientAuthenticationError

        from adapterkit.stores.azure import Account, Azure

        def bearer() -> str:
            raise ClientAuthenticationError("nobody is logged in")

        made = Account(found.account.service, bearer=bearer)
        store = Azure(found.root, made, lambda: made, lambda address: store)
        upload = store.begin("b", {}, Address("az", BUCKET, "w"))
        with pytest.raises(AuthError, match="does not accept the credentials for az://models/a"):
            upload.copy(1, Address("az", BUCKET, "a"), "", 0, 8)
        assert proxy.count() == 0


def test_hints_name_the_store_that_was_asked_for() -> None:
    for scheme in ("gs", "az"):
        with pytest.raises(UsageError, match=f"give it like {scheme}://models/x@v1 or {scheme}://models/x@sha256:"):
            parse_bucket(f"{scheme}://models/x@")
