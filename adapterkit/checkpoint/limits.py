"""How many cores and how much memory this process may use, and whether a plan fits into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from adapterkit.errors import OutOfMemory

GROUPS = Path("/sys/fs/cgroup")
OF_PROCESS = Path("/proc/self/cgroup")

ADDRESSES = "ulimit -v"
MAPPED = 550_000_000  # bytes of addresses beyond the memory that is used; measured with torch 2.9 on two threads
IN_TRANSFORMERS = 340_000_000  # and where transformers is loaded, with all that it brings; measured with 5.24
_FEW = 4_000_000_000
_NONE = 1 << 60  # what cgroups of version 1 say where there is no limit, and more


def cores() -> int:
    """How many cores this process may use: those that it may run on, or fewer where a control group has a quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [text.split() for text in _said("cpu", "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    quotas = [int(one[0]) / int(one[1]) for one in shares if len(one) == 2 and one[0].isdigit() and one[1].isdigit()]
    return min([count, *(max(1, round(quota)) for quota in quotas)])


def memory_limit() -> tuple[int, str] | None:
    """The smallest limit on the memory of this process in bytes, and who sets it; None where there is none.

    Looks at limits of the process (``ulimit -v``, ``ulimit -d``) and of its control groups, version 1 and 2, which is what
    containers have.
    """
    return min(_limits(), default=None)


def _limits() -> list[tuple[int, str]]:
    return [*_of_process(), *_of_groups()]


def check_memory(need: int, what: str, *, mapped: int = MAPPED) -> None:
    """Refuse work that does not fit.

    Args:
        need: bytes, by the plan's estimate.
        mapped: bytes of addresses beyond them that libraries take.

    Raises:
        OutOfMemory: a limit is smaller.
    """
    for allowed, who in _limits():
        # Libraries take room for addresses that they never use as memory.
        wanted, kind = (need + mapped, "virtual memory") if who == ADDRESSES else (need, "memory")
        if wanted > allowed:
            raise OutOfMemory(
                f"{what} needs about {wanted / 1e6:,.0f} MB of {kind}, and {who} allows {allowed / 1e6:,.0f} MB",
                "raise the limit, or give fewer jobs",
            )


def cramped() -> str:
    """Who leaves this process so few addresses that libraries fail in ways of their own; empty when nobody does."""
    found = [allowed for allowed, who in _of_process() if who == ADDRESSES and allowed < _FEW]
    return f"{ADDRESSES} allows {found[0] / 1e6:,.0f} MB" if found else ""


def _of_process() -> list[tuple[int, str]]:
    try:
        import resource
    except ImportError:  # Windows
        return []
    found = []
    for which, name in ((resource.RLIMIT_AS, ADDRESSES), (resource.RLIMIT_DATA, "ulimit -d")):
        soft = resource.getrlimit(which)[0]
        if soft != resource.RLIM_INFINITY and soft >= 0:
            found.append((soft, name))
    return found


def _of_groups() -> list[tuple[int, str]]:
    found = [int(text) for text in _said("memory", "memory.max", "memory.limit_in_bytes") if text.isdigit()]
    return [(size, "the control group of this process (a container, perhaps)") for size in found if size < _NONE]


def _said(kind: str, name: str, *old: str) -> Iterator[str]:
    """What a limit's file holds, in each control group of this process and in those around it (Linux; what containers have).

    Args:
        kind: the controller of version 1, such as "cpu".
        name: the file of version 2.
        old: the files of version 1; their texts are joined by a space.

    Source: cgroups(7); cgroup-v2.rst and cgroup-v1 of the kernel's documentation.
    """
    try:
        lines = OF_PROCESS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if kinds and kind not in kinds.split(","):
            continue
        top, names = (GROUPS / kind, old) if kinds else (GROUPS, (name,))
        place = top / path.lstrip("/")
        for folder in (place, *place.parents):
            if not folder.is_relative_to(top):
                break
            try:
                yield " ".join((folder / one).read_text().strip() for one in names)
            except OSError:  # this group sets no such limit
                continue
