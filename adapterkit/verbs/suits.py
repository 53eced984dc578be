"""Does a version suit a server that runs: its form, its rank, its features, its base. Before the server is told anything."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.errors import AdapterkitError, CheckFailed, UnsafeError, UsageError, option
from adapterkit.registry.checkout import checkout
from adapterkit.registry.record import NOT_CONTENT

if TYPE_CHECKING:
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.registry.endpoints import Endpoint
    from adapterkit.registry.home import Home
    from adapterkit.registry.identity import Identity, IdentityComparison
    from adapterkit.registry.record import Record
    from adapterkit.serving.live import Live, Serving
    from adapterkit.serving.server import Server

_KINDS = ("adapter", "combined")


def suits(record: Record, row: Server, live: Live, endpoint: Endpoint, serving: Serving, at: Home) -> list[str]:
    """What a user should know of a version on a server.

    Raises:
        CheckFailed: the server would refuse it, compute something else, or has another base.
        UsageError: it is no adapter, or in a form that the server does not read.
    """
    if record.kind not in _KINDS:
        raise UsageError(f"{record.ref} is {record.kind}, and a running server is told of adapters", _WHOLE)
    ggufs = [file.path for file in record.files if file.path.endswith(".gguf")]
    if live.gguf and not ggufs:
        hint = f"convert it: adapterkit convert {record.ref} --to gguf-lora --base BASE -o lora.gguf; register and deploy that"
        raise UsageError(f"{record.ref} is no GGUF file, and {row.name} reads nothing else", hint)
    if ggufs and not live.gguf:
        raise UsageError(
            f"{record.ref} is a GGUF file, and {row.name} reads PEFT folders", "deploy the adapter it was made of"
        )
    from adapterkit.bases import open_adapter
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.serving.expectations import expected

    folder = checkout(record.ref, home=at.root)
    adapter = open_adapter(folder / ggufs[0] if ggufs else folder, headers_only=True)
    base = _opened(endpoint, serving)
    notes, bad = [], []
    for title, one in expected(row, adapter, base if base is not None else Checkpoint("", {})):
        said = f"{row.name}, {title}: {one.verdict}: {one.says} [{one.source}]"
        if one.verdict == "depends":
            notes.append(said)
        else:
            fix = one.fix.format(adapter=shlex.quote(record.ref), base=shlex.quote(base.ref if base else "BASE"))
            bad.append((said, fix))
    if bad:
        more = f"; and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise CheckFailed(f"{record.ref} does not suit {endpoint.name}: {bad[0][0]}{more}", bad[0][1])
    notes += _same_base(record, adapter.config.base or "", base, serving, endpoint)
    return notes


_WHOLE = "start a server with it: see adapterkit serve-args"


def _opened(endpoint: Endpoint, serving: Serving) -> Checkpoint | None:
    """The base that the server serves, where its headers can be read from here."""
    from adapterkit.bases import open_model

    if endpoint.base:
        return open_model(endpoint.base, headers_only=True)
    path = serving.path
    if path and Path(path).is_absolute() and Path(path).exists():
        try:
            return open_model(path, headers_only=True)
        except AdapterkitError:
            return None  # the server's folder, of which we may not read all: names are compared then
    return None


def _same_base(record: Record, named: str, base: Checkpoint | None, serving: Serving, endpoint: Endpoint) -> list[str]:
    """
    Raises:
        CheckFailed: the server serves other weights than those that the adapter was trained on.
    """
    said = record.base
    if base is not None and said is not None and said.known:
        compared = _compared(said, base)
        if compared is not None and compared.fits is False:
            raise CheckFailed(
                f"{endpoint.name} serves another base than {record.ref} was trained on: {compared.sentence}",
                "deploy it to a server of its own base",
            )
        if compared is not None and compared.fits:
            return [f"base: {compared.sentence}"]
    wanted = (said.id if said is not None else "") or named
    names = [*serving.names, serving.path, *([endpoint.base] if endpoint.base else [])]
    if not wanted:
        return ["base: nothing says which base this adapter was trained on; it was not compared"]
    if any(_last(wanted) == _last(name) for name in names if name):
        return [f"base: {_last(wanted)}, by its name alone"]
    if endpoint.base:
        return [f"base: trained on {wanted}; {endpoint.base} was given as the server's, and could not be compared"]
    shown = ", ".join(dict.fromkeys(name for name in serving.names if name)) or "it does not say what"
    raise CheckFailed(
        f"{record.ref} was trained on {wanted}, and {endpoint.name} serves {shown}",
        f"if that is the same base, say so with {option('base')}: its folder, file or Hub id",
    )


def _compared(said: Identity, base: Checkpoint) -> IdentityComparison | None:
    from adapterkit.provenance.fits import compare_base
    from adapterkit.registry.beside import read_beside
    from adapterkit.registry.identity import compare

    if base.format != "gguf":
        return compare_base(said, base)
    path = base.sources[0].path if base.sources else None
    try:
        beside = read_beside(path) if path is not None else None
    except AdapterkitError:
        return None
    made_from = [parent.identity for parent in beside.parents if parent.identity is not None] if beside else []
    found = next(iter(made_from), None) or (beside.base if beside else None)
    return compare(said, found, said.label, base.ref) if found is not None else None


def _last(name: str) -> str:
    """The last part of a Hub id or path, without the ending of a GGUF file."""
    return name.rstrip("/").rpartition("/")[2].removesuffix(".gguf").casefold()


def place_of(record: Record, row: Server, live: Live, endpoint: Endpoint, at: Home) -> str:
    """The path under which the server reads a version: its folder, or its GGUF file. Named by digest, so never others' bytes.

    Raises:
        CheckFailed: a copy of before holds other bytes.
    """
    if endpoint.copy:
        top = Path(endpoint.copy)
        folder = top / f"{record.name}-{record.content[:12]}"
        if folder.exists():
            _must_hold(record, folder)
        else:
            top.mkdir(parents=True, exist_ok=True)
            checkout(record.ref, to=folder, home=at.root)
        root = top
    else:
        folder, root = checkout(record.ref, home=at.root), at.root
    ggufs = sorted(file.path for file in record.files if file.path.endswith(".gguf") and file.path not in NOT_CONTENT)
    path = (folder / ggufs[0] if live.gguf and ggufs else folder).absolute()
    if endpoint.seen_as:
        return f"{endpoint.seen_as.rstrip('/')}/{path.relative_to(root.absolute()).as_posix()}"
    return str(path)


def _must_hold(record: Record, folder: Path) -> None:
    """See that a copy of before is one that nobody else can have prepared: a folder of this user with the files of the version
    and no other, none of them a link.

    Raises:
        UnsafeError, CheckFailed
    """
    from adapterkit import disk

    hint = f"move {folder} away, and deploy again"
    if folder.is_symlink() or not folder.is_dir():
        raise UnsafeError(f"{folder} is a link or no folder", hint)
    if not disk.is_of_user(folder):
        raise UnsafeError(f"{folder} belongs to another user, who can change it at any time", hint)
    known = {file.path: file for file in record.files}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(place, name)
            inside = path.relative_to(folder).as_posix()
            if path.is_symlink() or (name in files and not path.is_file()):
                raise UnsafeError(f"{path} is a link or no file", hint)
            if name in files and inside not in known and inside not in NOT_CONTENT and not name.startswith("."):
                raise CheckFailed(f"{path} is no file of {record.ref}", hint)
    for file in record.files:
        path = folder / file.path
        if file.path in NOT_CONTENT:
            continue
        if not path.is_file() or disk.hash_file(path)[0] != file.sha256:
            raise CheckFailed(f"{path} is not the file of {record.ref}", hint)
