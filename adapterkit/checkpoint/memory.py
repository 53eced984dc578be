"""How much memory this process may use, and whether a plan fits into it."""

from __future__ import annotations

from pathlib import Path

from adapterkit.errors import OutOfMemory

_CGROUPS = Path("/sys/fs/cgroup")
_OF_PROCESS = Path("/proc/self/cgroup")
_NONE = 1 << 60  # what cgroups of version 1 say where there is no limit, and more


def memory_limit() -> tuple[int, str] | None:
    """The smallest limit on the memory of this process in bytes, and who sets it; None where there is none.

    Looks at limits of the process (``ulimit -v``, ``ulimit -d``) and of its control groups, version 1 and 2, which is what
    containers have.
    """
    found = [*_of_process(), *_of_groups()]
    return min(found, default=None)


def check_memory(need: int, what: str) -> None:
    """Refuse work that does not fit.

    Args:
        need: bytes, by the plan's estimate.

    Raises:
        OutOfMemory: a limit is smaller.
    """
    limit = memory_limit()
    if limit is not None and need > limit[0]:
        raise OutOfMemory(
            f"{what} needs about {need / 1e6:,.0f} MB of memory, and {limit[1]} allows {limit[0] / 1e6:,.0f} MB",
            "raise the limit, or give fewer --jobs",
        )


def _of_process() -> list[tuple[int, str]]:
    try:
        import resource
    except ImportError:  # Windows
        return []
    found = []
    for which, name in ((resource.RLIMIT_AS, "ulimit -v"), (resource.RLIMIT_DATA, "ulimit -d")):
        soft = resource.getrlimit(which)[0]
        if soft != resource.RLIM_INFINITY and soft >= 0:
            found.append((soft, name))
    return found


def _of_groups() -> list[tuple[int, str]]:
    try:
        lines = _OF_PROCESS.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if kinds == "":
            root, name = _CGROUPS, "memory.max"
        elif "memory" in kinds.split(","):
            root, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        place = root / path.lstrip("/")
        for folder in (place, *place.parents):
            if not folder.is_relative_to(root):
                break
            try:
                said = (folder / name).read_text().strip()
            except OSError:
                continue
            if said.isdigit() and int(said) < _NONE:
                found.append((int(said), "the control group of this process (a container, perhaps)"))
    return found
