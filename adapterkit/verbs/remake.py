"""Carrying out a recorded operation again, for versions that are kept as their recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.errors import NotFound, option
from adapterkit.registry import index
from adapterkit.registry.canonical import thaw
from adapterkit.registry.home import Home, open_home
from adapterkit.registry.record import NOT_CONTENT
from adapterkit.registry.remaking import bring_back, parent_ref
from adapterkit.registry.resolve import find

if TYPE_CHECKING:
    from adapterkit.registry.record import Parent, Record
    from adapterkit.requests.option import Request

_CALLED = {"mix": "quant", "router_temperature": "temperature"}  # what a record calls it, and what it is asked for by
_ADAPTERS = ("combine", "resize", "extract")
_INPUTS = {"base", "adapters", "weights", "src", "out", "home"}


def remake(ref: str, *, base: str | Path | None = None, home: Path | None = None) -> int:
    """Make the bytes of a version again that is kept as its recipe, and keep them until gc frees them; how many there were.

    Args:
        base: the base itself, where the registry holds only its identity.

    Raises:
        UsageError, CheckFailed, NotFound: see `adapterkit.registry.remaking.made_again`.
    """
    at = open_home(home)
    return bring_back(at, find(at, ref), base)


def make(at: Home, record: Record, folder: Path, base: str | Path | None) -> Path:
    """Carry out the operation of a record inside ``folder``; what came out.

    Raises:
        NotFound: an input is not here.
        AdapterkitError: as the verb itself.
    """
    from adapterkit.requests.convert import ConvertRequest
    from adapterkit.requests.merge import MergeRequest
    from adapterkit.verbs.convert import convert
    from adapterkit.verbs.merge import merge

    assert record.operation is not None
    files = [file.path for file in record.files if file.path not in NOT_CONTENT]
    alone = len(files) == 1 and "/" not in files[0]
    out = folder / files[0] if alone else folder / (record.name or "out")
    stated = thaw(record.operation.parameters)
    if record.operation.name in _ADAPTERS:
        _adapter(at, record, out, stated, base)
    elif record.operation.name == "merge":
        adapters = [parent for parent in record.parents if parent.role == "adapter"]
        under = next((parent for parent in record.parents if parent.role == "base"), None)
        weights = [float(parent.parameters.get("weight", 1.0)) for parent in adapters]
        merge(
            base if base is not None else _base(at, under),
            [_version(at, parent) for parent in adapters],
            out,
            **{"weights": weights, **_options(MergeRequest, stated)},
        )
    else:
        apart = [parent for parent in record.parents if parent.role != "base"]
        source = (*apart, *record.parents)[0] if record.parents else None
        if source is None:
            raise NotFound("its record names no source", "keep its bytes")
        more = _options(ConvertRequest, stated)
        under = next((parent for parent in record.parents if parent.role == "base" and parent is not source), None)
        if under is not None:
            more["base"] = base if base is not None else _base(at, under)
        convert(_version(at, source), out, **more)
    return out


def _adapter(at: Home, record: Record, out: Path, stated: Mapping[str, Any], base: str | Path | None) -> None:
    """Combine, resize or extract again."""
    from adapterkit.requests.adapters import CombineRequest, ExtractRequest, ResizeRequest
    from adapterkit.verbs.combine import combine
    from adapterkit.verbs.extract import extract
    from adapterkit.verbs.resize import resize

    assert record.operation is not None
    verb = record.operation.name
    given = [parent for parent in record.parents if parent.role == "adapter"]
    under = next((parent for parent in record.parents if parent.role == "base"), None)
    more: dict[str, Any] = {}
    if base is not None or under is not None:
        more["base"] = base if base is not None else _base(at, under)
    if verb == "extract":
        tuned = next((parent for parent in record.parents if parent.role == "tuned"), None)
        extract(more["base"] if more else _base(at, None), _base(at, tuned), out, **_options(ExtractRequest, stated))
        return
    if not given:
        raise NotFound("its record names no adapter", "keep its bytes")
    if verb == "resize":
        resize(_version(at, given[0]), out, **more, **_options(ResizeRequest, stated))
        return
    known = CombineRequest.options()
    # Parameters of a method stand among the options, by their own names.
    own = {
        _CALLED.get(name, name): value for name, value in stated.items() if name not in known and name not in _INPUTS
    }
    more |= {"parameters": own} if own else {}
    adapters = [_version(at, parent) for parent in given]
    if any(parent.parameters for parent in given):
        more["weights"] = [float(parent.parameters.get("weight", 1.0)) for parent in given]
    combine(adapters, out, **more, **_options(CombineRequest, stated))


def _options(request: type[Request], stated: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a record that are not what the verb does anyway."""
    known = request.options()
    found = {}
    for key, value in stated.items():
        name = _CALLED.get(key, key)
        if name in _INPUTS or value in (None, "", [], {}, False):
            continue
        # What a record says beside options (how values were stored) decides nothing here; the bytes are compared.
        if name in known and value != getattr(request, name, None):  # a field's default is the class's own
            found[name] = value
    return found


def _version(at: Home, parent: Parent) -> str:
    ref = parent_ref(at, parent.content) if parent.content else ""
    if not ref:
        raise NotFound(
            f"{parent.label or parent.content[:12]}, which it was made from, is not here", "register it first"
        )
    return ref


def _base(at: Home, parent: Parent | None) -> str:
    """A base whose bytes can be had: registered with them, or on the Hub at a commit."""
    if parent is None:
        raise NotFound("its record names no base", "keep its bytes")
    if parent.content and (ref := parent_ref(at, parent.content)):
        return ref
    identity = parent.identity
    if identity is not None:
        rows = index.ask(at, lambda found: found.by_identity(identity))
        for row in rows:
            if row.kind != "base" and not row.hidden:
                return f"{row.name}@{row.version}"
        for row in rows:
            one = find(at, f"{row.name}@{row.version}").identity
            if one is not None and one.id and one.commit:
                return f"{one.id}@{one.commit}"
        if identity.id and identity.commit:
            return f"{identity.id}@{identity.commit}"
    raise NotFound(
        f"of its base {parent.label or ''} only the identity is here".replace("  ", " "), f"give {option('base')}"
    )
