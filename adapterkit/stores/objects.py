"""Any store, through obstore: objects read by range and listed; small ones written whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from adapterkit.places import Address
from adapterkit.stores import meter
from adapterkit.stores.faults import NO_CONNECTION, Fault, told
from adapterkit.stores.store import MARK, MOST_LISTED, Store, StoredObject, too_many

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9]{2,64})</Code>")
_KINDS = {
    "NotFoundError": 404,
    "FileNotFoundError": 404,
    "PreconditionError": 412,
    "AlreadyExistsError": 412,
    "PermissionDeniedError": 403,
    "UnauthenticatedError": 401,
    "NotSupportedError": 501,
    "InvalidPathError": 400,
}


class ObjectStore(Store):
    """A bucket that obstore reads and writes.

    Args:
        client: one of obstore's stores.
        again: makes it anew, with fresh credentials.
    """

    def __init__(self, root: Address, client: Any, again: Callable[[], Any] | None = None) -> None:
        self.root, self._client, self._again = root, client, again

    def renew(self) -> bool:
        if self._again is None:
            return False
        self._client = self._again()
        return True

    def entries(self, prefix: str, wanted: Callable[[str], bool] = lambda key: True) -> list[StoredObject]:
        import obstore

        def listed() -> list[StoredObject]:
            found: list[StoredObject] = []
            with _faults():
                for number, page in enumerate(obstore.list(self._client, prefix=prefix or None, chunk_size=1000)):
                    meter.count(1 if number else 0)
                    found += [
                        StoredObject(one["path"], one["size"], one["e_tag"] or "", written=one["last_modified"])
                        for one in page
                        if wanted(one["path"])
                    ]
                    if len(found) > MOST_LISTED:
                        raise too_many(self.place(prefix))
            # obstore takes a prefix for a folder's name whether or not it ends in a slash.
            return sorted((one for one in found if one.key.startswith(prefix)), key=lambda one: one.key)

        return self.ask(listed, self.place(prefix) if prefix else self.root)

    def head(self, key: str) -> StoredObject | None:
        import obstore

        def asked() -> StoredObject:
            with _faults():
                found = obstore.get(self._client, key, options={"head": True})
                marks = {name: str(value) for name, value in found.attributes.items() if name.lower() == MARK}
                return StoredObject(key, found.meta["size"], found.meta["e_tag"] or "", marks)

        try:
            return self.ask(asked, self.place(key), pass_on=True)
        except Fault as fault:
            self.missing(fault, key)
            return None

    def missing(self, fault: Fault, key: str) -> None:
        """Let a fault pass that says only that there is no such object."""
        if not fault.missing or fault.code == "NoSuchBucket":
            raise told(fault, str(self.place(key))) from None

    def read(self, key: str, start: int, nbytes: int, etag: str = "") -> bytes:
        import obstore

        if nbytes <= 0:
            return b""

        def asked() -> bytes:
            with _faults():
                wanted: Any = {"range": (start, start + nbytes), **({"if_match": etag} if etag else {})}
                found = obstore.get(self._client, key, options=wanted)
                data = bytes(found.bytes())
            meter.count(down=len(data))
            if len(data) != nbytes or found.range[0] != start:
                raise Fault(words="the body was cut short")
            return data

        return self.ask(asked, self.place(key))

    def put(self, key: str, data: bytes, *, absent: bool = False, over: str = "") -> bool:
        def asked(conditional: bool) -> None:
            self._put(key, data, absent=absent and conditional, over=over if conditional else "")
            meter.count(up=len(data))

        return self.conditionally(asked, key, absent or bool(over)) is not False

    def _put(self, key: str, data: bytes, *, absent: bool, over: str) -> None:
        import obstore

        mode: Any = {"e_tag": over} if over else "create" if absent else "overwrite"
        with _faults():
            obstore.put(self._client, key, data, mode=mode, use_multipart=False)

    def conditionally(self, asked: Callable[[bool], str | bool | None], key: str, conditional: bool) -> str | bool:
        """Write on a condition; False where it does not hold. A store that has none is asked without."""
        for wanted in (conditional and self.conditions is not False, False):
            try:
                found = self.ask(lambda wanted=wanted: asked(wanted), self.place(key), writing=True, pass_on=True)  # type: ignore[misc]
                return True if found is None else found
            except Fault as fault:
                if wanted and fault.changed:
                    return False
                if not wanted or not fault.unknown:
                    raise told(fault, str(self.place(key)), writing=True) from None
                self.conditions = False
        raise AssertionError("unreachable")

    def delete(self, keys: Iterable[str]) -> None:
        import obstore

        for key in keys:

            def asked(key: str = key) -> None:
                with _faults():
                    obstore.delete(self._client, key)

            try:
                self.ask(asked, self.place(key), writing=True, pass_on=True)
            except Fault as fault:
                self.missing(fault, key)

    def holds(self, address: Address) -> bool:
        return (address.scheme, address.bucket) == (self.root.scheme, self.root.bucket)


class _faults:  # noqa: N801  (a context manager)
    """Turn what obstore raises into a `Fault`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None or isinstance(error, Fault) or not isinstance(error, Exception):
            return
        module = type(error).__module__.partition(".")[0]
        if module != "obstore" and not isinstance(error, FileNotFoundError):
            return
        text = str(error)
        status, code = _STATUS.search(text), _CODE.search(text)
        known = _KINDS.get(type(error).__name__, 0)
        raise Fault(int(status[1]) if status else known, code[1] if code else "", _words(text)) from None


def _words(text: str) -> str:
    """What a connection did, without addresses or headers in it."""
    for sign, words in (
        ("kind: Connect", NO_CONNECTION),
        ("kind: Timeout", "no answer in time"),
        ("decoding response body", "the body was cut short"),
    ):
        if sign in text:
            return words
    return "the connection failed"
