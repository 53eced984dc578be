"""What a run used, for its report."""

from __future__ import annotations

from pathlib import Path


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes.

    Linux's own high-water mark is used where there is one: ``getrusage`` also counts what the process was forked from.
    """
    import resource
    import sys

    status = Path("/proc/self/status")
    if status.exists():
        found = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), "")
        if found:
            return int(found.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
