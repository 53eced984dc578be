"""What a verification reads: MERGED with the record beside it, the options that it states, and digests of all inputs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.bases import open_model
from adapterkit.checkpoint.pipeline import folder_of
from adapterkit.errors import NotFound, RegistryError, UsageError, option
from adapterkit.registry.beside import beside_path, parse_beside, read_beside
from adapterkit.registry.canonical import MAX_BYTES
from adapterkit.registry.record import BESIDE
from adapterkit.requests.merge import FEEDBACK, MergeRequest
from adapterkit.requests.option import VALUES
from adapterkit.verbs.verify.report import ERROR, NOTE, WARNING, Finding, VerifiedInput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.places import Address
    from adapterkit.registry.identity import Identity
    from adapterkit.registry.record import Parent, Record

Ref = str | Path
# Verbs whose record states how a base and adapters became a model.
_MERGES = frozenset({"merge", "build"})


@dataclass(frozen=True)
class Asked:
    """The options of the merge, and where they come from.

    Attributes:
        given: options by name, those of the record under those of the caller.
        record: the record beside MERGED, where there is one of a merge.
        findings: what is wrong with it.
    """

    given: Mapping[str, Any]
    record: Record | None
    findings: tuple[Finding, ...]

    @property
    def fed(self) -> bool:
        """Whether the record says that weights were rounded with feedback."""
        operation = None if self.record is None else self.record.operation
        return operation is not None and operation.parameters.get("rounding") == FEEDBACK

    @property
    def other_weights(self) -> bool:
        """Whether other weights were given than the record states."""
        given = self.given.get("weights")
        return self.record is not None and given is not None and [float(one) for one in given] != _weights(self.record)


class Digests:
    """What tells inputs from others, found once for each: a record is held against it, and the report names it.

    When all is read somebody has to see that no input changed meanwhile (`adapterkit.checkpoint.files.check_unchanged`).
    """

    def __init__(self) -> None:
        self._models: dict[int, tuple[Checkpoint, Identity]] = {}
        self._adapters: dict[int, tuple[Adapter, Parent]] = {}

    def model(self, checkpoint: Checkpoint) -> Identity:
        """The identity up to the strongest level that costs little."""
        found = self._models.get(id(checkpoint))
        if found is None:
            from adapterkit.registry.weights import cheap, identity_of

            found = self._models[id(checkpoint)] = (checkpoint, identity_of(checkpoint, cheap(checkpoint)))
        return found[1]

    def said(self, checkpoint: Checkpoint) -> str:
        """The same as text."""
        from adapterkit.registry.weights import cheap

        level = cheap(checkpoint)
        return f"{level}:{self.model(checkpoint).level(level)}"

    def adapter(self, adapter: Adapter) -> Parent:
        """An adapter as a record names it."""
        found = self._adapters.get(id(adapter))
        if found is None:
            from adapterkit.provenance.record import adapter_parent

            found = self._adapters[id(adapter)] = (adapter, adapter_parent(adapter))
        return found[1]


def place(checkpoint: Checkpoint) -> Path | None:
    """The folder, or the single file, that a checkpoint was read from; None where it is not on this disk."""
    path = checkpoint.sources[0].path if checkpoint.sources else None
    if path is None:
        return None
    loose = path.suffix == ".gguf" or checkpoint.sources[0].loose  # what lies beside such a file is not its own
    return path if loose else folder_of(checkpoint)


def asked(merged: Checkpoint, adapters: Sequence[Adapter], options: Mapping[str, Any], digests: Digests) -> Asked:
    """The options of the merge: as given, else as the record beside MERGED states them, else the defaults.

    Raises:
        UsageError: an option that a merge does not have, or a base of 16 bits that only its record knows.
    """
    given = {name: value for name, value in options.items() if value is not None}
    try:
        record = record_of(merged)
    except RegistryError as error:
        text = f"the record beside MERGED cannot be used: {error.message}"
        return Asked(given, None, (Finding("damaged record", ERROR, text, "restore it, or remove it"),))
    if record is None or record.operation is None:
        return Asked(given, None, ())
    if record.operation.name not in _MERGES:  # a conversion says nothing of values, and may name a pre-tokenizer
        named = record.operation.parameters.get("pre")
        return Asked({**({} if named is None else {"pre": named}), **given}, None, ())
    stated = _stated(record)
    if stated.get("base16") is not None and "base16" not in given:
        raise UsageError(
            f"MERGED was made on {stated['base16']}, the original of its quantized base",
            f"name it with {option('base16')}",
        )
    findings = _same_adapters(record, adapters, digests)
    if not findings and "weights" not in given:
        stated["weights"] = _weights(record)
    return Asked({**stated, **given}, record, findings)


def record_of(merged: Checkpoint) -> Record | None:
    """The record beside a model, on this disk or in a store; None where there is none.

    Raises:
        RegistryError: it is damaged, or written by a newer adapterkit.
        AuthError, StoreError
    """
    where = place(merged)
    if where is not None:
        return read_beside(where)
    from adapterkit.checkpoint.objects import ObjectFile, object_file

    source = merged.sources[0] if merged.sources else None
    if not isinstance(source, ObjectFile):
        return None
    address = source.address
    alone = source.loose or address.suffix == ".gguf"
    beside = address.with_name(f"{address.name}.{BESIDE}") if alone else address.parent / BESIDE
    try:
        found = object_file(beside)
    except NotFound:
        return None
    return None if found is None else parse_beside(found.read(0, min(found.size, MAX_BYTES + 1)), str(beside))


def _stated(record: Record) -> dict[str, Any]:
    from adapterkit.registry.canonical import thaw

    assert record.operation is not None
    stated = thaw(record.operation.parameters).items()
    options = MergeRequest.options()
    found = {name: value for name, value in stated if name in options and _matters(name, options[name].role)}
    return {name: value for name, value in found.items() if value is not None}


def _matters(name: str, role: str) -> bool:
    """Whether an option says something about values. Types are read from MERGED itself."""
    return role == VALUES or name in ("dtype", "quant", "quant_double", "pre")


def _parents(record: Record) -> list[Parent]:
    return [parent for parent in record.parents if parent.role in ("adapter", "model")]


def _known(parent: Parent) -> str:
    """The bytes of an adapter, or what tells a whole model from others."""
    identity = parent.identity
    return parent.content or ("" if identity is None else identity.sampled or identity.probe or identity.skeleton)


def _weights(record: Record) -> list[float]:
    return [float(parent.parameters.get("weight", 1.0)) for parent in _parents(record)]


def _same_adapters(record: Record, adapters: Sequence[Adapter], digests: Digests) -> tuple[Finding, ...]:
    """Whether the adapters that are given are those that the record names, in order."""
    stated = _parents(record)
    given = [digests.adapter(adapter) for adapter in adapters]
    if [_known(parent) for parent in stated] == [_known(parent) for parent in given]:
        return ()
    names = ", ".join(parent.label or _known(parent)[:12] for parent in stated) or "none"
    text = f"the record beside MERGED names other adapters than were given ({names})"
    same = sorted(map(_known, stated)) == sorted(map(_known, given))
    hint = "give them in that order" if same else "give the files that were merged, or go by the tensors below"
    return (Finding("other adapter", WARNING, text, hint),)


def inputs(
    merged: Checkpoint,
    base: Checkpoint,
    original: Ref | Checkpoint | None,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    digests: Digests,
) -> tuple[VerifiedInput, ...]:
    """Everything that was read, by digest: 16 KiB of each tensor of models, every byte of adapters."""
    from adapterkit.adapters.whole_model import WholeModel

    found = [
        VerifiedInput("merged", merged.ref, digests.said(merged)),
        VerifiedInput("base", base.ref, digests.said(base), commit=base.commit),
    ]
    if original is not None:
        opened = open_inputs(original, base)[0]
        found.append(VerifiedInput("original", opened.ref, digests.said(opened), commit=opened.commit))
    for adapter, weight in zip(adapters, weights, strict=True):
        if isinstance(adapter, WholeModel) and adapter.checkpoint is not None:
            digest = digests.said(adapter.checkpoint)
            found.append(VerifiedInput("model", adapter.ref, digest, weight, commit=adapter.commit))
            continue
        content = f"sha256:{digests.adapter(adapter).content}"
        found.append(VerifiedInput("adapter", adapter.ref, content, weight, adapter.config.label, adapter.commit))
    return tuple(found)


def residual_of(adapter: Adapter, digests: Digests) -> VerifiedInput:
    """What stands beside MERGED, by digest."""
    return VerifiedInput("residual", adapter.ref, f"sha256:{digests.adapter(adapter).content}")


def prompts_of(place: Ref | Address) -> VerifiedInput:
    """The texts that models answer, by digest."""
    from adapterkit.disk import hash_file
    from adapterkit.stores.files import brought

    return VerifiedInput("prompts", str(place), f"sha256:{hash_file(brought(place))[0]}")


def same_as_recorded(
    record: Record | None, base: Checkpoint, merged: Checkpoint, digests: Digests
) -> tuple[Finding, ...]:
    """Whether base and MERGED are those that the record beside MERGED names."""
    if record is None:
        return ()
    from adapterkit.registry.identity import compare

    found = []
    if record.base is not None and compare(record.base, digests.model(base)).verdict == "other":
        text = f"{base.ref} is not the base that the record beside MERGED names ({record.base.label})"
        found.append(Finding("other base", WARNING, text, "give that base, or go by the tensors below"))
    if record.identity is not None and compare(record.identity, digests.model(merged)).fits is False:
        text = "MERGED changed since its record was written"
        found.append(Finding("changed since", NOTE, text, f"see {beside_path(place(merged) or Path()).name}"))
    return tuple(found)


def open_inputs(merged: Ref | Checkpoint, base: Ref | Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """MERGED and the base as they are stored.

    Raises:
        NotFound, CheckpointError, UnsafeError, AuthError, HubError
    """
    from adapterkit.checkpoint.checkpoint import Checkpoint as Opened

    found = merged if isinstance(merged, Opened) else open_model(merged)
    stored = base if isinstance(base, Opened) else open_model(base)
    return found, stored
