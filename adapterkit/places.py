"""What a place is called: a path here, an address in an object store, or an address of something that is neither."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from adapterkit.errors import UsageError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
HUB = "hf"
_BUCKETS = "buckets"
STORES = {"s3": "s3://bucket", "gs": "gs://bucket", "az": "az://container", HUB: f"{HUB}://{_BUCKETS}/owner/name"}
"""Object stores by scheme, and how a bucket of each is written: Amazon S3 and what speaks like it, Google Cloud Storage,
Azure Blob Storage, and buckets of the Hub."""
OCI = "oci"
BUCKET = "bucket"
_ELSEWHERE_ON_THE_HUB = (_BUCKETS, "datasets", "spaces")


@dataclass(frozen=True, order=True)
class Address:
    """A place in an object store: ``s3://bucket/key``.

    Attributes:
        scheme: one of `STORES`.
        bucket: of Azure, the container; of the Hub, ``buckets/owner/name``.
        key: of an object, or what the keys of a folder's objects begin with; no slash at either end.
    """

    scheme: str
    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> Address:
        return replace(self, key=f"{self.key}/{name}" if self.key else name)

    @property
    def name(self) -> str:
        """What follows the last slash."""
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Address:
        return replace(self, key=self.key.rpartition("/")[0])

    def with_name(self, name: str) -> Address:
        """Another name beside this one."""
        return self.parent / name


def address_of(place: object) -> Address | None:
    """The address in a store that a place is, or None.

    A `Path` made of an address counts too, though it has lost a slash.

    Raises:
        UsageError: an address without a bucket, or with parts that no key may have.
    """
    if isinstance(place, Address):
        return place
    if not isinstance(place, (str, Path)):
        return None
    text = str(place)
    found = _SCHEME.match(text)
    if found is None or found[1].lower() not in STORES or _is_a_folder(text):
        return None
    scheme, rest = found[1].lower(), text[found.end() :].removeprefix("/")
    if scheme == HUB and rest.partition("/")[0] != _BUCKETS:
        return None  # a model, perhaps
    named = STORES[scheme].count("/") - 1  # parts that name the bucket
    bucket, key = rest.split("/")[:named], "/".join(rest.split("/")[named:]).strip("/")
    odd = {"", ".", ".."} & {*bucket, *(key.split("/") if key else ())} or not text.isprintable() or "\\" in text
    if len(bucket) < named or odd:
        shown = text[:80].encode("unicode_escape").decode()
        raise UsageError(f"{shown} is no address in a store", f"write it like {STORES[scheme]}/folder")
    return Address(scheme, "/".join(bucket), key)


def local(place: str | Path, what: str, hint: str = "") -> str | Path:
    """A place without ``file://``; anything with another scheme is refused by name.

    Without this, ``s3://bucket/x`` would be taken for a folder called ``s3:``.

    Args:
        what: the option that names it.
        hint: what to do about an address; by default, to copy.

    Raises:
        UsageError: an address of a store, a registry or a server; or the home of a user who is not there.
    """
    found = _SCHEME.match(str(place))
    if found is None or _is_a_folder(str(place)):
        if str(place).startswith("~") and os.path.expanduser(str(place)) == str(place):
            raise UsageError(f"{what} is {place}, and this machine has no such user", "write the path out")
        return place
    if found[1].lower() == "file":
        return unquote(re.sub(r"^file:/+", "/", str(place), flags=re.IGNORECASE))
    raise UsageError(
        f"{what} is {place}, and {found[1]}:// is neither read nor written here",
        hint or "give a path, and copy from or to the store with its own tool",
    )


def readable(place: str | Path, what: str) -> str | Path:
    """As `local`, where an address of a store, and of a model on the Hub, is a place too.

    Raises:
        UsageError: any other address.
    """
    address = address_of(place)
    if address is not None:
        return str(address)
    model = _hub_model(place)
    return f"{HUB}://{model}" if model else local(place, what)


def _hub_model(place: str | Path) -> str:
    """The model on the Hub that an address names; nothing for any other place."""
    found = _SCHEME.match(str(place))
    if found is None or found[1].lower() != HUB or _is_a_folder(str(place)):
        return ""
    rest = str(place)[found.end() :].lstrip("/")
    return "" if rest.split("/")[0] in _ELSEWHERE_ON_THE_HUB else rest


def writable(place: str | Path | Address, what: str, kind: str = "folder") -> Path | Address:
    """Where an output goes, or a file lies: a path, or an address of a store.

    Args:
        kind: of what is named there, for the error.

    Raises:
        UsageError: any other address, or one that names no object.
    """
    address = address_of(place)
    if address is None:
        assert not isinstance(place, Address)
        model = _hub_model(place)
        push = f"write a folder here, then: adapterkit push FOLDER {model}"
        return Path(local(place, what, push if model else ""))
    if not address.key:
        raise UsageError(f"{what} is {address}, a whole bucket", f"name a {kind} in it, as {address}/{_EXAMPLES[kind]}")
    return address


_EXAMPLES = {"folder": "merged", "file": "file.json"}


def here(place: Path | Address) -> Path:
    """Where files about an output go: beside it, or in the working folder for one in a store."""
    return (Path(place.name) if isinstance(place, Address) else place).absolute()


def remote_of(text: str) -> tuple[str, str]:
    """Which kind of remote an address of `push` and `pull` is, and the address as that kind writes it.

    Returns:
        `HUB` and ``org/name[@revision]``; `OCI` and ``oci://...``; or `BUCKET` and the address of a folder in a store.

    Raises:
        UsageError: another scheme, or a part of the Hub that holds no models.
    """
    scheme, sign, rest = text.partition("://")
    if not sign:
        return HUB, text
    if scheme.lower() == OCI:
        return OCI, f"{OCI}://{rest}"
    if scheme.lower() == HUB and rest.split("/")[0] not in _ELSEWHERE_ON_THE_HUB:
        return HUB, rest
    if scheme.lower() in STORES and (scheme.lower() != HUB or rest.split("/")[0] == _BUCKETS):
        return BUCKET, f"{scheme.lower()}://{rest}"
    shown = text[:80].encode("unicode_escape").decode()
    what = "a model repository or a bucket of the Hub" if scheme.lower() == HUB else "a remote"
    raise UsageError(
        f"{shown} is not {what}", f"use org/name, oci://host/name:tag, or a folder of {_or(STORES.values())}"
    )


def _or(buckets: Iterable[str]) -> str:
    *most, last = buckets
    return f"{', '.join(most)} or {last}"


def _is_a_folder(text: str) -> bool:
    """Whether a place begins with a folder that is there, though it looks like an address."""
    head, _, rest = text.partition("/")
    return not rest.startswith("/") and Path(head).exists()
