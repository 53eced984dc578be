"""Which base is this, exactly: identities from cheap to strong, and what two of them prove about each other.

| level    | what is hashed                       | cost            | equal proves        | different proves |
|----------|--------------------------------------|-----------------|---------------------|------------------|
| commit   | Hub id and git commit                | one request     | same files          | nothing          |
| files    | sha256 of each weight file           | one request     | same weights        | nothing          |
| shapes   | (name, shape) of every tensor        | headers         | same shapes         | other tensors    |
| skeleton | (name, dtype, shape) of every tensor | headers         | same storage        | nothing more     |
| probe    | 4 x 4 KiB of at most 32 tensors      | 512 KiB at most | likely same weights | other weights    |
| sampled  | 4 x 4 KiB of every tensor            | 16 KiB a tensor | very likely same    | other weights    |
| merkle   | every byte of every tensor           | reading it all  | same weights        | other weights    |

Bytes are compared only where the skeletons agree: a bf16 copy of an fp32 base has other bytes and may hold the same
weights. Nothing here depends on how tensors are spread over files or on metadata. The functions are pure: tensors come
as ``(name, dtype code, shape, nbytes)`` and bytes through ``read(name, offset, length)``, local or by HTTP range.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterkit.errors import CheckpointError, RegistryError
from adapterkit.registry.canonical import canonical_row
from adapterkit.registry.names import check_commit, check_path, check_repo, check_sha256

Tensor = tuple[str, str, Sequence[int], int]
Read = Callable[[str, int, int], bytes]

WINDOW = 4096
WINDOWS = 4
PROBED = 32
_BLOCK = 8 << 20
_DIGESTS = ("shapes", "skeleton", "probe", "sampled", "merkle")
LEVELS = ("commit", "files", *_DIGESTS)


@dataclass(frozen=True)
class Identity:
    """What is known about which base this is; an empty field is not known.

    ``id`` is a Hub id (never a local path), ``commit`` 40 hex digits, ``files`` pairs of path and sha256 of the weight
    files, the others digests as in the table above.
    """

    id: str = ""
    commit: str = ""
    files: tuple[tuple[str, str], ...] = ()
    shapes: str = ""
    skeleton: str = ""
    probe: str = ""
    sampled: str = ""
    merkle: str = ""

    def __post_init__(self) -> None:
        if self.id:
            check_repo(self.id, "identity.id")
        if self.commit:
            check_commit(self.commit, "identity.commit")
        for path, digest in self.files:
            check_path(path, "identity.files")
            check_sha256(digest, f"identity.files[{path}]")
        for level in _DIGESTS:
            if getattr(self, level):
                check_sha256(getattr(self, level), f"identity.{level}")
        object.__setattr__(self, "files", tuple(sorted((path, digest) for path, digest in self.files)))

    def level(self, name: str) -> str:
        """The value of one level as text that is equal exactly when the level agrees; empty when not known."""
        if name == "commit":
            return f"{self.id}@{self.commit}" if self.id and self.commit else ""
        if name == "files":
            # By content, not by name: a mirror may rename files. Sorted, so the order of shards plays no part.
            return " ".join(sorted(digest for _, digest in self.files))
        return str(getattr(self, name))

    @property
    def known(self) -> tuple[str, ...]:
        """The levels that are present, cheap to strong."""
        return tuple(name for name in LEVELS if self.level(name))

    @property
    def label(self) -> str:
        """A short name to print: the id with seven digits of the commit, or a digest."""
        if self.id:
            return f"{self.id}@{self.commit[:7]}" if self.commit else self.id
        strongest = next((name for name in reversed(LEVELS) if self.level(name)), "")
        return f"{strongest} {self.level(strongest)[:12]}" if strongest else "unknown"

    def to_json(self) -> dict[str, Any]:
        """Only what is known, as plain JSON."""
        found: dict[str, Any] = {key: getattr(self, key) for key in ("id", "commit", *_DIGESTS) if getattr(self, key)}
        if self.files:
            found["files"] = dict(self.files)
        return found

    @classmethod
    def from_json(cls, value: Any, where: str) -> Identity:
        """The identity in a JSON object.

        Raises:
            RegistryError: a field is unknown or malformed.
        """
        if not isinstance(value, Mapping):
            raise RegistryError(f"{where} is not an object")
        fields = dict(value)
        files = fields.pop("files", {})
        unknown = set(fields) - {"id", "commit", *_DIGESTS}
        if unknown or not isinstance(files, Mapping) or not all(isinstance(item, str) for item in fields.values()):
            raise RegistryError(f"{where} has fields that are unknown or not text: {sorted(unknown) or 'see values'}")
        return cls(**fields, files=tuple(files.items()))


@dataclass(frozen=True)
class IdentityComparison:
    """What two identities prove about each other.

    ``verdict`` is a key of ``VERDICTS``; ``level`` the one that decided; ``agree`` and ``differ`` list the levels known
    in both.
    """

    verdict: str
    level: str
    agree: tuple[str, ...]
    differ: tuple[str, ...]
    sentence: str

    @property
    def fits(self) -> bool | None:
        """True when the weights are the same, False when they are proved other, None when it cannot be told."""
        return {"same": True, "likely": True, "other": False, "misfit": False}.get(self.verdict)


VERDICTS = {
    "same": "same weights",
    "likely": "same weights as far as sampled",
    "other": "same shapes, other weights",
    "misfit": "does not fit: tensor names or shapes differ",
    "shapes": "same shapes; the weights were not compared",
    "dtype": "same shapes, stored in another dtype; the weights cannot be compared byte by byte",
    "unknown": "cannot be told: no level that is known on both sides decides",
}
# Strongest evidence first: (level, verdict when it agrees, verdict when it differs); "" decides nothing.
_RULES = (
    ("merkle", "same", "other"),
    ("files", "same", ""),
    ("sampled", "likely", "other"),
    ("probe", "likely", "other"),
    ("commit", "same", ""),
    ("skeleton", "shapes", "dtype"),
    ("shapes", "shapes", "misfit"),
)
_BYTE_LEVELS = ("merkle", "sampled", "probe")


def compare(mine: Identity, other: Identity, mine_is: str = "", other_is: str = "") -> IdentityComparison:
    """What the levels known on both sides prove; never more than that.

    ``mine_is`` and ``other_is`` name the two sides in the sentence, such as ``"org/base-instruct"`` and ``"org/base"``.
    """
    both = [name for name in LEVELS if mine.level(name) and other.level(name)]
    agree = tuple(name for name in both if mine.level(name) == other.level(name))
    differ = tuple(name for name in both if name not in agree)
    verdict, level = "unknown", ""
    for name, equal, unequal in _RULES:
        if name in _BYTE_LEVELS and name in differ and "skeleton" not in agree:
            continue  # Other bytes under other (or unknown) shapes and dtypes say nothing about the weights.
        found = equal if name in agree else unequal if name in differ else ""
        if name == "skeleton" and "shapes" not in agree and found == "dtype":
            continue  # Without the shapes level a different skeleton may be dtypes or shapes.
        if name == "commit" and found and ("shapes" in differ or "skeleton" in differ):
            continue  # The Hub says one thing and the files on disk another: believe the files.
        if found:
            verdict, level = found, name
            break
    return IdentityComparison(verdict, level, agree, differ, _sentence(verdict, level, differ, mine_is, other_is))


def _sentence(verdict: str, level: str, differ: tuple[str, ...], mine_is: str, other_is: str) -> str:
    text = VERDICTS[verdict]
    if level:
        text += f" (by {level})"
    elif differ:
        text += f" ({', '.join(differ)} differ, which proves nothing about the weights)"
    if verdict in ("other", "misfit") and mine_is and other_is:
        text += f": this was made on {mine_is}, and this is {other_is}"
    return text


def shapes_digest(tensors: Iterable[Tensor]) -> str:
    """sha256 over the sorted (name, shape) of all tensors."""
    return _rows((name, shape) for name, _, shape, _ in _sorted(tensors))


def skeleton_digest(tensors: Iterable[Tensor]) -> str:
    """sha256 over the sorted (name, dtype, shape) of all tensors."""
    return _rows((name, dtype, shape) for name, dtype, shape, _ in _sorted(tensors))


def windows(nbytes: int) -> list[tuple[int, int]]:
    """The (offset, length) ranges sampled from a tensor: four of 4 KiB from first byte to last, or all of it."""
    if nbytes <= WINDOW * WINDOWS:
        return [(0, nbytes)] if nbytes else []
    return [(index * (nbytes - WINDOW) // (WINDOWS - 1), WINDOW) for index in range(WINDOWS)]


def probed(tensors: Iterable[Tensor]) -> list[Tensor]:
    """At most 32 tensors spread evenly over the sorted names, the last one among them."""
    rows = _sorted(tensors)
    if len(rows) <= PROBED:
        return rows
    return [rows[(index + 1) * len(rows) // PROBED - 1] for index in range(PROBED)]


def sample_digest(tensors: Iterable[Tensor], read: Read) -> str:
    """sha256 over name, dtype, shape and the sampled windows of each given tensor, in sorted order."""
    total = hashlib.sha256()
    for name, dtype, shape, nbytes in _sorted(tensors):
        one = hashlib.sha256()
        for offset, length in windows(nbytes):
            one.update(_exactly(read, name, offset, length))
        total.update(canonical_row(name, dtype, shape, one.hexdigest()) + b"\n")
    return total.hexdigest()


def tensor_digests(tensors: Iterable[Tensor], read: Read) -> Iterator[tuple[str, str, Sequence[int], str]]:
    """``(name, dtype, shape, sha256 of all bytes)`` of each tensor, read in blocks of 8 MiB."""
    for name, dtype, shape, nbytes in tensors:
        one = hashlib.sha256()
        for offset in range(0, nbytes, _BLOCK):
            one.update(_exactly(read, name, offset, min(_BLOCK, nbytes - offset)))
        yield name, dtype, shape, one.hexdigest()


def merkle_root(leaves: Iterable[tuple[str, str, Sequence[int], str]]) -> str:
    """The root over ``(name, dtype, shape, sha256)`` leaves sorted by name.

    Leaf: sha256(00 || canonical row); node: sha256(01 || left || right); an odd node moves up as it is. The prefixes
    and the absence of duplication are those of RFC 6962, section 2.1, and keep two different trees from sharing a root.

    Raises:
        CheckpointError: no leaf, or two with one name.
    """
    rows = sorted(leaves, key=lambda row: row[0].encode("utf-8", "surrogatepass"))
    _unique([row[0] for row in rows])
    level = [
        hashlib.sha256(b"\0" + canonical_row(name, dtype, shape, check_sha256(digest, f"digest of {name}"))).digest()
        for name, dtype, shape, digest in rows
    ]
    while len(level) > 1:
        paired = [hashlib.sha256(b"\1" + a + b).digest() for a, b in zip(level[::2], level[1::2], strict=False)]
        level = paired + level[len(paired) * 2 :]
    return level[0].hex()


def identify(
    tensors: Iterable[Tensor], read: Read | None = None, upto: str = "merkle", known: Identity | None = None
) -> Identity:
    """The identity up to the level ``upto``; ``known`` (commit, file digests) is kept and added to.

    Without ``read`` only ``shapes`` and ``skeleton`` are computed.
    """
    from dataclasses import replace

    if upto not in _DIGESTS:
        raise RegistryError(
            f"'{upto}' is not a level that is computed from tensors", f"use one of {', '.join(_DIGESTS)}"
        )
    rows = _sorted(tensors)
    found: dict[str, Any] = {"shapes": shapes_digest(rows), "skeleton": skeleton_digest(rows)}
    if read is not None:
        if _DIGESTS.index(upto) >= _DIGESTS.index("probe"):
            found["probe"] = sample_digest(probed(rows), read)
        if _DIGESTS.index(upto) >= _DIGESTS.index("sampled"):
            found["sampled"] = sample_digest(rows, read)
        if upto == "merkle":
            found["merkle"] = merkle_root(tensor_digests(rows, read))
    return replace(known or Identity(), **found)


def _sorted(tensors: Iterable[Tensor]) -> list[Tensor]:
    rows = sorted(tensors, key=lambda row: row[0].encode("utf-8", "surrogatepass"))
    _unique([row[0] for row in rows])
    return rows


def _unique(names: list[str]) -> None:
    if not names:
        raise CheckpointError("a checkpoint without tensors has no identity")
    if len(set(names)) != len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise CheckpointError(f"tensor {twice!a} is named twice", "the checkpoint is damaged")


def _rows(rows: Iterable[tuple[Any, ...]]) -> str:
    total = hashlib.sha256()
    for row in rows:
        total.update(canonical_row(*row) + b"\n")
    return total.hexdigest()


def _exactly(read: Read, name: str, offset: int, length: int) -> bytes:
    data = read(name, offset, length)
    if len(data) != length:
        raise CheckpointError(
            f"tensor {name!a} gave {len(data)} of {length} bytes at offset {offset}",
            "the file is truncated or changed",
        )
    return data
