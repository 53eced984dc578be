"""Where arithmetic runs: the CPU, or a device beside it (CUDA, or Apple's Metal).

This is the one place that opens a device, and the one that moves values there and back. A `Device` is opened by name; one
that is absent, or set to round float32 products, is refused by name. What computes takes blocks of 64 MiB and more to it:

* `Device.gather` reads a range in pieces through two pinned buffers, so that a piece is read while the one before is
  copied;
* `Device.at_work` bounds how many blocks are computed there at a time, so that memory does not grow with the threads;
* `Device.down` copies what came out into pinned memory while other threads go on, and waits for its own copy alone.

All work is on the device's default stream. Threads share what they copy there, and one stream keeps that in order.
"""

from __future__ import annotations

import os
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adapterkit.errors import OutOfMemory, UsageError, nearest, option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

CPU, CUDA = "cpu", "cuda"
BATCH = 1 << 24
"""Elements of a block that is computed on a device: 64 MiB of float32."""
PIECE = 1 << 22  # elements of which a block is put together, through two buffers
AT_WORK = 3  # blocks that are computed on a device at a time: one comes, one is computed, one goes

_NAME = re.compile(r"([a-z]+)(?::(\d{1,3}))?")


@dataclass(frozen=True)
class Sort:
    """A sort of device.

    Attributes:
        why_not: why this machine, or its torch, has none; empty where it has.
        count: how many there are.
        wide: it computes in float64.
        pinned: memory here can be pinned for copies, which then go on by themselves.
        said: facts of one of them, by its number, for a record and for `doctor`.
        numbered: several of them are told apart by a number.
    """

    why_not: Callable[[], str]
    count: Callable[[], int]
    said: Callable[[int], dict[str, Any]]
    wide: bool = True
    pinned: bool = False
    numbered: bool = True


def _no_cuda() -> str:
    import torch

    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return "this torch was built without CUDA"
    return "torch finds no CUDA device here"


def _cuda_count() -> int:
    import torch

    return torch.cuda.device_count()


def _cuda_said(index: int) -> dict[str, Any]:
    import torch

    found = torch.cuda.get_device_properties(index)
    version = {"cuda": torch.version.cuda} if torch.version.cuda else {"rocm": str(getattr(torch.version, "hip", ""))}
    return {"name": found.name, "memory": int(found.total_memory), **version}


def _no_mps() -> str:
    import torch

    return "" if torch.backends.mps.is_available() else "torch finds no Metal device here"


def _mps_said(index: int) -> dict[str, Any]:
    import torch

    return {"name": "Apple Metal", "memory": int(torch.mps.recommended_max_memory())}


SORTS: dict[str, Sort] = {
    "cuda": Sort(_no_cuda, _cuda_count, _cuda_said, pinned=True),
    "mps": Sort(_no_mps, lambda: 1, _mps_said, wide=False, numbered=False),
}
"""What can be named beside the CPU."""


