"""The program `adapterkit`, and how its process ends.

Once torch is imported, Python spends a tenth of a second on its own end: it takes apart, object by object, what the kernel
takes back at once. So the process is left early, after all that anybody can see of an end: threads are waited for, functions
that asked for the exit (`atexit`) have run, and output is flushed.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from typing import Any

from adapterkit.cli import main

_OF_PYTHON = ("_run_module_as_main", "_run_code")  # what stands below us where Python was started with -m


def run() -> None:
    """The program: the command line, and then the end of the process.

    Raises:
        SystemExit: with the documented code.
    """
    end = _Early() if _alone() else None
    # torch is a million small objects that all live on, and a plan of 92,000 tensors is several: to look through them for
    # circles again and again took a third of the time of a plan, and 60 ms of an import.
    gc.set_threshold(1_000_000, 50, 100)
    try:
        main()
    except SystemExit as asked:
        if end is not None:
            end.code = asked.code
        raise


class _Early:
    """The last function of all that run at the exit: those that are registered later run before it."""

    def __init__(self) -> None:
        self.code: Any = NotImplemented  # until the command line says one: of a failure without a code, Python tells
        atexit.register(self._leave)

    def _leave(self) -> None:
        code = 0 if self.code is None else self.code
        if type(code) is not int or "torch" not in sys.modules:
            return
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        except (OSError, ValueError):
            return  # the reader of a pipe is gone: Python says so, with its own code
        os._exit(code)


def _alone() -> bool:
    """Whether nobody else wants anything of the end of this process: no caller of ours, no function that was registered for
    the exit already, no debugger, no profiler, and nobody who asked Python for a prompt or for warnings at the end."""
    if sys.flags.inspect or sys.flags.dev_mode or sys.gettrace() or sys.getprofile():
        return False
    monitoring = getattr(sys, "monitoring", None)
    if monitoring is not None and any(monitoring.get_tool(number) for number in range(6)):
        return False
    registered = getattr(atexit, "_ncallbacks", None)
    if registered is None or registered():
        return False
    script = sys._getframe(2)  # the module that is run; behind it stands nobody, or Python's own -m
    below = script.f_back
    while below is not None and below.f_globals.get("__name__") == "runpy" and below.f_code.co_name in _OF_PYTHON:
        below = below.f_back
    return below is None
