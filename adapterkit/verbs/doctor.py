"""What is installed here, what an extra would add, and what this machine and a folder's file system can do."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from adapterkit._version import __version__
from adapterkit.checkpoint.limits import cores, memory_limit
from adapterkit.disk import calls, copy_range, fsync, reflink, write_all
from adapterkit.errors import NotFound, OutputError, option
from adapterkit.ops.device import devices
from adapterkit.packages import CORE, EXTRAS, Package, command, cpu_torch, installer

TRIED = 64 << 20  # bytes of the test of a disk
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True)
class DoctorPackage:
    """A package that adapterkit needs, or that an extra brings.

    Attributes:
        version: empty where it is not installed.
        least: the oldest version that works.
        ok: it is there, and recent enough.
    """

    name: str
    version: str
    least: str
    ok: bool


@dataclass(frozen=True)
class DoctorExtra:
    """An extra of the package.

    Attributes:
        command: installs it; given also where it is there.
    """

    name: str
    packages: tuple[DoctorPackage, ...]
    adds: str
    command: str
    ok: bool


@dataclass(frozen=True)
class DoctorMachine:
    """What this machine gives to this process.

    Attributes:
        cores: that the process may use: by its affinity and, in a container, by its quota.
        memory, free: bytes of the machine, and of them what is not used; None where the system does not say.
        limit, limit_by: bytes that the process may use at most, and who says so; None where nobody does.
        torch: which build it is: ``cpu``, ``cuda 12.8``, ``rocm 6.4``; or why it cannot be loaded.
        gpus: name and memory of each GPU that torch can use.
        encoders: what encodes GGUF types: ``compiled`` (numba) or ``torch``.
    """

    system: str
    processor: str
    cores: int
    memory: int | None
    free: int | None
    limit: int | None
    limit_by: str
    torch: str
    gpus: tuple[str, ...]
    encoders: str


@dataclass(frozen=True)
class DoctorDisk:
    """What the file system of a folder can do.

    Attributes:
        kind: of file system; empty where the system does not say.
        free: bytes.
        write, read: bytes a second of a short test; the write ends when the disk has it. Reads come from memory where the
            system keeps what was just written, so ``read`` is an upper bound.
        copy_in_kernel: ``copy_file_range`` works: untouched tensors are copied without passing through this process.
        reflink: files can share their bytes (Btrfs, XFS, bcachefs, ZFS, APFS): a copy takes no room.
        hard_links, locks: there are such.
    """

    folder: str
    kind: str
    free: int
    write: float
    read: float
    copy_in_kernel: bool
    reflink: bool
    hard_links: bool
    locks: bool


@dataclass(frozen=True)
class DoctorReport:
    """What `doctor` found.

    Attributes:
        ok: everything that adapterkit always needs is there.
        notes: what can be done better, a sentence each.
    """

    version: str
    python: str
    packages: tuple[DoctorPackage, ...]
    extras: tuple[DoctorExtra, ...]
    machine: DoctorMachine
    disk: DoctorDisk
    registry: str
    hub_cache: str
    notes: tuple[str, ...]
    ok: bool


def doctor(folder: str | Path = ".", *, tried: int = TRIED) -> DoctorReport:
    """Look at this installation, this machine, and the file system of a folder.

    Args:
        folder: where outputs would be written; a file of ``tried`` bytes is written there and removed.
        tried: bytes of the test of the disk.

    Raises:
        NotFound: there is no such folder.
        OutputError: nothing can be written there.
    """
    packages = tuple(_package(one) for one in CORE)
    extras = tuple(
        DoctorExtra(extra.name, found, extra.adds, command(extra.name), all(one.ok for one in found))
        for extra in EXTRAS
        for found in [tuple(_package(one) for one in extra.packages)]
    )
    machine, disk = _machine(extras), _disk(Path(folder), tried)
    from adapterkit.registry.home import default_home

    return DoctorReport(
        version=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        packages=packages,
        extras=extras,
        machine=machine,
        disk=disk,
        registry=str(default_home()),
        hub_cache=_hub_cache(),
        notes=tuple(_notes(packages, machine, disk)),
        ok=all(one.ok for one in packages) and not machine.torch.startswith("cannot"),
    )


def _package(one: Package) -> DoctorPackage:
    found = one.installed()
    return DoctorPackage(one.name, found, one.least, bool(found) and one.is_recent(found))


def _notes(packages: tuple[DoctorPackage, ...], machine: DoctorMachine, disk: DoctorDisk) -> list[str]:
    found = [
        f"{one.name} {one.version} is too old, {one.least} is needed: {installer()} -U {one.name}"
        if one.version
        else f"{one.name} is not installed: {installer()} {one.name}"
        for one in packages
        if not one.ok
    ]
    if machine.torch.startswith("cuda") and not machine.gpus:
        found.append(
            "this torch is the build with CUDA, some GB larger, and finds no GPU here; the build for CPUs does the same: "
            f"{cpu_torch()}"
        )
    if machine.limit is not None and machine.limit < 1_000_000_000:
        found.append(f"{machine.limit_by} allows {machine.limit / 1e6:,.0f} MB: give {option('jobs', 1)}")
    if not disk.copy_in_kernel:
        found.append("this file system has no copy_file_range: untouched tensors are copied through memory")
    if not disk.locks:
        found.append("this file system has no locks: let one process at a time write there")
    return found


# ------------------------------------------------------------------ the machine


def _machine(extras: tuple[DoctorExtra, ...]) -> DoctorMachine:
    memory, free = _memory()
    limit = memory_limit()
    build, gpus = _torch()
    compiled = any(one.name == "numba" and one.ok for extra in extras for one in extra.packages)
    return DoctorMachine(
        system=f"{platform.system()} {platform.release()}",
        processor=_processor(),
        cores=cores(),
        memory=memory,
        free=free,
        limit=None if limit is None else limit[0],
        limit_by="" if limit is None else limit[1],
        torch=build,
        gpus=gpus,
        encoders="compiled" if compiled else "torch",
    )


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({platform.machine()})"
    return platform.machine()


def _memory() -> tuple[int | None, int | None]:
    """Bytes of the machine, and of them free."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        said = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
        total, free = (int(said[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable") if name in said)
        return total, free
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), None
    return None, None


def _torch() -> tuple[str, tuple[str, ...]]:
    """The build, and the devices that it can use, by the names that ``--device`` takes."""
    try:
        import torch
    except Exception as error:  # a library that does not fit, a broken installation: whatever it is, it is the finding
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return f"cannot be loaded: {reason}", ()
    if torch.version.cuda is not None:
        build = f"cuda {torch.version.cuda}"
    elif getattr(torch.version, "hip", None):
        build = f"rocm {torch.version.hip}"
    else:
        build = "cpu"
    try:
        found = tuple(f"{name} {said}" for name, said in devices())
    except Exception as error:  # a driver that fails is a finding too
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return f"{build}, whose devices cannot be asked: {reason}", ()
    return build, found


def _hub_cache() -> str:
    """Where downloads from the Hub are kept."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return ""
    return str(constants.HF_HUB_CACHE)


# ------------------------------------------------------------------ the disk


def _disk(folder: Path, tried: int) -> DoctorDisk:
    if not folder.is_dir():
        raise NotFound(f"there is no folder {folder}", "name one that outputs would be written into")
    try:
        with tempfile.TemporaryDirectory(prefix=".adapterkit-doctor-", dir=folder) as place:
            return _tried(folder, Path(place), tried)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written to ({error.strerror or error})", "name another folder") from None


def _tried(folder: Path, place: Path, tried: int) -> DoctorDisk:
    usage = os.statvfs(folder) if hasattr(os, "statvfs") else None
    free = usage.f_bavail * usage.f_frsize if usage is not None else 0
    tried = min(tried, max(1 << 20, free // 4)) if free else tried
    block = memoryview(os.urandom(1 << 20))
    modes = os.O_RDWR | os.O_CREAT | os.O_EXCL | calls.flags("BINARY", "CLOEXEC", "NOFOLLOW")
    source = os.open(place / "one", modes, 0o600)
    target = os.open(place / "two", modes, 0o600)
    try:
        began = time.perf_counter()
        for _ in range(tried >> 20):
            write_all(source, block)
        fsync(source)
        written = time.perf_counter() - began
        began = time.perf_counter()
        buffer, at = memoryview(bytearray(1 << 20)), 0
        while got := calls.pread_into(source, buffer, at):
            at += got
        read = time.perf_counter() - began
        shared = reflink(source, target)
        if not shared:
            os.ftruncate(target, 0)
        copied = copy_range(source, target, 0, 0, 1 << 20) > 0
        locks = calls.flock(target)
    finally:
        os.close(source)
        os.close(target)
    linked = True
    try:
        os.link(place / "one", place / "three")
    except (OSError, AttributeError):
        linked = False
    return DoctorDisk(
        str(folder.absolute()), _kind(folder), free, tried / written, tried / read, copied, shared, linked, locks
    )


def _kind(folder: Path) -> str:
    """The kind of file system, by the longest mount point above the folder."""
    try:
        lines = _MOUNTS.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    place, best, kind = str(folder.resolve()), "", ""
    for line in lines:
        before, _, after = line.partition(" - ")
        point = before.split()[4].replace("\\040", " ")
        if len(point) >= len(best) and (place == point or place.startswith(point.rstrip("/") + "/")):
            best, kind = point, after.split()[0]
    return kind
