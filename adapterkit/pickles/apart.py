"""Run what reads pickles in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from adapterkit.dtypes import DTYPES
from adapterkit.errors import CheckpointError, OutOfMemory, UnsafeError, how_it_ended

LIMIT = 300.0  # seconds to load a file, and one more for each of these bytes
SPEED = 5_000_000
MEMORY = 6 << 30  # bytes of addresses, beside twice the file: torch and its libraries
CHILD = Path(__file__).with_name("child.py")


def answered(script: str, *arguments: str, more: tuple[str, ...] = ()) -> list[str]:
    """Run a script of this folder in a process of its own; gives the names of the tensors that it wrote.

    Args:
        arguments: those before the table of dtypes; the last but one is what is read.
        more: those behind it.

    Raises:
        UnsafeError: a pickle that is more than tensors, or takes too long to load.
        CheckpointError: it cannot be read, or holds something else.
        OutOfMemory: the system ended the process.
    """
    dtypes: dict[str, str] = {}
    for code, dtype in DTYPES.items():
        dtypes.setdefault(dtype.torch_name, code)
    path = Path(arguments[-2])
    files = [one for one in path.iterdir() if one.is_file()] if path.is_dir() else [path]
    size = sum(one.stat().st_size for one in files)
    seconds, memory = LIMIT + size / SPEED, str(2 * size + MEMORY)
    command = [sys.executable, "-I", str(CHILD.with_name(script)), *arguments, json.dumps(dtypes), *more, memory]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise UnsafeError(f"{path} took more than {seconds:.0f} s to load", "do not load it") from None
    if done.returncode < 0:
        raise OutOfMemory(
            f"{path} could not be read: of the process that loads it, {how_it_ended(done.returncode)}",
            "raise the limit of this machine or container, and run it again",
        )
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise CheckpointError(
            f"{path} could not be read (of the process that loaded it: {how_it_ended(done.returncode)})",
            "download it again",
        ) from None
    if "unsafe" in answer:
        raise UnsafeError(f"{path} is more than tensors: {answer['unsafe']}", "do not load it")
    if "error" in answer:
        raise CheckpointError(f"{path} cannot be converted: {answer['error']}", "copy or save it again, whole")
    return list(answer["names"])