def larger(block: int) -> int:
    """Elements of a block on a device: so many blocks of the CPU's together as make 64 MiB of float32."""
    return max(1, BATCH // block) * block


def _parse(device: str) -> tuple[str, int]:
    """The sort and the number of a device, without asking whether this machine has it.

    Raises:
        UsageError: no such name.
    """
    found = _NAME.fullmatch(device) if isinstance(device, str) else None
    sort = SORTS.get(found[1]) if found is not None else None
    if found is not None and found[0] == CPU:
        return CPU, 0
    if found is None or sort is None or (found[2] is not None and not sort.numbered):
        word = str(device).partition(":")[0].strip().lower()
        close = nearest({"gpu": CUDA, "nvidia": CUDA}.get(word, word), [CPU, *SORTS], " ").strip() if word else ""
        same = f"'{device}'" in close
        hint = close if close and not same and ":" not in str(device) else "use cpu, cuda, of several cuda:1, or mps"
        raise UsageError(f"'{device}' is no device", hint)
    return found[1], int(found[2] or 0)


def check_name(device: str) -> str:
    """The name of a device, without asking whether this machine has it.

    Raises:
        UsageError: no such name.
    """
    _parse(device)
    return device


def check_wide(device: str, what: str) -> None:
    """Whether a device of this name computes in float64, without asking whether this machine has it.

    Args:
        what: is computed so.

    Raises:
        UsageError: it does not.
    """
    sort, _ = _parse(device)
    if sort != CPU and not SORTS[sort].wide:
        raise UsageError(f"{what} in float64, which {device} has not", f"leave out {option('device')}, or use cuda")


def check_there(device: str) -> None:
    """Whether this machine has the device, and whether it computes there as this package says.

    Raises:
        UsageError: the machine does not have it, this torch cannot use it, or its float32 products are rounded.
    """
    sort, index = _parse(device)
    if sort == CPU:
        return
    kind = SORTS[sort]
    why = kind.why_not()
    if why:
        road = "use a machine with a GPU and a torch that was built for it" if sort == "cuda" else "use cpu"
        raise UsageError(f"{device} cannot be used: {why}", f"leave out {option('device')}, or {road}")
    count = kind.count()
    if index >= count:
        raise UsageError(
            f"there is no {device} here: devices are numbered from 0, and there are {count}", f"use {sort}:0"
        )
    rounds = _rounds_products()
    if rounds:
        raise UsageError(
            f"{rounds} lets {device} round the numbers of float32 products to 10 bits (TF32)",
            "take that setting back: adapterkit computes in full float32",
        )


def _rounds_products() -> str:
    """The setting by which float32 products are made of rounded numbers; empty where none is."""
    import torch

    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1":
        return "NVIDIA_TF32_OVERRIDE=1"
    own = str(getattr(torch.backends.cuda.matmul, "fp32_precision", "none"))
    if own not in ("none", "ieee"):
        return f"torch.backends.cuda.matmul.fp32_precision = '{own}'"
    if torch.get_float32_matmul_precision() != "highest":
        return f"torch.set_float32_matmul_precision('{torch.get_float32_matmul_precision()}')"
    return ""


class Device:
    """A device that is there; the CPU is one too, of which nothing is copied.

    Attributes:
        name: as it was asked for.
        here: it is the CPU.
        wide: it computes in float64.
        used: this process computed something there.
    """

    def __init__(self, name: str) -> None:
        self.name, self.used = name, False
        self._sort, self._index = _parse(name)
        self.here = self._sort == CPU
        kind = None if self.here else SORTS[self._sort]
        self.wide = kind is None or kind.wide
        self._pinned = kind is not None and kind.pinned
        self._slots = threading.BoundedSemaphore(AT_WORK)
        self._inside = threading.local()

    @property
    def place(self) -> torch.device:
        """As torch has it."""
        import torch

        return (
            torch.device(self._sort, self._index)
            if not self.here and SORTS[self._sort].numbered
            else torch.device(self._sort)
        )

    def said(self) -> dict[str, Any]:
        """What a record says of it: which device, of which name, by which versions, and how it computes."""
        import torch

        if self.here:
            return {"device": CPU, "torch": torch.__version__}
        facts = SORTS[self._sort].said(self._index)
        return {"device": self.name, **facts, "torch": torch.__version__, "float32_products": "full (no TF32)"}

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """What is computed there, of which few blocks are at a time; a thread may enter again.

        Raises:
            OutOfMemory: the device's memory ran out.
        """
        if self.here or getattr(self._inside, "deep", False):
            yield
            return
        import torch

        with self._slots:
            self._inside.deep = self.used = True
            try:
                yield
            except torch.OutOfMemoryError as error:
                said = " ".join(str(error).split())[:160]
                raise OutOfMemory(
                    f"the memory of {self.name} ran out ({said})", f"give fewer jobs, or leave out {option('device')}"
                ) from None
            finally:
                self._inside.deep = False

    @contextmanager
    def models(self) -> Iterator[None]:
        """What a library runs there: convolutions in full float32 too, which torch by itself rounds on CUDA."""
        if not self._pinned:
            yield
            return
        import torch

        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            with self.at_work():
                yield
        finally:
            torch.backends.cudnn.allow_tf32 = before

    def up(self, host: torch.Tensor) -> torch.Tensor:
        """A tensor's values there; the tensor itself where they are.

        Raises:
            UsageError: they are float64, which the device has not.
        """
        if self.here or host.device == self.place:
            return host
        self._check_wide(host)
        if not self._pinned or host.numel() <= PIECE:
            return host.to(self.place)
        flat = host.contiguous().view(-1)
        return self.gather(lambda start, stop: flat[start:stop], 0, flat.numel(), PIECE).view(host.shape)

    def gather(self, read: Callable[[int, int], torch.Tensor], start: int, stop: int, grain: int) -> torch.Tensor:
        """A range of elements there, flat, that is read in pieces: the next is read while the one before is copied.

        Args:
            read: gives a range on the CPU.
            grain: elements that are cheap to read together; pieces are multiples of it.

        Raises:
            UsageError: as for `up`.
        """
        if self.here:
            return read(start, stop)
        import torch

        first = start - start % grain
        step = max(1, PIECE // grain) * grain
        out: torch.Tensor | None = None
        buffers = _Buffers(self._pinned)
        for at in range(first, stop, step):
            low, high = max(at, start), min(at + step, stop)
            host = read(low, high).reshape(-1)
            if out is None:
                self._check_wide(host)
                out = torch.empty(stop - start, dtype=host.dtype, device=self.place)
            buffers.send(host, out[low - start : high - start])
        buffers.wait()
        return torch.empty(0, device=self.place) if out is None else out

    def down(self, there: torch.Tensor) -> torch.Tensor:
        """A tensor's values on the CPU. The copy goes on by itself where memory can be pinned; it is done on return."""
        if there.device.type == CPU:
            return there
        if not self._pinned:
            return there.cpu()
        import torch

        there = there.contiguous()
        out = torch.empty(there.shape, dtype=there.dtype, pin_memory=True)
        out.copy_(there, non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(there.device))
        done.synchronize()
        return out

    def _check_wide(self, host: torch.Tensor) -> None:
        import torch

        if not self.wide and host.dtype is torch.float64:
            raise UsageError(
                f"{self.name} has no float64, and these values are",
                f"leave out {option('device')}, or convert them first",
            )


class _Buffers:
    """Two buffers that pieces pass through on their way: one is filled while the other is copied."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._held: list[tuple[torch.Tensor, Any] | None] = [None, None]
        self._turn = 0

    def send(self, host: torch.Tensor, there: torch.Tensor) -> None:
        """Copy a piece; its memory may be used again when this returns."""
        if not self._pinned:
            there.copy_(host)
            return
        import torch

        held = self._held[self._turn]
        if held is not None:
            held[1].synchronize()
        buffer = held[0] if held is not None and held[0].numel() >= host.numel() else None
        if buffer is None:
            buffer = torch.empty(host.numel(), dtype=host.dtype, pin_memory=True)
        buffer[: host.numel()].copy_(host)
        there.copy_(buffer[: host.numel()], non_blocking=True)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(there.device))
        self._held[self._turn] = (buffer, done)
        self._turn = 1 - self._turn

    def wait(self) -> None:
        """See both buffers copied, before they are anybody else's."""
        for held in self._held:
            if held is not None:
                held[1].synchronize()


_OPEN: dict[str, Device] = {}
_LOCK = threading.Lock()


def opened(name: str) -> Device:
    """The device of a name: one for all threads.

    Raises:
        UsageError: see `check_there`.
    """
    found = _OPEN.get(name)
    if found is None:
        check_there(name)
        with _LOCK:
            found = _OPEN.setdefault(name, Device(name))
    return found


def devices() -> list[tuple[str, str]]:
    """The devices of this machine beside the CPU, each with its name and memory, in words."""
    found = []
    for sort, kind in SORTS.items():
        if kind.why_not():
            continue
        for index in range(kind.count()):
            facts = kind.said(index)
            name = f"{sort}:{index}" if kind.numbered else sort
            found.append((name, f"{facts['name']}, {facts['memory'] / 1e9:.0f} GB"))
    return found
