"""The file that serves a GGUF model, written beside it: Ollama's Modelfile, or the command of llama-server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.files import LocalFile
from adapterkit.checkpoint.json_data import parse_json
from adapterkit.checkpoint.publish import named_beside, write_beside
from adapterkit.disk import read_regular
from adapterkit.errors import AdapterkitError, UsageError
from adapterkit.gguf.checkpoint import read_header
from adapterkit.gguf.vocab.sources import GENERATION
from adapterkit.serving.servers import servers, with_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.serving.server import ModelFile


@dataclass(frozen=True)
class Handover:
    """``text`` loads the model in the server; ``path`` is where it was written, if it was, and ``start`` what to run."""

    server: str
    text: str
    notes: tuple[str, ...] = ()
    path: str = ""
    start: str = ""


def handover(model: str | Path, server: str, *, generation: Mapping[str, Any] | None = None) -> Handover:
    """What loads a GGUF model in a server.

    Args:
        model: the ``.gguf`` file, or the first of a set.
        server: one that wants a file beside a GGUF model, such as ``ollama`` or ``llama.cpp``.
        generation: the model's ``generation_config.json``; by default that of no model.

    Raises:
        UsageError: another server.
        CheckpointError: no GGUF file.
    """
    file = file_of(server)
    text, notes = file.text(str(model), read_header(LocalFile(Path(model))), dict(generation or {}))
    return Handover(server, text, notes)


def file_of(server: str) -> ModelFile:
    """The file that a server wants beside a GGUF model.

    Raises:
        UsageError: it wants none, or is not known.
    """
    row = servers().get(server)
    if row is None or row.file is None:
        raise UsageError(f"a GGUF file is not handed over to '{server}' here", f"use {' or '.join(with_file())}")
    return row.file


def write_handover(model: Path, server: str, *, beside: Path | None = None, force: bool = True) -> Handover:
    """Write it beside the model, as ``MODEL.gguf.Modelfile`` or ``MODEL.gguf.llama-server.sh``; see `handover`.

    Args:
        model: the file that was written; of a set, the name it was asked for by.
        server: as for `handover`.
        beside: a folder with the model's ``generation_config.json``.
        force: replace a file of that name.

    Raises:
        OutputError: such a file is there, or the disk refuses.
    """
    file = file_of(server)
    _, data, notes = beside_model(model, server, beside)
    mode = 0o755 if file.script else 0o666
    target = write_beside(model, file.suffix, data, force=force, mode=mode)
    return Handover(server, data.decode(), notes, str(target), file.start.format(path=target))


def beside_model(model: Path, server: str, beside: Path | None) -> tuple[Path, bytes, tuple[str, ...]]:
    """Where `write_handover` writes, what, and what it notes."""
    file = file_of(server)
    first = next(
        path for path in (model, *sorted(model.parent.glob(f"{model.stem}-00001-of-*.gguf"))) if path.is_file()
    )
    found = handover(first, server, generation=_generation(beside))
    local = found.text.replace(str(first), f"./{first.name}")  # both files stay together
    if file.script:
        local = f'#!/bin/sh\ncd "$(dirname "$0")" || exit\nexec {local} "$@"\n'
    return named_beside(model, file.suffix), local.encode(), found.notes


def _generation(folder: Path | None) -> dict[str, Any]:
    try:
        found = parse_json(read_regular(folder / GENERATION, 1 << 20), GENERATION) if folder is not None else {}
    except AdapterkitError:
        return {}
    return found if isinstance(found, dict) else {}
