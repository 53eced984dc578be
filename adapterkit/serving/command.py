"""`serve-args`: the exact command or Modelfile that loads registered versions into a server. Handing over is our part."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.checkpoint.pipeline import MODEL_INDEX
from adapterkit.errors import NotFound, UsageError, option
from adapterkit.registry import resolve
from adapterkit.registry.checkout import checkout
from adapterkit.registry.home import open_home
from adapterkit.registry.record import NOT_CONTENT, Record
from adapterkit.serving.handover import handover
from adapterkit.serving.servers import servers, startable

if TYPE_CHECKING:
    from adapterkit.serving.server import Launch, Server

_ADAPTERS = ("adapter", "combined")
_USUAL = 16  # room for as much is made in any case: a later adapter may need it
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf")


@dataclass(frozen=True)
class ServeArgs:
    """``text`` is the command (or Modelfile), ``requests`` what names an adapter in a call, where that is needed."""

    server: str
    text: str
    requests: tuple[str, ...]
    refs: tuple[str, ...]
    paths: tuple[str, ...]
    source: str
    notes: tuple[str, ...] = ()


def serve_args(
    refs: Sequence[str], server: str, *, base: str = "", copy: Path | None = None, home: Path | None = None
) -> ServeArgs:
    """What loads these versions in a server.

    Args:
        refs: one whole model, or adapters of one base.
        server: one of `adapterkit.serving.servers.startable`.
        base: what to serve the adapters on; by default the Hub id of the base they were trained on.
        copy: a folder to copy the files to, for servers that do not follow links.

    Raises:
        UsageError: an unknown server, several models, adapters of several bases, or a base that nobody knows.
        NotFound, OutputError, RegistryError
    """
    asked = servers().get(server)
    if asked is None or asked.launch is None:
        raise UsageError(f"'{server}' is no server that can be started here", f"known: {', '.join(startable())}")
    row = asked.launch
    at = open_home(home)
    records = [resolve.find(at, ref) for ref in refs]
    adapters = [record for record in records if record.kind in _ADAPTERS]
    if (len(adapters) < len(records) or row.single) and len(records) > 1:
        what = "adapter" if adapters else "model"
        raise UsageError(f"{server} is started with one {what} at a time here", "call it once for each")
    paths = [_path(record, row, server, copy, home) for record in records]
    quoted = [shlex.quote(path) if row.shell else path for path in paths]
    requests: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    if not adapters and paths[0].endswith(".gguf") and asked.file is not None:
        found = handover(paths[0], server)
        text, notes = found.text.rstrip("\n"), found.notes
        if row.parts:
            text = text.replace(paths[0], _PART.sub("-*.gguf", paths[0]))
    elif not adapters:
        text = row.model.format(path=quoted[0], json=json.dumps(paths[0]))
    else:
        on = base or _base(adapters, server, row)
        each = [
            row.each.format(name=name, path=path, about=json.dumps(_about(record)))
            for name, record, path in zip(_names(records), records, quoted, strict=True)
        ]
        if row.between == "," and any("," in path for path in paths):
            raise UsageError(
                f"{server} takes paths apart at commas, and {paths[0]} has one", f"use {option('copy', 'DIR')}"
            )
        text = row.adapters.format(
            base=shlex.quote(on) if row.shell else on,
            json=json.dumps(on),
            each=row.between.join(each),
            count=len(records),
            rank=_rank(records, asked),
        )
        if len(records) > 1:
            text += row.several
        if row.after and (row.after_one or len(records) > 1):
            requests = tuple(row.after.format(json=json.dumps(path), place=i) for i, path in enumerate(paths))
        notes = (row.note.format(ref=records[0].ref),) if row.note else ()
    return ServeArgs(server, text, requests, tuple(r.ref for r in records), tuple(paths), row.source, notes)


def _path(record: Record, row: Launch, server: str, copy: Path | None, home: Path | None) -> str:
    if copy is not None:
        folder = checkout(record.ref, to=copy / f"{record.name}-{record.version}", home=home)
    else:
        folder = checkout(record.ref, home=home)
    files = [file.path for file in record.files if file.path not in NOT_CONTENT]
    if MODEL_INDEX in files:
        raise UsageError(
            f"{record.ref} is a pipeline of several models, and {server} loads one language model",
            "load the folder with diffusers, or with ComfyUI's nodes for it",
        )
    ggufs = sorted(path for path in files if path.endswith(".gguf"))
    if row.gguf and not ggufs:
        raise UsageError(
            f"{record.ref} is no GGUF file, and {server} reads nothing else", "convert it and register that"
        )
    return str((folder / ggufs[0] if ggufs else folder).absolute())


def _base(adapters: Sequence[Record], server: str, row: Launch) -> str:
    ids = {record.base.id for record in adapters if record.base is not None and record.base.id}
    if len(ids) > 1:
        raise UsageError(f"these adapters are of several bases ({', '.join(sorted(ids))})", "serve them apart")
    if not ids or not row.hub:
        hint = f"give it with {option('base')}" + (": a GGUF file" if row.gguf else "")
        raise NotFound(f"nothing says what {server} is to load as the base", hint)
    return ids.pop()


def _names(records: Sequence[Record]) -> list[str]:
    """Under what each is served: its name, with the version where two versions of one name are."""
    names = [record.name for record in records]
    return [record.name if names.count(record.name) == 1 else f"{record.name}-{record.version}" for record in records]


def _about(record: Record) -> str:
    """What a router is told of an adapter: its description, else what it is."""
    return record.meta.get("description") or f"{record.ref}, {record.method or record.kind}"


def _rank(records: Sequence[Record], server: Server) -> int:
    """The largest rank of the adapters, rounded up to one that the server takes."""
    found: list[int] = []
    for record in records:
        patterns = record.parameters.get("rank_pattern") or {}
        given = [record.parameters.get("r"), *(patterns.values() if hasattr(patterns, "values") else ())]
        found += [rank for rank in given if isinstance(rank, int)]
    ranks = server.ranks
    largest = max((_USUAL if ranks is None else ranks.default, *found))
    if ranks is None:
        return largest
    if largest > ranks.largest:
        text = f"{server.name} takes ranks up to {ranks.largest}, and one here is {largest}"
        raise UsageError(text, "resize or merge it")
    return next((rank for rank in ranks.steps if rank >= largest), largest)
