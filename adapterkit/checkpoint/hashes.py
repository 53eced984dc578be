"""Hashes that the metadata of a safetensors file state of the file itself, as image programs show them.

========================  =====================================================================================
``sshs_model_hash``       sha256 of all bytes behind the header
``sshs_legacy_hash``      first 8 digits of the sha256 of 64 KiB at 1 MiB of the file, were ``ss_*`` its only metadata
``modelspec.hash_sha256`` ``0x`` and the sha256 of all bytes behind the header
========================  =====================================================================================

The first two are the rule of kohya-ss/sd-scripts (`library/train_util.py`, `precalculate_safetensors_hashes`), the third that
of Stability-AI/ModelSpec (README, "hash_sha256"). They are known when the tensors are written, so a plan has zeros in their
place, of the same length (`adapterkit.checkpoint.header.with_room`), and `fill` puts them in before the file has its name. In a
store no byte is written twice, so `filled` computes the tensors once more, ahead.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit import disk
from adapterkit.checkpoint.header import HASHES, LEGACY, MODEL, SPEC, TRAINING
from adapterkit.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from adapterkit.checkpoint.plan import Plan, PlannedFile
    from adapterkit.checkpoint.tensor import Tensor

_FIRST, _COUNT = 0x100000, 0x10000  # what the legacy hash is of: offset and length
_BLOCK = 4 << 20


def has_room(plan: Plan) -> bool:
    """Whether hashes are still to be put in."""
    return any(plan.metadata.get(name) == room for name, room in HASHES.items())


def without_room(plan: Plan) -> Plan:
    """The plan of the same files without the hashes that are still to be put in."""
    metadata = {name: value for name, value in plan.metadata.items() if value != HASHES.get(name)}
    if not has_room(plan):
        return plan
    found = replace(plan, metadata=metadata)

    def moved(file: PlannedFile) -> PlannedFile:
        if not _has_own_header(file):
            return file
        less = len(plan.header(file)) - len(found.header(file))
        steps = tuple(step._replace(offset=step.offset - less) for step in file.steps)
        return replace(file, nbytes=file.nbytes - less, steps=steps)

    return replace(found, files=tuple(map(moved, plan.files)))


def fill(plan: Plan, folder: Path) -> None:
    """Put the hashes into the headers of files that are written, which lie in ``folder``.

    Raises:
        OutputError: the disk fails.
        OSError: a file cannot be opened.
    """
    for file in plan.files if has_room(plan) else ():
        if _has_own_header(file):
            _fill(plan, file, folder)


def filled(plan: Plan, tensors: Mapping[str, Tensor]) -> Plan:
    """The plan of one file with its hashes, of tensors that are read for it. Plans of several files are as they were."""
    if not has_room(plan) or len(plan.files) != 1 or not _has_own_header(plan.files[0]):
        return plan
    import torch

    file = plan.files[0]
    found = _Hashing(plan, file)
    with torch.inference_mode():
        for step in file.steps:
            tensor = tensors[step.tensor]
            for start in range(0, tensor.numel, tensor.block):
                values = tensor.read(start, min(start + tensor.block, tensor.numel))
                found.add(values.contiguous().view(torch.uint8).numpy().tobytes())
            tensor.release()
    return found.plan()


def _has_own_header(file: PlannedFile) -> bool:
    return file.verbatim is None and not file.head


def _fill(plan: Plan, file: PlannedFile, folder: Path) -> None:
    found = _Hashing(plan, file)
    at = len(plan.header(file))
    fd = disk.open_inside(folder, file.name, os.O_RDWR)
    try:
        while at < file.nbytes:
            block = disk.calls.pread(fd, min(_BLOCK, file.nbytes - at), at)
            if not block:
                raise OutputError(f"{folder / file.name} was not written to its end", "run it again, and report it")
            found.add(block)
            at += len(block)
        header, done = memoryview(found.plan().header(file)), 0
        while done < len(header):
            done += disk.calls.pwrite(fd, header[done:], done)
        disk.fsync(fd)
    finally:
        os.close(fd)


class _Hashing:
    """The hashes of one file, whose bytes behind the header are handed in, in order."""

    def __init__(self, plan: Plan, file: PlannedFile) -> None:
        self._plan, self._whole = plan, hashlib.sha256()
        training = {name: value for name, value in plan.metadata.items() if name.startswith(TRAINING)}
        # The file as it would be with this metadata alone: where we are in it, and what is read of it so far.
        header = replace(plan, metadata=training).header(file)
        self._window = header[_FIRST : _FIRST + _COUNT]
        self._at = len(header)

    def add(self, block: bytes) -> None:
        self._whole.update(block)
        first, stop = max(_FIRST - self._at, 0), _FIRST + _COUNT - self._at
        self._window += block[first:stop] if stop > 0 else b""
        self._at += len(block)

    def plan(self) -> Plan:
        """The plan with the hashes in their places."""
        whole = self._whole.hexdigest()
        found = {MODEL: whole, LEGACY: hashlib.sha256(self._window).hexdigest()[:8], SPEC: f"0x{whole}"}
        metadata = self._plan.metadata
        return replace(self._plan, metadata={name: found.get(name, value) for name, value in metadata.items()})
