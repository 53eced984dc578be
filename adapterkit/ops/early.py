"""torch's library on its way into memory, while the command line still reads headers."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec

LIBRARY = ("lib", "libtorch_cpu.so")  # in torch's folder, on Linux
# The loader takes one library at a time: what a verb still asks it for would wait for torch's, so that comes first.
BEFORE = ("bisect", "contextvars", "datetime", "fcntl", "hashlib", "heapq", "queue", "unicodedata")


def map_torch() -> threading.Thread | None:
    """Have the kernel map and link torch's largest library, on a thread; None where there is none, or torch is there.

    That is a sixth of the time of ``import torch``, and the only part of it that needs no interpreter: Python imports other
    modules meanwhile. torch finds it in memory then, as the loader knows libraries by their files. Where it cannot be linked,
    nothing is said: ``import torch`` knows better what is wrong.

    The thread is waited for at the exit of Python, as a library must not be taken apart while it is put together.
    """
    if "torch" in sys.modules or _limited():
        return None
    spec = find_spec("torch")
    places = spec.submodule_search_locations if spec is not None else None
    path = os.path.join(next(iter(places)), *LIBRARY) if places else ""
    if not os.path.isfile(path):
        return None
    for name in BEFORE:
        with suppress(ImportError):
            import_module(name)
    thread = threading.Thread(target=_link, args=(path,), name="torch's library")
    with suppress(RuntimeError):  # no more threads: it is mapped when torch is imported
        thread.start()
        return thread
    return None


def _limited() -> bool:
    """Whether this process may have so many addresses and no more: then the verb says first that they are too few."""
    try:
        import resource
    except ImportError:  # Windows
        return False
    limits = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    return any(resource.getrlimit(one)[0] != resource.RLIM_INFINITY for one in limits)


def _link(path: str) -> None:
    """``dlopen`` as a call of a C function, which lets the interpreter go; ``CDLL(path)`` holds it all the while."""
    with suppress(AttributeError, OSError):
        link = ctypes.CDLL(None).dlopen
        link.restype, link.argtypes = ctypes.c_void_p, (ctypes.c_char_p, ctypes.c_int)
        link(os.fsencode(path), os.RTLD_NOW)
