"""From the name of an adapter in a request to a folder with its verified bytes: from the registry, or a remote of it.

A name is ``NAME@WHICH``: an alias, a version, or twelve or more digits of the content's digest (what `deploy` calls it);
``WHICH`` may be left out for the newest version. Servers remember what a name meant when they first asked, so only digests and
versions are safe against a change; an alias is answered under the name with its digest, and the answer to a request says so.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterkit import disk
from adapterkit.bucket.layout import is_bucket
from adapterkit.errors import AdapterkitError, CheckFailed, NotFound, UsageError
from adapterkit.integrations import ALIASES
from adapterkit.registry import refs, resolve
from adapterkit.registry.checkout import checkout
from adapterkit.registry.home import Home, is_number, open_home
from adapterkit.registry.names import is_name, is_repo
from adapterkit.registry.record import NOT_CONTENT, Record

REGISTRY = "registry"
_DIGEST = re.compile(r"[0-9a-f]{12,64}")
_verified: set[str] = set()


@dataclass(frozen=True)
class ResolvedAdapter:
    """``folder`` holds exactly the files of ``record``; ``served`` is the name that means these bytes for ever."""

    record: Record
    folder: Path
    served: str


def sources_of(text: str) -> tuple[str, ...]:
    """Where adapters may come from, with commas between: ``registry``, ``oci://host/prefix``, ``s3://bucket/prefix`` (or
    ``gs://``, ``az://``, ``hf://buckets/``), ``hub:org``.

    Raises:
        UsageError: something else.
    """
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    for part in found:
        hub = part.startswith("hub:") and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", part[4:])
        if part != REGISTRY and not part.startswith("oci://") and not is_bucket(part) and not hub:
            hint = "use registry, oci://host/prefix, s3://bucket/prefix (gs://, az://, hf://buckets/) or hub:org"
            raise UsageError(f"'{part}' is no place for adapters", hint)
    return found


def find_adapter(
    asked: str, *, base: str = "", sources: Sequence[str] = (REGISTRY,), aliases: bool = True, home: Path | None = None
) -> ResolvedAdapter:
    """The adapter that a name means, with every byte held against its record.

    Args:
        asked: ``name``, ``name@alias``, ``name@3`` or ``name@78ea3fde5dff``.
        base: what the server serves: a folder or a Hub id; empty where it is not known.
        sources: see `sources_of`; the first that has it gives it.
        aliases: whether an alias (or a name alone) may be used.

    Raises:
        NotFound: no source has it.
        CheckFailed: it is there, and its bytes or its base are others.
        UsageError: it is no adapter, or an alias and those may not be used.
        HubError, AuthError, RegistryError
    """
    name, _, which = asked.partition("@")
    if not is_name(name) or (which and not is_name(which)):
        raise NotFound(f"'{asked}' is no name of an adapter", "ask for NAME@ALIAS or NAME@DIGEST")
    at = open_home(home)
    digest = which if _DIGEST.fullmatch(which) and not is_number(which) else ""
    if not aliases and not digest and not is_number(which):
        raise UsageError(f"'{asked}' may come to mean other weights, and aliases may not be used", "ask by digest")
    said: list[str] = []
    for source in sources:
        try:
            record = (
                _known(at, name, which, digest) if source == REGISTRY else _fetched(source, name, which, digest, at)
            )
        except NotFound as error:
            said.append(error.message)
            continue
        _is_adapter(record)
        folder = _whole(at, record)
        _suits(record, folder, base)
        return ResolvedAdapter(record, folder, f"{record.name}@{record.content[:12]}")
    raise NotFound(
        f"no source has '{asked}' ({'; '.join(said) or 'there are none'})", "see what is registered: adapterkit list"
    )


def answer(asked: str, base: str, sources: Sequence[str], log: logging.Logger) -> ResolvedAdapter | None:
    """What a server's plug-in gives it for a name that the server does not know; None where it shall say so itself.

    Whether aliases are taken is said by the environment. What is wrong goes to ``log``, where the server's own errors are:
    the one who asked may be a stranger.
    """
    try:
        found = find_adapter(asked, base=base, sources=sources, aliases=os.environ.get(ALIASES, "1") != "0")
    except NotFound as error:
        log.info("adapterkit: %s", error.message)
        return None
    except AdapterkitError as error:
        log.error("adapterkit: %s", error)
        return None
    return found


def _known(at: Home, name: str, which: str, digest: str) -> Record:
    """The version in the registry; a digest has to be of a version of this name."""
    if not digest or (not which.isdigit() and refs.get(at, name, which) is not None):
        return resolve.find(at, f"{name}@{which}" if which else name)
    hidden = at.hidden_versions(name)
    for version in reversed(at.versions(name)):
        if version in hidden:
            continue
        record = resolve.find(at, f"{name}@{version}")
        if record.content.startswith(digest) or record.digest.startswith(digest):
            return record
    raise NotFound(f"no version of {name} has the digest {digest}")


def _fetched(source: str, name: str, which: str, digest: str, at: Home) -> Record:
    """Pulled from a remote into the registry, under its name. A digest is looked for in what
    a remote calls newest; in a bucket under the digest itself."""
    record: Record
    if source.startswith("oci://"):
        from adapterkit.oci.pull import pull_oci

        tag = f":{which}" if which and not digest else ""
        record = pull_oci(f"{source.rstrip('/')}/{name}{tag}", name=name, home=at.root).record
    elif is_bucket(source):
        from adapterkit.bucket.pull import pull_bucket

        # `push` sets a tag of the content's first digits, so here an older version is found by its digest too.
        tag = f"@{digest[:12]}" if digest else f"@{which}" if which else ""
        record = pull_bucket(f"{source.rstrip('/')}/{name}{tag}", name=name, home=at.root).record
    else:
        from adapterkit.hub.pull import pull

        revision = f"@{which}" if which and not digest else ""
        record = pull(f"{source[4:]}/{name}{revision}", name=name, home=at.root).record
    if digest and not record.content.startswith(digest):
        raise NotFound(f"{source} has {name} with the digest {record.content[:12]}")
    return record


def _is_adapter(record: Record) -> None:
    """
    Raises:
        UsageError: it is no adapter that a server of folders loads.
    """
    if record.kind not in ("adapter", "combined") or any(file.path.endswith(".gguf") for file in record.files):
        raise UsageError(f"{record.ref} is no adapter in a folder", "ask for one")


def _suits(record: Record, folder: Path, base: str) -> None:
    """
    Raises:
        CheckFailed: it was trained on another base.
    """
    said = record.base
    if not base:
        return
    if Path(base).is_dir():
        if said is None or not said.known:
            return
        from adapterkit.bases import open_model
        from adapterkit.provenance.fits import compare_base

        compared = compare_base(said, open_model(base, headers_only=True))
        if compared.fits is False:
            raise CheckFailed(
                f"{record.ref} was not trained on {base}: {compared.sentence}", "serve it on its own base"
            )
        return
    from adapterkit.bases import open_adapter

    named = (said.id if said is not None else "") or open_adapter(folder, headers_only=True).config.base or ""
    if is_repo(named) and named.casefold() != base.casefold():
        raise CheckFailed(f"{record.ref} was trained on {named}, and the server has {base}", "serve it on its own base")


def _whole(at: Home, record: Record) -> Path:
    """The folder of a version, read once through by each process.

    Raises:
        CheckFailed: a file has other bytes than the record says.
    """
    folder = checkout(record.ref, home=at.root)
    if record.digest in _verified:
        return folder
    for file in record.files:
        if file.path in NOT_CONTENT:
            continue
        try:
            found = disk.hash_file(folder / file.path)
        except (OSError, AdapterkitError) as error:
            raise CheckFailed(f"{file.path} of {record.ref} cannot be read ({error})", "run fsck") from error
        if found != (file.sha256, file.size):
            raise CheckFailed(f"{file.path} of {record.ref} is not what its record says", "run fsck")
    _verified.add(record.digest)
    return folder
