"""`register`: a folder or file becomes a version in the registry, with the base it belongs to identified by its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.load import is_adapter
from adapterkit.bases import open_model
from adapterkit.checkpoint.hub_ref import parse_hub
from adapterkit.errors import CheckFailed, NotFound, UnsafeError, UsageError, option
from adapterkit.places import Address, address_of, local
from adapterkit.provenance.claims import called, contradicted
from adapterkit.redaction import check_public
from adapterkit.registry.beside import beside_path, read_beside
from adapterkit.registry.home import open_home
from adapterkit.registry.identity import Identity, compare
from adapterkit.registry.names import is_repo
from adapterkit.registry.register import Registered, register_base
from adapterkit.registry.register import register as store
from adapterkit.registry.weights import cheap, identity_of
from adapterkit.requests.call import takes
from adapterkit.requests.register import RegisterRequest
from adapterkit.stores.files import copied

if TYPE_CHECKING:
    from adapterkit.adapters.scan import ScanReport
    from adapterkit.registry.record import Record

IN_STORE = "from"  # key of a version's text: the address that its files came from


@takes(RegisterRequest)
def register(request: RegisterRequest) -> Registered:
    """Register an artefact; what is not given is taken from ``adapterkit.json`` beside it, then from its config.

    Raises:
        CheckFailed: ``adapterkit.json`` describes other files than are there.
        UsageError, UnsafeError, NotFound, RegistryError, OutputError, CheckpointError, AuthError, HubError, StoreError
    """
    return _register(request)


def _register(request: RegisterRequest) -> Registered:
    path: Any = request.path
    name, base, base_id = request.name, request.base, request.base_id
    kind, method, full, home = request.kind, request.method, request.full, request.folder
    meta, evidence = request.texts, request.evidence or None
    for key, value in meta.items():
        check_public(f"{key}={value}", f"the metadata '{key}'")
    if kind == "base":
        return _register_base(request)
    address = address_of(path)
    if address is not None:
        return _register_stored(request, address)
    if not Path(local(path, "what is registered")).expanduser().exists():
        hub = parse_hub(str(path))
        hint = f"pull {path} brings it from the Hub" if hub is not None else "give a folder or a file"
        raise NotFound(f"{path} does not exist", hint)
    folder = Path(path).expanduser()
    beside = None if request.ignore_record else _beside(folder)
    known = None if base is None else _base_identity(base, base_id, folder, full, home)
    if base is None and base_id:
        if beside is None or beside.base is None:
            raise UsageError(f"nothing says which weights {base_id} has", f"give the base itself with {option('base')}")
        known = _named(beside.base, base_id)
    if known is None and beside is not None:
        known = beside.base
    known, warnings = by_weights(known, home, said=_said(folder))
    scanned = _scanned(folder, known, home) if request.scan else None
    if scanned is not None:
        warnings += tuple(one.message for one in scanned.oddities if one.level == "warning")
    own = _own_identity(folder, beside, full)
    stored = store(
        folder,
        name,
        kind=kind,
        method=method,
        base=known,
        identity=own,
        meta=meta,
        new_version=request.new_version,
        link=request.link,
        ignore_beside=request.ignore_record,
        as_recipe=request.as_recipe,
        made_on=base if isinstance(base, (str, Path)) else None,
        evidence=evidence,
        home=home,
    )
    if scanned is not None:
        from adapterkit.provenance.scan import keep_figures

        keep_figures(stored.record, scanned.figures, home=home)
    return replace(stored, warnings=warnings)


def _register_stored(request: RegisterRequest, address: Address) -> Registered:
    """Register what lies in a store. Its files are fetched to the disk of the registry, which keeps them; the version says
    where they came from."""
    at = open_home(request.folder)
    at.create()
    meta = {IN_STORE: str(address), **request.texts}
    with copied(address, at.room_to_pull()) as here:
        return _register(replace(request, path=here, meta=meta, link=True))


def by_weights(base: Identity | None, home: Path | None, said: str = "") -> tuple[Identity | None, tuple[str, ...]]:
    """A base whose claimed name was held against what has that name here: weights are believed over names.

    A commit comes from the Hub itself; an id alone is what somebody wrote into a config.

    Args:
        said: what the config calls the base, where that may be another name than ``base.id``; see `called`.
    """
    if base is None or not base.known:
        return base, ()
    for name in dict.fromkeys((said, base.id)):
        if not name or (base.commit and name == base.id):
            continue
        other = contradicted(base, called(name, home=home))
        if other:
            text = (
                f"its config names {name} as its base, and the base given has {other}: another base, or another "
                "revision of it; it is filed under its weights, without the name"
            )
            return replace(base, id="" if name == base.id else base.id), (text,)
    return base, ()


def _said(folder: Path) -> str:
    """What the config of an adapter's folder calls its base."""
    from adapterkit.registry.gather import named_base

    return named_base(folder) if folder.is_dir() else ""


