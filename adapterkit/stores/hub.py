"""Buckets of the Hub (``hf://buckets/owner/name``), through its API and the client of its store of bytes.

The API is that of huggingface_hub's own client (2.4: ``HfApi.list_bucket_tree``, ``get_bucket_paths_info``,
``batch_bucket_files``). A name in a bucket stands for a xet hash, by which the bytes are known: what is read is read by its
hash, and a file that is in a bucket or a model repository already is given another name without moving it. A bucket keeps no
conditions on writing, and nothing that a writer says of a file.

An upload is made of files below a folder of the run. Parts that follow one another are sent as one file, in order, so that
a run that sends a whole file makes one; it gets its name at the end. Files of several workers are read back and sent as one,
of which the client moves only the chunks that are not there yet.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import islice
from typing import Any
from urllib.parse import quote

from adapterkit.errors import OutputError
from adapterkit.foreign import json_value
from adapterkit.places import Address
from adapterkit.stores import meter
from adapterkit.stores.faults import NO_CONNECTION, Fault, sense, told
from adapterkit.stores.store import MARK, MOST_LISTED, Assembly, Begun, HeldPart, Store, StoredObject, too_many
from adapterkit.stores.xet import Access, Xet, XetWriter

BATCH = 1000  # files of one request
WINDOW = 16 << 20  # bytes that are read back at a time
SHORT = 3  # attempts at bytes that do not come whole
BEGUN = "begun"  # the file that says an upload is going on
SIZES = ".json"  # what ends the name of a file with the sizes of the parts of another
_WAIT = 120.0  # seconds
_WHO, _WHERE = "the Hub", " ($HF_ENDPOINT)"  # see `sense`
_CODE = re.compile(r"[A-Za-z0-9]{2,64}")
_RESET = re.compile(r"\bt\s*=\s*(\d{1,6})\b")
_HASH = re.compile(r"[0-9a-fA-F]{64}")
_RUN = re.compile(r"(\d{5,})-(\d{5,})")
_NOTHING = "0" * 64  # of a file without bytes


class HubBucket(Store):
    """A bucket of the Hub; or a model repository (``models/owner/name``), from which bytes are copied and read.

    Args:
        headers: says who asks, as the Hub's own tools do, anew each time.
        endpoint: of the Hub.
        opened: the store of another address, from which a file is copied.
    """

    copies_ranges = False
    conditions = False
    marked = False
    put_requests, more_if_conditional, rechecks = 2, 1, 1
    buffers = 256 << 20  # measured: 340 MB for one file, 1.2 GB for eight

    def __init__(
        self,
        root: Address,
        headers: Callable[[], Mapping[str, str]],
        endpoint: Callable[[], str],
        opened: Callable[[Address], Store],
    ) -> None:
        self.root, self._who, self._endpoint, self.opened = root, headers, endpoint, opened
        self._headers = headers()
        self._xet = Xet(self._access)
        self._sizes: dict[str, int] = {}  # of files that were listed, by hash

    @property
    def endpoint(self) -> str:
        return self._endpoint().rstrip("/")

    @property
    def name(self) -> str:
        """``owner/name``, as the API calls the bucket."""
        return self.root.bucket.partition("/")[2]

    @property
    def _is_bucket(self) -> bool:
        return self.root.bucket.startswith("buckets/")

    def renew(self) -> bool:
        before, self._headers = self._headers, self._who()
        self._xet.forget()
        return self._headers != before

    # ------------------------------------------------------------------ requests

    def call(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
        """The response to one request about the bucket; ``path`` is behind its name, or a whole address of the Hub's."""
        from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

        url = path if path.startswith("http") else f"{self.endpoint}/api/{self.root.bucket}{path}"
        sent = {**self._headers, **({"Content-Type": kind} if body is not None else {})}
        try:
            found = get_session().request(method, url, headers=sent, content=body, timeout=_WAIT)
        except Exception as error:
            raise _no_answer(error) from None
        if not 200 <= found.status_code < 300 and (path != "/batch" or found.status_code != 422):
            raise _fault(found)
        return found

    def _access(self, kind: str) -> Access:
        path = f"/xet-{kind}-token{'' if self._is_bucket else '/main'}"
        meter.count(1)
        found = self.call("GET", path)
        with sense(self.root, _WHO, _WHERE):
            said = json_value(found.content)
            url = f"{self.endpoint}/api/{self.root.bucket}{path}"
            return Access(str(said["casUrl"]), str(said["accessToken"]), int(said["exp"]), url, self._headers)

    # ------------------------------------------------------------------ reading

    def entries(self, prefix: str, wanted: Callable[[str], bool] = lambda key: True) -> list[StoredObject]:
        return self._listed(prefix, MOST_LISTED, wanted)

    def _listed(
        self, prefix: str, most: int | None = None, wanted: Callable[[str], bool] = lambda key: True
    ) -> list[StoredObject]:
        """The files whose names begin so, sorted; no more than ``most``, where that is said."""
        within = quote(prefix.rstrip("/"), safe="")
        url, found = f"/tree{'/' if within else ''}{within}?recursive=true", dict[str, StoredObject]()
        seen = {url}
        while url:
            try:
                page = self.ask(lambda url=url: self.call("GET", url), self.place(prefix), pass_on=True)  # type: ignore[misc]
            except Fault as fault:
                if fault.code == "EntryNotFound":
                    break
                raise told(fault, str(self.place(prefix) if prefix else self.root)) from None
            with sense(self.root, _WHO, _WHERE):
                rows = [self._stored(one) for one in json_value(page.content) if one["type"] == "file"]
                url = str(page.links.get("next", {}).get("url", ""))
                if url and (url in seen or not url.startswith(f"{self.endpoint}/")):
                    raise ValueError(url)  # a list without an end, or one of somebody else
                seen.add(url)
            found |= {one.key: one for one in rows if one.key.startswith(prefix) and wanted(one.key)}
            if most is not None and len(found) > most:
                raise too_many(self.place(prefix))
        return [found[key] for key in sorted(found)]

    def _stored(self, said: Mapping[str, Any]) -> StoredObject:
        size, hash = int(said["size"]), str(said["xetHash"]) if said["size"] else _NOTHING
        if not _HASH.fullmatch(hash):
            raise ValueError(hash)
        self._sizes[hash] = size
        when = said.get("uploadedAt") or said.get("mtime")
        written = datetime.fromisoformat(str(when).replace("Z", "+00:00")) if when else None
        if written is not None and written.tzinfo is None:
            written = written.replace(tzinfo=timezone.utc)
        return StoredObject(str(said["path"]), size, hash, written=written)

    def _looked(self, keys: Sequence[str]) -> dict[str, StoredObject]:
        """Those of some files that are there; one request."""
        found = self.call("POST", "/paths-info", json.dumps({"paths": list(keys)}).encode())
        with sense(self.root, _WHO, _WHERE):
            rows = [self._stored(one) for one in json_value(found.content) if one["type"] == "file"]
        return {one.key: one for one in rows if one.key in keys}

    def head(self, key: str) -> StoredObject | None:
        return self.ask(lambda: self._looked([key]), self.place(key)).get(key)

    def read(self, key: str, start: int, nbytes: int, etag: str = "") -> bytes:
        if nbytes <= 0:
            return b""
        if not etag:
            there = self.head(key)
            if there is None:
                raise told(Fault(404), str(self.place(key)))
            etag = there.etag

        def asked() -> bytes:
            data = self._xet.read(etag, self._sizes.get(etag), start, nbytes)
            meter.count(down=len(data))
            if len(data) != nbytes:
                if self._is_bucket:
                    meter.count(1)
                    there = self._looked([key]).get(key)
                    if there is None or there.etag != etag:
                        raise Fault(412)
                raise Fault(words="the body was cut short", most=SHORT)
            return data

        return self.ask(asked, self.place(key))

    def check_unchanged(self, key: str, etag: str) -> None:
        there = self.head(key)
        if there is None or there.etag != etag:
            raise told(Fault(412), str(self.place(key)))

    # ------------------------------------------------------------------ writing

    def put(self, key: str, data: bytes, *, absent: bool = False, over: str = "") -> bool:
        def asked() -> bool:
            meter.count(1)
            if absent or over:  # somebody may still write between the look and the writing
                meter.count(1)
                there = self._looked([key]).get(key)
                if (there is not None) if absent else (there is None or there.etag != over):
                    return False
            hash = self._xet.send(data) if data else _NOTHING
            meter.count(up=len(data))
            self.batch([self.adding(key, hash)])
            return True

        return self.ask(asked, self.place(key), writing=True)

    def adding(self, key: str, hash: str) -> dict[str, Any]:
        """A line of `batch`: a name for bytes that were sent."""
        return {"type": "addFile", "path": key, "xetHash": hash, "mtime": int(time.time() * 1000)}

    def naming(self, key: str, hash: str, source: str) -> dict[str, Any]:
        """A line of `batch`: a name for a file of another bucket, of this one, or of a model repository."""
        kind, _, owner = source.partition("/")
        more = {"sourceRepoType": kind.removesuffix("s"), "sourceRepoId": owner}
        return {"type": "copyFile", "path": key, "xetHash": hash, "mtime": int(time.time() * 1000), **more}

    def batch(self, lines: Sequence[Mapping[str, Any]], *, every: bool = True) -> list[str]:
        """Name, copy and remove files by one request; the names of those for which it failed.

        Args:
            every: it has to be done for every one.
        """
        body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        found = self.call("POST", "/batch", body, "application/x-ndjson")
        with sense(self.root, _WHO, _WHERE):
            said = json_value(found.content) if found.content else {}
            failed = [str(one["path"]) for one in said.get("failed") or ()]
        if not failed and found.status_code == 422:
            failed = [str(line["path"]) for line in lines]
        if failed and every:
            raise Fault(422, "OperationFailed")
        return failed

    def delete(self, keys: Iterable[str]) -> None:
        left = iter(dict.fromkeys(keys))
        while some := list(islice(left, BATCH)):
            lines = [{"type": "deleteFile", "path": key} for key in some]
            failed = self.ask(lambda lines=lines: self.batch(lines, every=False), self.root, writing=True)  # type: ignore[misc]
            if failed:  # one that is gone is no error
                still = self.ask(lambda failed=failed: self._looked(failed), self.root)  # type: ignore[misc]
                for key in still:
                    raise OutputError(f"{self.place(key)} could not be removed", "check the permissions")

    def deletions(self, count: int) -> int:
        return -(-count // BATCH)

    def begin(self, key: str, marks: Mapping[str, str], work: Address) -> Assembly:
        # Neither below the folder that is wanted, where nothing is to be seen, nor below that of the run, which is listed.
        made = _Runs(self, key, f"{work.key}.parts/{key.rpartition('/')[2]}.{os.urandom(16).hex()}")
        self.put(made.file(BEGUN), json.dumps({"key": key, "plan": marks.get(MARK, "")}).encode())
        return made

    def resumed(self, key: str, id: str) -> Assembly:
        return _Runs(self, key, id)

    def uploads(self, prefix: str) -> list[Begun]:
        folder, _, name = prefix.rpartition("/")
        hidden = f"{folder}/.{name}" if folder else f".{name}"
        begun: dict[str, Begun] = {}
        for where in sorted({prefix, hidden}):
            for one in self._listed(where):
                if one.key.endswith(f"/{BEGUN}") and ".parts/" in one.key and one.key not in begun:
                    key = self._said(one).get("key", "")
                    if key.startswith(prefix):  # of one without a date nobody knows that it is old
                        when = one.written or datetime.now(timezone.utc)
                        begun[one.key] = Begun(key, one.key.removesuffix(f"/{BEGUN}"), when)
        return list(begun.values())

    def _said(self, one: StoredObject) -> dict[str, str]:
        """What a small file of an upload says; nothing where it is another's."""
        if one.size > 1 << 16:
            return {}
        try:
            said = json_value(self.read(one.key, 0, one.size, one.etag))
            return {str(name): str(value) for name, value in said.items()}
        except (ValueError, AttributeError):
            return {}

    def ending(self, parts: int) -> int:
        # The marker; the name of what was sent; a look, a listing, the name of the whole, and the end of what it was made of.
        return self.put_requests + 1 + 4

    def copies_to(self, other: Store) -> bool:
        return isinstance(other, HubBucket) and other.endpoint == self.endpoint

    def hash_sent(self, chunks: Iterable[bytes]) -> str:
        """Send a file; its xet hash."""
        made = self._xet.writer()
        try:
            for data in chunks:
                made.write(data)
                meter.count(up=len(data))
            return made.finish()[0]
        except BaseException:
            made.abort()
            raise

    def writer(self) -> XetWriter:
        """Begin a file without a name."""
        return self._xet.writer()


class _Run:
    """Parts that follow one another, on their way as one file.

    Attributes:
        first, last: their numbers.
        next: the one that may be sent now.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.next = first, last, first
        self.sizes: list[int] = []
        self.writer: XetWriter | None = None


class _Runs(Assembly):
    """An upload: files below ``id``, each of parts that follow one another, with their sizes beside it."""

    def __init__(self, store: HubBucket, key: str, id: str) -> None:
        self._store, self.key, self.id = store, key, id
        self._turn = threading.Condition()
        self._runs: dict[int, _Run] = {}  # by the number of each of its parts
        self._given_up: BaseException | None = None
        self._made_of: dict[str, StoredObject] = {}

    def file(self, name: str) -> str:
        return f"{self.id}/{name}"

    @property
    def _place(self) -> Address:
        return self._store.place(self.key)

    def expect(self, numbers: Sequence[int]) -> None:
        with self._turn:
            fresh = [number for number in numbers if number not in self._runs]
            while fresh:
                count = next((at for at in range(1, len(fresh)) if fresh[at] != fresh[at - 1] + 1), len(fresh))
                run = _Run(fresh[0], fresh[count - 1])
                self._runs |= dict.fromkeys(fresh[:count], run)
                fresh = fresh[count:]

    def give_up(self, why: BaseException) -> None:
        with self._turn:
            self._given_up = self._given_up or why
            self._turn.notify_all()

    def put(self, number: int, data: bytes | bytearray) -> str:
        self.expect([number])
        run = self._runs[number]
        with self._turn:
            self._turn.wait_for(lambda: run.next == number or self._given_up is not None)
            if self._given_up is not None:
                raise self._given_up
        self._store.ask(lambda: self._write(run, data), self._place, writing=True)
        if number == run.last:
            self._end(run)
        with self._turn:
            run.next += 1
            self._turn.notify_all()
        return str(number)

    def _write(self, run: _Run, data: bytes | bytearray) -> None:
        """Send a part behind those before it."""
        if run.writer is None:
            run.writer = self._store.writer()
        run.writer.write(data)
        run.sizes.append(len(data))
        meter.count(up=len(data))

    def _end(self, run: _Run) -> None:
        """Give what was sent a name below this upload, so that it is kept."""
        assert run.writer is not None
        name, sizes = self.file(f"{run.first:05d}-{run.last:05d}"), json.dumps({"sizes": run.sizes}).encode()
        with _told(self._place):
            hash, beside = run.writer.finish(sizes)
        lines = [self._store.adding(f"{name}{SIZES}", beside), self._store.adding(name, hash)]
        self._store.ask(lambda: self._store.batch(lines), self._place, writing=True)

    def copy(self, number: int, source: Address, etag: str, start: int, nbytes: int) -> str:
        assert start == 0
        store = self._store
        name, sizes = self.file(f"{number:05d}-{number:05d}"), json.dumps({"sizes": [nbytes]}).encode()

        def asked() -> bool:
            meter.count(1)
            lines = [store.adding(f"{name}{SIZES}", store.hash_sent([sizes])), store.naming(name, etag, source.bucket)]
            return not store.batch(lines, every=False)

        if store.ask(asked, source, writing=True):
            meter.count(inside=nbytes)
            return str(number)
        # Another region, perhaps, from which nothing is copied: the bytes take the way through here.
        place = store.opened(source)
        spans = ((at, min(WINDOW, nbytes - at)) for at in range(0, nbytes, WINDOW))
        with _told(self._place):
            hash = store.hash_sent(place.read(source.key, at, count, etag) for at, count in spans)
            lines = [store.adding(f"{name}{SIZES}", store.hash_sent([sizes])), store.adding(name, hash)]
        store.ask(lambda: store.batch(lines), self._place, writing=True)
        return str(number)

    def _there(self) -> dict[str, StoredObject]:
        return {one.key.removeprefix(f"{self.id}/"): one for one in self._store.entries(f"{self.id}/")}

    def _sizes(self, there: Mapping[str, StoredObject]) -> dict[str, list[int]]:
        """By the name of a file of parts, their sizes."""
        found = {}
        for name, one in there.items():
            numbers, beside = _RUN.fullmatch(name), there.get(f"{name}{SIZES}")
            if numbers is None or beside is None or beside.size > 1 << 18:
                continue
            first, last = int(numbers[1]), int(numbers[2])
            try:
                said = json_value(self._store.read(beside.key, 0, beside.size, beside.etag))
                sizes = [int(size) for size in said["sizes"]]
            except (ValueError, TypeError, KeyError):
                continue
            if len(sizes) == last - first + 1 and sum(sizes) == one.size:
                found[name] = sizes
        return found

    def parts(self) -> dict[int, HeldPart] | None:
        there = self._there()
        if BEGUN not in there:
            return None
        held: dict[int, HeldPart] = {}
        for name, sizes in self._sizes(there).items():
            first = int(name.partition("-")[0])
            held |= {first + at: HeldPart(size, str(first + at)) for at, size in enumerate(sizes)}
        return held

    def complete(self, etags: Mapping[int, str], *, absent: bool) -> str | None:
        store, numbers = self._store, sorted(etags)
        found = store.head(self.key)
        there = self._there()
        if BEGUN not in there:
            return None
        whole = there.get(f"{numbers[0]:05d}-{numbers[-1]:05d}")
        if whole is not None:
            line = store.naming(self.key, whole.etag, store.root.bucket)
        else:
            pieces = self._pieces(there, numbers)
            if pieces is None:
                return None
            with _told(self._place):
                line = store.adding(self.key, store.hash_sent(pieces))
        if found is not None and absent and found.etag != line["xetHash"]:
            return None  # the same bytes are of another worker of this plan, and named once more
        store.ask(lambda: store.batch([line]), self._place, writing=True)
        self._made_of = there
        return str(line["xetHash"])

    def release(self) -> None:
        if self._made_of:
            self._remove(self._made_of)
            self._made_of = {}

    def _pieces(self, there: Mapping[str, StoredObject], numbers: Sequence[int]) -> Iterator[bytes] | None:
        """The bytes of parts that lie in several files, in order; None where one is missing."""
        runs = sorted((int(name.partition("-")[0]), name, sizes) for name, sizes in self._sizes(there).items())
        spans: list[tuple[StoredObject, int, int]] = []
        at, last = numbers[0], numbers[-1]
        while at <= last:
            holding = [run for run in runs if run[0] <= at < run[0] + len(run[2])]
            if not holding:
                return None
            first, name, sizes = max(holding, key=lambda run: run[0] + len(run[2]))
            start = sum(sizes[: at - first])
            spans.append((there[name], start, there[name].size))
            at = first + len(sizes)

        def read() -> Iterator[bytes]:
            for one, start, stop in spans:
                for low in range(start, stop, WINDOW):
                    yield self._store.read(one.key, low, min(WINDOW, stop - low), one.etag)

        return read()

    def _remove(self, there: Mapping[str, StoredObject]) -> None:
        # The marker last: what is left after a kill is still known as an upload.
        self._store.delete([*(one.key for name, one in there.items() if name != BEGUN), self.file(BEGUN)])

    def abort(self) -> None:
        for run in {id(run): run for run in self._runs.values()}.values():
            if run.writer is not None:
                run.writer.abort()
        if there := self._there():
            self._remove(there)


def _no_answer(error: Exception) -> Exception:
    """What a client's error says of the connection; one that is none of a connection's stays."""
    name = type(error).__name__
    if name == "OfflineModeIsEnabled":
        return Fault(words="the Hub is switched off by HF_HUB_OFFLINE", most=1)
    if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
        return error
    if "Timeout" in name and "Connect" not in name:
        return Fault(words="no answer in time")
    return Fault(words=NO_CONNECTION if "Connect" in name else "the connection failed")


def _fault(found: Any) -> Fault:
    """What an answer of the Hub says is wrong."""
    status, said = int(found.status_code), str(found.headers.get("X-Error-Code") or "")
    code = said if _CODE.fullmatch(said) else ""
    words = str(found.headers.get("X-Error-Message") or "").lower()
    if status == 404 and code != "EntryNotFound":
        code = "NoSuchBucket"
    elif status == 401:
        code = "AuthenticationFailed"
    elif status in (402, 403, 413) and ("storage" in words or "quota" in words):
        code = "StorageQuotaExceeded"
    reset = _RESET.search(str(found.headers.get("ratelimit") or ""))
    after = str(found.headers.get("Retry-After") or "")
    wait = float(reset[1]) if reset else float(after) if after.isdecimal() else 0.0
    return Fault(status, code, wait=wait if status == 429 else 0.0)


@contextmanager
def _told(what: Address) -> Iterator[None]:
    """Where bytes are sent without a second attempt: a fault is an error for users."""
    try:
        yield
    except Fault as fault:
        raise told(fault, str(what), writing=True) from None
