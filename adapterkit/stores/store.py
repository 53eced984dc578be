"""What every store does: objects of one bucket, by key."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple, TypeVar

from adapterkit.errors import UsageError
from adapterkit.places import Address
from adapterkit.stores import meter
from adapterkit.stores.faults import Fault, told, trying

T = TypeVar("T")
MARK = "adapterkit-plan"  # metadata of a weight object: the digest of the plan that it is of
MOST_LISTED = 20_000  # objects below one prefix
PARALLEL = 16  # requests at a time, where each is small


@dataclass(frozen=True)
class StoredObject:
    """An object: its key, its size in bytes, and the ETag by which it is known to be the same.

    Attributes:
        marks: what its writer said of it, where that was asked for.
        written: when, by the store's clock, where it says so.
    """

    key: str
    size: int
    etag: str
    marks: Mapping[str, str] = field(default_factory=dict)
    written: datetime | None = field(default=None, compare=False)


class Begun(NamedTuple):
    """An upload that was begun and not ended: the key it is for, its id, and when it was begun."""

    key: str
    id: str
    started: datetime


class HeldPart(NamedTuple):
    """A part that a store holds of an upload: its size in bytes and its ETag."""

    size: int
    etag: str


class Assembly(ABC):
    """An object on its way: parts in any order, nothing to be seen before `complete`.

    Attributes:
        key, id: of the object; of the upload.
    """

    key: str
    id: str

    def expect(self, numbers: Sequence[int]) -> None:
        """Say which parts will be put from here, in ascending order: a store may send those that follow one another as one."""

    def give_up(self, why: BaseException) -> None:
        """Say that a part which was expected will not come: those that wait for it raise the same."""

    @abstractmethod
    def put(self, number: int, data: bytes | bytearray) -> str:
        """Send part ``number`` (from 1); its ETag."""

    @abstractmethod
    def copy(self, number: int, source: Address, etag: str, start: int, nbytes: int) -> str:
        """Have the store copy a range of another object of it as part ``number``; its ETag.

        Raises:
            CheckpointError: that object has another ETag now.
        """

    @abstractmethod
    def parts(self) -> dict[int, HeldPart] | None:
        """The parts that the store holds; None where it knows no such upload."""

    @abstractmethod
    def complete(self, etags: Mapping[int, str], *, absent: bool) -> str | None:
        """Make the object of these parts; its ETag, or None where ``absent`` and there is one already, or where the upload
        is gone."""

    def release(self) -> None:
        """Let go of what `complete` made the object of, once its ETag is noted where others look; few stores keep any."""

    @abstractmethod
    def abort(self) -> None:
        """Let go of the parts; nothing where the upload is gone."""


class Store(ABC):
    """The objects of one bucket.

    Every method raises, for what it cannot do:
        AuthError: credentials that are missing, wrong or expired.
        NotFound: no such object or bucket.
        CheckpointError: an object that has another ETag than it was asked for by.
        OutputError: no room.
        StoreError: no answer, or one that says no, after several attempts.

    Attributes:
        root: the bucket's address.
        copies_ranges: whether what it copies into an upload may be a part of an object.
        keeps_uploads: until somebody aborts them; else it drops them by itself.
        renewals: how often fresh credentials were taken; `renewing` is held meanwhile.
        conditions: whether it keeps "only where there is none yet"; None until that was seen.
        marked: whether an object keeps what its writer said of it.
        put_requests, more_if_conditional: how many requests it takes to write a small object; and to look first.
        rechecks: how many requests it takes to see that an object which was read is still the same.
        buffers: bytes of memory that its client takes for a file on its way, about.
    """

    root: Address
    copies_ranges = True
    keeps_uploads = True
    conditions: bool | None = None
    marked = True
    put_requests, more_if_conditional, rechecks, buffers = 1, 0, 0, 0
    renewals = 0
    renewing = threading.Lock()

    def place(self, key: str) -> Address:
        """The address of a key, for messages."""
        return self.root / key

    @abstractmethod
    def entries(self, prefix: str, wanted: Callable[[str], bool] = lambda key: True) -> list[StoredObject]:
        """The objects whose keys begin with ``prefix``, sorted, with when they were written.

        Args:
            wanted: of which keys; others are passed over, however many there are.

        Raises:
            UsageError: more than `MOST_LISTED`.
        """

    @abstractmethod
    def head(self, key: str) -> StoredObject | None:
        """An object, or None."""

    @abstractmethod
    def read(self, key: str, start: int, nbytes: int, etag: str = "") -> bytes:
        """Exactly ``nbytes`` of an object from ``start``, if it still has this ETag."""

    def check_unchanged(self, key: str, etag: str) -> None:
        """See that an object that was read is still the same, where `read` does not ask for that.

        Raises:
            CheckpointError: it is another.
        """

    @abstractmethod
    def put(self, key: str, data: bytes, *, absent: bool = False, over: str = "") -> bool:
        """Write a small object; False where ``absent`` and there is one already, or where the one that is to be written
        ``over`` has another ETag. A store without conditions writes it in any case; see `conditions`."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; one that is gone is no error."""

    def delete_each(self, keys: Iterable[str], request: Callable[[str], object]) -> None:
        """`delete` of a store that takes one request for each object, several at a time."""

        def gone(key: str) -> None:
            try:
                self.ask(lambda: request(key), self.place(key), writing=True, pass_on=True)
            except Fault as fault:
                if not fault.missing or fault.code == "NoSuchBucket":
                    raise told(fault, str(self.place(key)), writing=True) from None

        with ThreadPoolExecutor(PARALLEL) as pool:
            list(pool.map(gone, sorted(set(keys))))

    def deletions(self, count: int) -> int:
        """How many requests it takes to remove so many objects."""
        return count

    def begin(self, key: str, marks: Mapping[str, str], work: Address) -> Assembly:
        """Begin an upload: parts in any order.

        Args:
            marks: what the object will say of itself.
            work: a folder for small objects of this run, in a store that has no uploads of its own.
        """
        raise NotImplementedError

    def ending(self, parts: int) -> int:
        """How many requests an upload of so many parts takes beside them: to begin and to complete it."""
        return 2

    def resumed(self, key: str, id: str) -> Assembly:
        """An upload that was begun earlier."""
        raise NotImplementedError

    def uploads(self, prefix: str) -> list[Begun]:
        """Uploads to keys that begin with ``prefix`` which were neither completed nor aborted."""
        return []

    def renew(self) -> bool:
        """Take fresh credentials from where the first ones came; False where there are none."""
        return False

    def holds(self, address: Address) -> bool:
        """Whether this store can copy an object of ``address`` by itself."""
        return address.scheme == self.root.scheme

    def copies_to(self, other: Store) -> bool:
        """Whether objects of this store can be copied into ``other`` without coming here: one service, one user."""
        return self.root.scheme == other.root.scheme

    def ask(self, request: Callable[[], T], what: object, *, writing: bool = False, pass_on: bool = False) -> T:
        """The answer to one request, which is counted and tried again as `trying` says.

        Args:
            pass_on: raise the `Fault` that remains, for the caller to judge.
        """

        def counted() -> T:
            meter.count(1)
            return request()

        before = self.renewals

        def renew() -> bool:
            """Whether another attempt has other credentials: those that another thread took meanwhile will do."""
            with self.renewing:
                if self.renewals == before and self.renew():
                    self.renewals += 1
            return self.renewals != before

        try:
            return trying(counted, renew)
        except Fault as fault:
            if pass_on:
                raise
            raise told(fault, str(what), writing=writing) from None


def too_many(prefix: Address) -> UsageError:
    """The error of a listing that does not end."""
    return UsageError(f"more than {MOST_LISTED} objects lie below {prefix}", "name the folder of one model")