def _scanned(folder: Path, base: Identity | None, home: Path | None) -> ScanReport:
    """What stands out of an adapter's change.

    Raises:
        UnsafeError: something in it has no place in an adapter.
        UsageError: it is no adapter.
    """
    from adapterkit.adapters.load import load_adapter
    from adapterkit.provenance.scan import scan

    if not is_adapter(folder):
        raise UsageError(f"{folder} is no adapter, and only adapters are scanned", f"leave {option('scan', True)} out")
    found = scan(load_adapter(folder), said=base, home=home)
    if wrong := [one.message for one in found.oddities if one.level == "error"]:
        raise UnsafeError(f"{folder} was not registered: {'; '.join(wrong[:3])}", "see check with the same option")
    return found


def _register_base(request: RegisterRequest) -> Registered:
    ref: Any = request.path
    identity = _named(identify_base(ref, full=request.full, home=request.folder), request.base_id)
    return register_base(
        identity,
        request.name,
        method=request.method,
        meta=request.texts,
        new_version=request.new_version,
        home=request.folder,
    )


def identify_base(ref: str | Path, *, full: bool = False, home: Path | None = None) -> Identity:
    """Which base ``ref`` is: as recorded for a registered one, else from its weights, cheap levels unless ``full``.

    Raises:
        NotFound, CheckpointError, UnsafeError, AuthError, HubError
    """
    record = registered(ref, home=home)
    if record is not None and record.identity is not None and not full:
        return record.identity
    opened = open_model(ref, headers_only=True)
    return identity_of(opened, "merkle" if full else cheap(opened), hub_files=True)


def registered(ref: str | Path, *, home: Path | None = None) -> Record | None:
    """The record that a registry name means; None for a path, a Hub id or an unknown name.

    Raises:
        NotFound: the name is there, and not this version or alias of it.
    """
    from adapterkit.registry import resolve
    from adapterkit.registry.finder import is_known
    from adapterkit.registry.home import open_home

    text = str(ref)
    if isinstance(ref, Path) or "/" in text or Path(text).expanduser().exists():
        return None
    at = open_home(home)
    return resolve.find(at, text) if is_known(at, text) else None


def _base_identity(base: str | Path, base_id: str, folder: Path, full: bool, home: Path | None) -> Identity:
    from adapterkit.registry.gather import describe

    identity = _named(identify_base(base, full=full, home=home), base_id)
    said = describe(folder).base if folder.is_dir() and not identity.id else None
    return replace(identity, id=said.id) if said is not None else identity


def _named(identity: Identity, repo: str) -> Identity:
    if not repo:
        return identity
    if not is_repo(repo):
        raise UsageError(f"'{repo}' is not a Hub id", f"give {option('base_id')} like org/name")
    if identity.id not in ("", repo):
        raise UsageError(f"the base is {identity.id} on the Hub, and not {repo}", f"leave out {option('base_id')}")
    return replace(identity, id=repo)


def _beside(folder: Path) -> Record | None:
    return read_beside(folder)


def _own_identity(folder: Path, beside: Record | None, full: bool) -> Identity | None:
    """The identity of a whole model, held against what the record beside it says.

    Raises:
        CheckFailed: these are other weights than the record is about.
    """
    said = beside.identity if beside is not None else None
    if folder.is_dir() and (not any(folder.glob("*.safetensors")) or is_adapter(folder)):
        return None
    if not folder.is_dir() and said is None:
        return None
    found = identity_of(open_model(folder), "merkle" if full else "sampled")
    if said is not None and compare(said, found).fits is False:
        raise CheckFailed(
            f"{beside_path(folder)} describes other weights than are there, so it is not about these files",
            f"restore the files, or register with {option('ignore_record', True)}",
        )
    return replace(found, id="", commit="", files=())
