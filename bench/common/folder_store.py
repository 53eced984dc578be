"""A folder that answers as a bucket of S3 does and counts what it is asked: for objects too large to be uploaded anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from adapterkit.places import Address
from adapterkit.stores import meter
from adapterkit.stores.faults import Fault
from adapterkit.stores.store import Store, StoredObject


class FolderStore(Store):
    """Reads only. What it would be asked to write is planned, and not carried out."""

    def __init__(self, root: Address, folder: Path) -> None:
        self.root, self.folder = root, folder
        self.read_bytes: dict[str, int] = {}

    def entries(self, prefix: str) -> list[StoredObject]:
        meter.count(1)
        found = [self._entry(path) for path in sorted(self.folder.rglob("*")) if path.is_file()]
        return [one for one in found if one.key.startswith(prefix)]

    def _entry(self, path: Path) -> StoredObject:
        info = path.stat()
        return StoredObject(path.relative_to(self.folder).as_posix(), info.st_size, f'"{info.st_mtime_ns:x}"')

    def head(self, key: str) -> StoredObject | None:
        meter.count(1)
        path = self.folder / key
        return self._entry(path) if path.is_file() else None

    def read(self, key: str, start: int, nbytes: int, etag: str = "") -> bytes:
        with open(self.folder / key, "rb") as file:
            file.seek(start)
            data = file.read(nbytes)
        meter.count(1, down=len(data))
        self.read_bytes[key] = self.read_bytes.get(key, 0) + len(data)
        return data

    def put(self, key: str, data: bytes, *, absent: bool = False, over: str = "") -> bool:
        raise Fault(403, "AccessDenied")

    def deletions(self, count: int) -> int:
        return 1  # as S3 does it

    def delete(self, keys: Iterable[str]) -> None:
        raise Fault(403, "AccessDenied")
