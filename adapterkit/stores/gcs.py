"""Google Cloud Storage, through its JSON API (https://cloud.google.com/storage/docs/json_api/v1).

An object's generation is what it is known by: each request asks for one. An upload is made of objects, one for each part,
below a folder of the run; they are composed, at most 32 at a time, into the object that is wanted, which appears in one step
and only where no other has its name. What the store copies by itself is a whole object (``rewrite``): it knows no ranges.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from typing import Any
from urllib.parse import quote, urlencode

from adapterkit.places import Address
from adapterkit.stores import meter
from adapterkit.stores.faults import Fault, sense, told
from adapterkit.stores.http import Answer, Http, md5
from adapterkit.stores.store import MOST_LISTED, PARALLEL, Assembly, Begun, HeldPart, Store, StoredObject, too_many

ENDPOINT = "https://storage.googleapis.com"
COMPOSED = 32  # objects that one request puts together, at most
BEGUN = "begun"  # the object that says an upload is going on
_KEY = "adapterkit-key"  # its metadata: the key of the object that is wanted
_BOUND = "adapterkit-3f1c9a"
_BYTES = "application/octet-stream"
_WHO = "Google"


class Gcs(Store):
    """A bucket of Google Cloud Storage.

    Args:
        endpoint: of the API; another one for an emulator.
        token: makes the ``Authorization`` header's value, anew where it is asked to; None to ask as anybody.
    """

    copies_ranges = False
    conditions = True

    def __init__(
        self, root: Address, http: Http, endpoint: str = ENDPOINT, token: Callable[[bool], str] | None = None
    ) -> None:
        self.root, self._http, self.endpoint, self._token = root, http, endpoint.rstrip("/"), token

    def renew(self) -> bool:
        if self._token is None:
            return False
        self._token(True)
        return True

    # ------------------------------------------------------------------ requests

    def call(
        self, method: str, path: str, query: Mapping[str, str], *, body: bytes = b"", kind: str = "", span: str = ""
    ) -> Answer:
        """One request."""
        sent = {"Accept-Encoding": "identity", **({"Range": f"bytes={span}"} if span else {})}
        if self._token is not None:
            sent["Authorization"] = self._token(False)
        if kind:
            sent["Content-Type"] = kind
        asked = urlencode({name: value for name, value in query.items() if value}, quote_via=quote)
        url = f"{self.endpoint}{path}{'?' if asked else ''}{asked}"
        return self._http.ask(method, url, headers=sent, body=body or (b"" if method == "POST" else None))

    def object_path(self, key: str, bucket: str = "") -> str:
        """Where the API has an object."""
        return f"/storage/v1/b/{quote(bucket or self.root.bucket, safe='')}/o/{quote(key, safe='')}"

    @property
    def _bucket(self) -> str:
        return f"/storage/v1/b/{quote(self.root.bucket, safe='')}/o"

    # ------------------------------------------------------------------ reading

    def entries(self, prefix: str, wanted: Callable[[str], bool] = lambda key: True) -> list[StoredObject]:
        found: list[StoredObject] = []
        for one, when in self._listed(prefix):
            if not wanted(one.key):
                continue
            found.append(replace(one, written=when))
            if len(found) > MOST_LISTED:
                raise too_many(self.place(prefix))
        return sorted(found, key=lambda one: one.key)

    def _listed(self, prefix: str) -> Iterator[tuple[StoredObject, datetime]]:
        fields = "items(name,size,generation,metadata,timeCreated),nextPageToken"
        token = ""
        while True:
            query = {"prefix": prefix, "maxResults": "1000", "fields": fields, "pageToken": token}
            place = self.place(prefix) if prefix else self.root
            try:
                page = self.ask(lambda query=query: self.call("GET", self._bucket, query), place, pass_on=True)  # type: ignore[misc]
            except Fault as fault:
                if fault.missing:  # a list asks for no object, so it is the bucket, whatever the answer's words
                    fault = replace(fault, code="NoSuchBucket")
                raise told(fault, str(place)) from None
            with sense(self.root, _WHO):
                said = page.value
                found = [(_stored(one), _moment(one["timeCreated"])) for one in said.get("items") or ()]
                before, token = token, str(said.get("nextPageToken") or "")
            yield from (one for one in found if one[0].key.startswith(prefix))
            if not token or token == before:
                return

    def head(self, key: str) -> StoredObject | None:
        query = {"fields": "name,size,generation,metadata,timeCreated"}
        try:
            found = self.ask(lambda: self.call("GET", self.object_path(key), query), self.place(key), pass_on=True)
        except Fault as fault:
            if fault.missing and fault.code != "NoSuchBucket":
                return None
            raise told(fault, str(self.place(key))) from None
        with sense(self.place(key), _WHO):
            return replace(_stored(found.value), written=_moment(found.value["timeCreated"]))

    def read(self, key: str, start: int, nbytes: int, etag: str = "") -> bytes:
        if nbytes <= 0:
            return b""
        query = {"alt": "media", "ifGenerationMatch": etag}

        def asked() -> bytes:
            found = self.call("GET", self.object_path(key), query, span=f"{start}-{start + nbytes - 1}")
            meter.count(down=len(found.body))
            # A store that sends the whole object though a part was asked for.
            whole = found.status == 200 and len(found.body) > nbytes
            data = found.body[start : start + nbytes] if whole else found.body
            if len(data) != nbytes:
                raise Fault(words="the body was cut short")
            said = found.headers.get("x-goog-generation", "")
            if etag and said and said != etag:
                raise Fault(412)
            return data

        return self.ask(asked, self.place(key))

    # ------------------------------------------------------------------ writing

    def put(self, key: str, data: bytes, *, absent: bool = False, over: str = "") -> bool:
        try:
            self.ask(
                lambda: self._insert(key, data, condition="0" if absent else over),
                self.place(key),
                writing=True,
                pass_on=True,
            )
        except Fault as fault:
            if fault.changed and (absent or over):
                return False
            raise told(fault, str(self.place(key)), writing=True) from None
        return True

    def _insert(
        self, key: str, data: bytes | bytearray, *, condition: str = "", marks: Mapping[str, str] | None = None
    ) -> str:
        """Send an object with its MD5; its generation."""
        said = {"name": key, "contentType": _BYTES, "md5Hash": md5(data), "metadata": dict(marks or {})}
        head = f"--{_BOUND}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n{json.dumps(said)}\r\n"
        body = b"".join(
            (f"{head}--{_BOUND}\r\nContent-Type: {_BYTES}\r\n\r\n".encode(), data, f"\r\n--{_BOUND}--".encode())
        )
        found = self.call(
            "POST",
            f"/upload{self._bucket}",
            {"uploadType": "multipart", "ifGenerationMatch": condition},
            body=body,
            kind=f"multipart/related; boundary={_BOUND}",
        )
        meter.count(up=len(data))
        with sense(self.place(key), _WHO):
            return str(found.value["generation"])

    def delete(self, keys: Iterable[str]) -> None:
        self.delete_each(keys, lambda key: self.call("DELETE", self.object_path(key), {}))

    def deletions(self, count: int) -> int:
        return count

    def begin(self, key: str, marks: Mapping[str, str], work: Address) -> Assembly:
        # Neither below the folder that is wanted, where nothing is to be seen, nor below that of the run, which is listed.
        made = _Parts(self, key, f"{work.key}.parts/{key.rpartition('/')[2]}.{os.urandom(16).hex()}")
        self.ask(
            lambda: self._insert(made.object(BEGUN), b"", marks={**marks, _KEY: key}), self.place(key), writing=True
        )
        return made

    def resumed(self, key: str, id: str) -> Assembly:
        return _Parts(self, key, id)

    def uploads(self, prefix: str) -> list[Begun]:
        folder, _, name = prefix.rpartition("/")
        hidden = f"{folder}/.{name}" if folder else f".{name}"
        begun = []
        for where in sorted({prefix, hidden}):
            for one, made in self._listed(where):
                key = one.marks.get(_KEY, "")
                if one.key.endswith(f"/{BEGUN}") and key.startswith(prefix):
                    begun.append(Begun(key, one.key.removesuffix(f"/{BEGUN}"), made))
        return list(dict.fromkeys(begun))

    def ending(self, parts: int) -> int:
        composed, left = 0, parts
        while left > COMPOSED:
            left = -(-left // COMPOSED)
            composed += left
        # The marker, made and read; the compositions; a listing of what is let go of, and each of it.
        return 2 + composed + 1 + 1 + parts + composed + 1

    def copies_to(self, other: Store) -> bool:
        return isinstance(other, Gcs) and other.endpoint == self.endpoint


class _Parts(Assembly):
    """An upload: objects below ``id``, named by their numbers."""

    def __init__(self, store: Gcs, key: str, id: str) -> None:
        self._store, self.key, self.id = store, key, id

    def object(self, name: str) -> str:
        return f"{self.id}/{name}"

    def put(self, number: int, data: bytes | bytearray) -> str:
        return self._store.ask(
            lambda: self._store._insert(self.object(f"{number:05d}"), data), self._store.place(self.key), writing=True
        )

    def copy(self, number: int, source: Address, etag: str, start: int, nbytes: int) -> str:
        assert start == 0
        store, key = self._store, self.object(f"{number:05d}")
        path = f"{store.object_path(source.key, source.bucket)}/rewriteTo{store.object_path(key).removeprefix('/storage/v1')}"

        def asked(token: str) -> dict[str, Any]:
            query = {"ifSourceGenerationMatch": etag, "rewriteToken": token}
            said = store.call("POST", path, query, body=b"{}", kind="application/json")
            with sense(source, _WHO):
                return said.value

        token = ""
        while True:
            try:
                found = store.ask(lambda token=token: asked(token), source, writing=True, pass_on=True)  # type: ignore[misc]
            except Fault as fault:
                raise told(fault, str(source), writing=not fault.changed) from None
            with sense(source, _WHO):
                if found["done"]:
                    if int(found["resource"]["size"]) != nbytes:
                        raise told(Fault(412), str(source))
                    meter.count(inside=nbytes)
                    return str(found["resource"]["generation"])
                token = str(found["rewriteToken"])

    def parts(self) -> dict[int, HeldPart] | None:
        found = {one.key.removeprefix(f"{self.id}/"): one for one in self._store.entries(f"{self.id}/")}
        if BEGUN not in found:
            return None
        return {int(name): HeldPart(one.size, one.etag) for name, one in found.items() if name.isdecimal()}

    def complete(self, etags: Mapping[int, str], *, absent: bool) -> str | None:
        marker = self._store.head(self.object(BEGUN))
        if marker is None:
            return None
        names = [self.object(f"{number:05d}") for number in sorted(etags)]
        marks = {name: said for name, said in marker.marks.items() if name != _KEY}
        level = 0
        try:
            while len(names) > COMPOSED:
                groups = [names[at : at + COMPOSED] for at in range(0, len(names), COMPOSED)]
                made = [self.object(f"c{level}-{number:05d}") for number in range(len(groups))]
                with ThreadPoolExecutor(PARALLEL) as pool:
                    list(pool.map(self._compose, groups, made))
                names, level = made, level + 1
            found = self._compose(names, self.key, "0" if absent else "", marks)
        except Fault as fault:
            if (fault.changed and absent) or (fault.missing and fault.code != "NoSuchBucket"):
                return None
            raise told(fault, str(self._store.place(self.key)), writing=True) from None
        self.abort()
        return found

    def _compose(self, names: list[str], key: str, condition: str = "", marks: Mapping[str, str] | None = None) -> str:
        said = {
            "sourceObjects": [{"name": name} for name in names],
            "destination": {"contentType": _BYTES, "metadata": dict(marks or {})},
        }
        found = self._store.ask(
            lambda: self._store.call(
                "POST",
                f"{self._store.object_path(key)}/compose",
                {"ifGenerationMatch": condition},
                body=json.dumps(said).encode(),
                kind="application/json",
            ),
            self._store.place(self.key),
            writing=True,
            pass_on=True,
        )
        with sense(self._store.place(key), _WHO):
            return str(found.value["generation"])

    def abort(self) -> None:
        there = [one.key for one in self._store.entries(f"{self.id}/")]
        # The marker last: what is left after a kill is still known as an upload.
        self._store.delete(key for key in there if not key.endswith(f"/{BEGUN}"))
        self._store.delete([self.object(BEGUN)])


def _moment(said: object) -> datetime:
    return datetime.fromisoformat(str(said).replace("Z", "+00:00"))


def _stored(said: Mapping[str, Any]) -> StoredObject:
    marks = {str(name): str(value) for name, value in (said.get("metadata") or {}).items()}
    return StoredObject(str(said["name"]), int(said.get("size", 0)), str(said["generation"]), marks)
