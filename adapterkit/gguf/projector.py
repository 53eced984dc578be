"""The file with a vision tower and its projector (mmproj) that belongs beside the text part of a multimodal model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit import disk
from adapterkit.checkpoint.files import LocalFile
from adapterkit.errors import NotFound, OutputError, UsageError, option
from adapterkit.gguf.checkpoint import read_header
from adapterkit.gguf.plan import planned_header
from adapterkit.places import Address
from adapterkit.stores.files import check_absent, send

if TYPE_CHECKING:
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.gguf.reader import GGUFHeader

ROAD = "give the mmproj .gguf that is published beside the base"
# Projectors that one architecture of language models was trained with, by ``clip.projector_type``. Source: the classes of
# llama.cpp's converter that write them. Others (mlp, pixtral, internvl, idefics3) stand beside any.
ONE_ARCH = {
    "gemma3": "gemma3",
    "gemma3nv": "gemma3n",
    "llama4": "llama4",
    "qwen2vl_merger": "qwen2vl",
    "qwen2.5vl_merger": "qwen2vl",
}


class Projector:
    """A copy of an mmproj file beside a GGUF output, under its own name; nothing when none was given.

    Args:
        given: the file, or None.
        out: the GGUF output.
        force: replace another file of that name.
        plan, sources: of the output, whose language model it has to fit; without them that is not asked.

    Raises:
        NotFound: there is no such file.
        UsageError: it is no mmproj file, or one of another model, or ``out`` is no GGUF file.
        OutputError: another file of that name is there.
        CheckpointError: it is damaged.
    """

    def __init__(
        self,
        given: Path | None,
        out: Path | Address,
        *,
        force: bool = False,
        plan: Plan | None = None,
        sources: Sequence[Source] = (),
    ) -> None:
        self._path = given.expanduser() if given is not None else None
        self._target: Path | Address = out
        self._force = force
        if self._path is None:
            return
        if out.suffix != ".gguf":
            raise UsageError("an mmproj file belongs beside a GGUF file", "name the output like OUT.gguf")
        if not self._path.is_file():
            raise NotFound(f"{given} does not exist", ROAD)
        header = read_header(LocalFile(self._path, str(given)))
        if header.get("general.architecture") != "clip" and header.get("general.type") != "mmproj":
            raise UsageError(f"{given} is no mmproj file", ROAD)
        if plan is not None:
            _check_model(header, planned_header(plan, sources, str(out)), str(given))
        self._target = out.parent / self._path.name
        if self._target.name == out.name:
            raise UsageError(f"{given} has the name of the output", "name the output otherwise")
        if isinstance(self._target, Address):
            check_absent(self._target, force=force)
        elif self._target.exists() and not self._target.samefile(self._path) and not force:
            raise OutputError(f"{self._target} exists", f"remove it, or add {option('force', True)}")

    def copy(self) -> None:
        """Copy it; the copy appears whole or not at all."""
        if self._path is None:
            return
        target = self._target
        if isinstance(target, Address):
            with open(disk.open_regular(self._path), "rb") as file:
                if not send(target, file, self._path.stat().st_size, absent=not self._force):
                    raise OutputError(f"{target} appeared meanwhile", "remove it, or name the output otherwise")
            return
        if target.exists() and target.samefile(self._path):
            return
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


def _check_model(projector: GGUFHeader, model: GGUFHeader, given: str) -> None:
    """Refuse a projector that joins images or sounds to another language model.

    Raises:
        UsageError
    """
    arch = str(model.get("general.architecture", ""))
    kinds = {projector.get(f"clip.{part}projector_type") for part in ("", "vision.", "audio.")}
    trained = next((ONE_ARCH[kind] for kind in sorted(map(str, kinds)) if kind in ONE_ARCH), arch)
    if trained != arch:
        raise UsageError(f"{given} is the projector of a {trained}, and the base is a {arch}", ROAD)
    width = model.get(f"{arch}.embedding_length")
    said = [projector.get(f"clip.{part}.projection_dim") for part in ("vision", "audio")]
    widths = [one for one in said if isinstance(one, int) and one > 0]
    if not isinstance(width, int) or not widths or width in widths:
        return
    # Files of llama.cpp's first converters have the width of CLIP's own projection there; their tensors say the width.
    if projector.get("general.type") != "mmproj" and any(
        width in tensor.shape for name, tensor in projector.tensors.items() if not name.startswith(("v.", "a."))
    ):
        return
    raise UsageError(f"{given} is the projector of a model of width {widths[0]}, and the base has {width}", ROAD)
