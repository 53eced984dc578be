"""Work done in forked children: torch is imported once, in the parent, and a child costs milliseconds."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def fork(work: Callable[[], object]) -> int:
    """Run ``work`` in a child; its exit status is 0, an error's own code, or 130 when interrupted. Gives its pid."""
    import torch

    torch.set_num_threads(1)  # a pool of torch's own would not survive the fork
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks beside threads; the children use none of the parent's
        pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        work()
        code = 0
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 98
    except BaseException as error:
        code = getattr(error, "exit_code", 99)
    finally:
        os._exit(code)
    return 0


def wait(pid: int, timeout: float = 120.0) -> int:
    """The exit status of a child (negative: the signal that ended it)."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"child {pid} did not end within {timeout} s")


def run(work: Callable[[], object], timeout: float = 120.0) -> int:
    return wait(fork(work), timeout)
