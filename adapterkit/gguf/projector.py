"""The file with a vision tower and its projector (mmproj) that belongs beside the text part of a multimodal model."""

from __future__ import annotations

import os
from pathlib import Path

from adapterkit import disk
from adapterkit.checkpoint.files import LocalFile
from adapterkit.errors import NotFound, OutputError, UsageError, option
from adapterkit.gguf.checkpoint import read_header


class Projector:
    """A copy of an mmproj file beside a GGUF output, under its own name; nothing when none was given.

    Args:
        given: the file, or None.
        out: the GGUF output.
        force: replace another file of that name.

    Raises:
        NotFound: there is no such file.
        UsageError: it is no mmproj file, or ``out`` is no GGUF file.
        OutputError: another file of that name is there.
        CheckpointError: it is damaged.
    """

    def __init__(self, given: Path | None, out: Path, *, force: bool = False) -> None:
        self._path = given.expanduser() if given is not None else None
        self._target = out
        if self._path is None:
            return
        road = "give the mmproj .gguf that is published beside the base"
        if out.suffix != ".gguf":
            raise UsageError("an mmproj file belongs beside a GGUF file", "name the output like OUT.gguf")
        if not self._path.is_file():
            raise NotFound(f"{given} does not exist", road)
        header = read_header(LocalFile(self._path, str(given)))
        if header.get("general.architecture") != "clip" and header.get("general.type") != "mmproj":
            raise UsageError(f"{given} is no mmproj file", road)
        self._target = out.parent / self._path.name
        if self._target.resolve() == out.resolve():
            raise UsageError(f"{given} has the name of the output", "name the output otherwise")
        if self._target.exists() and not self._target.samefile(self._path) and not force:
            raise OutputError(f"{self._target} exists", f"remove it, or add {option('force', True)}")

    def copy(self) -> None:
        """Copy it; the copy appears whole or not at all."""
        if self._path is None or (self._target.exists() and self._target.samefile(self._path)):
            return
        target = self._target
        with disk.writing(str(target), target.parent), disk.staging(target, resume=False) as folder:
            source = disk.open_regular(self._path)
            try:
                copy = disk.open_new_inside(folder, target.name)
                try:
                    disk.copy_and_hash(source, copy)
                    disk.fsync(copy)
                finally:
                    os.close(copy)
            finally:
                os.close(source)
            # Whether it may be replaced was decided when the run began.
            disk.publish_files(folder, {target.name: target}, force=True)
