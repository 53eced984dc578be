"""The file that serves a GGUF model, written beside it: Ollama's Modelfile, or the command of llama-server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.files import LocalFile
from adapterkit.checkpoint.json_data import parse_json
from adapterkit.checkpoint.publish import write_beside
from adapterkit.disk import read_regular
from adapterkit.errors import AdapterkitError, NotFound, UsageError
from adapterkit.gguf.checkpoint import read_header
from adapterkit.gguf.vocab.sources import GENERATION
from adapterkit.places import Address, address_of
from adapterkit.serving.servers import servers, with_file
from adapterkit.stores.files import brought, check_absent, deliver

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.checkpoint.files import Source
    from adapterkit.serving.server import ModelFile


@dataclass(frozen=True)
class Handover:
    """``text`` loads the model in the server; ``path`` is where it was written, if it was, and ``start`` what to run."""

    server: str
    text: str
    notes: tuple[str, ...] = ()
    path: str = ""
    start: str = ""


def handover(model: str | Path | Address, server: str, *, generation: Mapping[str, Any] | None = None) -> Handover:
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
    text, notes = file.text(str(model), read_header(_source(model)), dict(generation or {}))
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


def write_handover(
    model: Path | Address, server: str, *, beside: Path | Address | None = None, force: bool = True
) -> Handover:
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
    target: Path | Address
    if isinstance(model, Address):
        target = model.with_name(f"{model.name}.{file.suffix}")
        check_absent(target, force=force)
        deliver(target, data)
    else:
        target = write_beside(model, file.suffix, data, force=force, mode=mode)
    return Handover(server, data.decode(), notes, str(target), file.start.format(path=target))


def beside_model(
    model: Path | Address, server: str, beside: Path | Address | None
) -> tuple[Path | Address, bytes, tuple[str, ...]]:
    """Where `write_handover` writes, what, and what it notes."""
    file = file_of(server)
    first = _first(model)
    found = handover(first, server, generation=_generation(beside))
    local = found.text.replace(str(first), f"./{first.name}")  # both files stay together
    if file.script:
        local = f'#!/bin/sh\ncd "$(dirname "$0")" || exit\nexec {local} "$@"\n'
    place = model.with_name(f"{model.name}.{file.suffix}")
    return place, local.encode(), found.notes


def _first(model: Path | Address) -> Path | Address:
    """The file of a model, or the first one of the set that lies in its place."""
    from adapterkit.checkpoint.objects import ObjectFolder, object_file

    if isinstance(model, Path):
        parts = sorted(model.parent.glob(f"{model.stem}-00001-of-*.gguf"))
        return next(path for path in (model, *parts) if path.is_file())
    if object_file(model) is not None:
        return model
    first = re.compile(re.escape(model.stem) + r"-00001-of-\d{5}\.gguf")
    return model.with_name(next(name for name in sorted(ObjectFolder(model.parent).names) if first.fullmatch(name)))


def _source(model: str | Path | Address) -> Source:
    """The bytes of a file here or in a store.

    Raises:
        NotFound
    """
    from adapterkit.checkpoint.objects import object_file

    if address_of(model) is None:
        return LocalFile(Path(str(model)))
    found = object_file(model)
    if found is None:
        raise NotFound(f"{model} does not exist", "check the bucket, the name and the endpoint")
    return found


def _generation(folder: Path | Address | None) -> dict[str, Any]:
    if folder is None:
        return {}
    try:
        found = parse_json(read_regular(brought(folder / GENERATION), 1 << 20), GENERATION)
    except AdapterkitError:
        return {}
    return found if isinstance(found, dict) else {}
