"""What a driver needs of workers, whatever they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from adapterkit import errors
from adapterkit.checkpoint import hub_bytes, listing
from adapterkit.errors import AdapterkitError
from adapterkit.ops.device import CPU

READY, MOVED, ENDED, FAILED, LOST = "ready", "moved", "ended", "failed", "lost"


@dataclass(frozen=True)
class Reading:
    """How a process was told to read, which its workers are told too.

    Attributes:
        follow_links: see `adapterkit.checkpoint.listing.set_follow_links`.
        verify_downloads: see `adapterkit.checkpoint.hub_bytes.set_verify_downloads`.
    """

    follow_links: bool = False
    verify_downloads: bool = True

    @classmethod
    def here(cls) -> Reading:
        """That of this process."""
        return cls(listing.follows_links(), hub_bytes.wanted())

    @property
    def options(self) -> list[str]:
        """As options of the command line."""
        return ["--follow-links"] * self.follow_links + ["--no-verify-download"] * (not self.verify_downloads)

    def take(self) -> None:
        """Have this process read so."""
        listing.set_follow_links(self.follow_links)
        if not self.verify_downloads:
            hub_bytes.set_verify_downloads(False)


@dataclass(frozen=True)
class WorkerSetting:
    """What a worker is started with.

    Attributes:
        plan: the text of the plan file; ``file``: where it lies.
        out: where the output goes; every worker has to see that place.
        part_size: how the plan is cut.
        jobs: threads of a worker.
        reading: how it reads.
        device: where it computes.
    """

    plan: str
    file: str
    out: str
    part_size: int | None
    jobs: int
    reading: Reading = Reading()
    device: str = CPU


@dataclass(frozen=True)
class Message:
    """What a worker says.

    Attributes:
        kind: ready (it can take parts), moved (bytes of a part are done), ended (a part is), failed (a part cannot be
            executed by anybody), lost (the worker is gone).
        worker: its number.
        part: that it is about; -1 where it is about none.
        said: the bytes of ``moved``, the report of ``ended``, the error of ``failed``, in words why it is ``lost``.
    """

    kind: str
    worker: int
    part: int = -1
    said: Mapping[str, Any] = field(default_factory=dict)


class Pool(Protocol):
    """Workers that are started, and take one part at a time."""

    def start(self) -> int:
        """Start one more worker; its number."""

    def give(self, worker: int, part: int) -> None:
        """Have a worker execute a part."""

    def wait(self, seconds: float) -> Sequence[Message]:
        """What workers said meanwhile; waits so long for the first of it."""

    def close(self) -> None:
        """End all workers."""


def as_said(error: BaseException) -> dict[str, str]:
    """An error as a message holds it."""
    if isinstance(error, AdapterkitError):
        return {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    return {"error": "", "message": f"a worker failed ({type(error).__name__}: {error})", "hint": ""}


def raised(said: Mapping[str, Any]) -> AdapterkitError:
    """The error that a worker spoke of."""
    kind = getattr(errors, str(said.get("error")), None)
    found = kind if isinstance(kind, type) and issubclass(kind, AdapterkitError) else AdapterkitError
    return found(str(said.get("message")), str(said.get("hint") or ""))
