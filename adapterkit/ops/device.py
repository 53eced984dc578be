"""Where the arithmetic of a block runs: the CPU, or a CUDA device."""

from __future__ import annotations

import re

from adapterkit.errors import UsageError, option

CPU = "cpu"
_NAME = re.compile(r"cpu|cuda(?::(\d{1,3}))?")


def check_name(device: str) -> str:
    """The name of a device, without asking whether this machine has it.

    Raises:
        UsageError: no such name.
    """
    if _NAME.fullmatch(device) is None:
        raise UsageError(f"'{device}' is no device", "use cpu, cuda or, of several, cuda:1")
    return device


def check_there(device: str) -> None:
    """Whether this machine has the device.

    Raises:
        UsageError: it does not, or this torch cannot use it.
    """
    found = _NAME.fullmatch(check_name(device))
    if device == CPU or found is None:
        return
    import torch

    if not torch.cuda.is_available():
        built = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device here"
        raise UsageError(
            f"{device} cannot be used: {built}", f"leave out {option('device')}, or install torch with CUDA"
        )
    count = torch.cuda.device_count()
    if int(found[1] or 0) >= count:
        raise UsageError(f"there is no {device} here: devices are numbered from 0, and there are {count}", "use cuda:0")
