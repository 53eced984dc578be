"""Several adapters of one base, side by side: the deltas of each module, and what else they bring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.adapter import Adapter
from adapterkit.adapters.factors import ModuleDelta, Parts, Slot, take_apart
from adapterkit.adapters.fold import replicated_base
from adapterkit.adapters.formats.parts import led, undotted
from adapterkit.adapters.formats.write_single import STYLES, component_lead
from adapterkit.adapters.names import Names
from adapterkit.adapters.ties import same_bytes
from adapterkit.bases import open_adapter, open_base
from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.errors import TargetError, UsageError, option

if TYPE_CHECKING:
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.ops.rows import DeltaRows

Ref = str | Path


@dataclass(frozen=True)
class Family:
    """Adapters of one base, opened and found to fit together; only headers have been read.

    Attributes:
        adapters: in the order given.
        parts: each of them taken apart.
        slots: every place that one of them acts on, by parameter.
        base: the base, when it was given.
        notes: what a user should know.
    """

    adapters: tuple[Adapter, ...]
    parts: tuple[Parts, ...]
    slots: Mapping[str, Slot]
    base: Checkpoint | None = None
    notes: tuple[str, ...] = ()

    def deltas(self, parameter: str) -> tuple[tuple[int, ModuleDelta], ...]:
        """Which adapters act on a parameter, and how."""
        found = ((i, part.deltas.get(parameter)) for i, part in enumerate(self.parts))
        return tuple((i, delta) for i, delta in found if delta is not None)

    @property
    def names(self) -> Names | None:
        """Those of the base, where one was given."""
        return None if self.base is None else Names(self.base.shapes, self.base.config)

    @property
    def sources(self) -> tuple[Source, ...]:
        """The files that are read."""
        base = () if self.base is None else self.base.sources
        return (*(source for adapter in self.adapters for source in adapter.sources), *base)

    def load(self, parameter: str) -> tuple[tuple[int, ...], tuple[tuple[DeltaRows, ...], ...]]:
        """Which adapters act on a parameter, and for each expert (or the one matrix) their deltas."""
        found = self.deltas(parameter)
        loaded = [delta.load() for _, delta in found]
        return tuple(i for i, _ in found), tuple(zip(*loaded, strict=True))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all adapters."""
        return sum(adapter.nbytes for adapter in self.adapters)


def open_family(
    adapters: Sequence[Ref | Adapter],
    base: Ref | Checkpoint | None = None,
    *,
    residual_base: bool = False,
    allow_unknown: bool = False,
    bare: bool = False,
    style: str = "",
) -> Family:
    """Open adapters that are to be combined or compared; no tensor is read.

    Args:
        adapters: PEFT folders or Hub ids, or open adapters.
        base: their base; needed when a method's change depends on the weights.
        residual_base, allow_unknown: see `fold`.
        bare: see `take_apart`.
        style: of the file that is made of them, which may hold several parts of a pipeline; empty for anything else.

    Raises:
        UsageError: no adapters, or the base is needed.
        TargetError: they belong to different bases.
        NotFound, CheckpointError, AdapterError, UnsafeError, AuthError, HubError
    """
    if not adapters:
        raise UsageError("no adapter was given", "name at least one")
    loaded = tuple(a if isinstance(a, Adapter) else open_adapter(a) for a in adapters)
    opened, names = None, None
    notes: list[str] = [note for adapter in loaded for note in adapter.notes]
    if base is not None:
        opened, replicas = replicated_base(_in_its_names(open_base(base)[0]), loaded)
        names = Names(opened.shapes, opened.config)
        notes += replicas
        fits = names
        loaded = tuple(adapter.fitted(fits, opened.config) for adapter in loaded)
    else:
        loaded = tuple(undotted(adapter) for adapter in loaded)
        several = any(one.contents is not None and len(one.contents.parts) > 1 for one in loaded)
        if several and style in STYLES:
            loaded = tuple(led(adapter, component_lead) for adapter in loaded)
    nameless = next((adapter for adapter in loaded if adapter.needs_names), None)
    if nameless is not None:
        raise UsageError(
            f"{nameless.ref} is a GGUF LoRA, whose modules are named by its base", f"name it with {option('base')}"
        )
    _check_bases(loaded, base is not None)
    how: dict[str, Any] = {"residual_base": residual_base, "allow_unknown": allow_unknown, "bare": bare}
    parts = tuple(take_apart(adapter, opened, names, **how) for adapter in loaded)
    slots: dict[str, Slot] = {}
    for part in parts:
        for parameter, delta in part.deltas.items():
            before = slots.setdefault(parameter, delta.slot)
            if (before.shape, before.count) != (delta.slot.shape, delta.slot.count):
                raise TargetError(
                    f"{parameter} is {_said(before)} in {_first(parts, parameter).ref} and {_said(delta.slot)} in "
                    f"{part.adapter.ref}",
                    "they belong to different bases",
                )
            if before != delta.slot:
                raise TargetError(
                    f"{part.adapter.ref} adapts {parameter} as {delta.slot.kind}, another one as {before.kind}",
                    "combine adapters that were trained in the same way, or fold them in with merge",
                )
    return Family(loaded, parts, slots, opened, tuple(dict.fromkeys(notes)))


def _in_its_names(base: Checkpoint) -> Checkpoint:
    """The base under the names that adapters know; a GGUF language model has others for its tensors."""
    from adapterkit.gguf.checkpoint import GGUFCheckpoint
    from adapterkit.gguf.diffusion import is_diffusion

    if not isinstance(base, GGUFCheckpoint) or base.kind != "model" or is_diffusion(base):
        return base
    from adapterkit.gguf.to_hf import as_hf

    return as_hf(base)


def _first(parts: Sequence[Parts], parameter: str) -> Adapter:
    return next(part.adapter for part in parts if parameter in part.deltas)


def _said(slot: Slot) -> str:
    return " x ".join(map(str, (slot.count, *slot.shape) if slot.count > 1 else slot.shape))


def _check_bases(adapters: Sequence[Adapter], named: bool) -> None:
    """Adapters of different bases have no sum, even where their shapes agree."""
    depths = {str(adapter.config.get("layer_replication")) for adapter in adapters}
    if len(depths) > 1:
        raise TargetError("the adapters were trained on models of different depth", "they belong to different bases")
    said = [adapter for adapter in adapters if adapter.config.base]
    for other in said[1:]:
        one = said[0]
        if not named and _tail(one) != _tail(other):
            raise TargetError(
                f"{one.ref} was trained on {one.config.base} and {other.ref} on {other.config.base}",
                f"if both are the same model, name it with {option('base')}",
            )


def _tail(adapter: Adapter) -> str:
    """A local copy of a base keeps at most the last part of its name."""
    return str(adapter.config.base).rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class Carried:
    """What a combination takes over as it is.

    Attributes:
        whole: whole parameters by key, as they stand in the file.
        tokens: token rows by module: ids and rows.
        owner: the adapter that each key or module comes from.
    """

    whole: Mapping[str, Tensor]
    tokens: Mapping[str, tuple[tuple[int, ...], Tensor]]
    owner: Mapping[str, Adapter]


def carried(family: Family) -> Carried:
    """The whole parameters and token rows of all adapters.

    Raises:
        TargetError: two adapters bring different values for one of them, or one replaces what another adds to.
    """
    whole: dict[str, Tensor] = {}
    tokens: dict[str, tuple[tuple[int, ...], Tensor]] = {}
    owner: dict[str, Adapter] = {}
    for part in family.parts:
        for key, tensor in part.whole.items():
            _claim(key, key in whole and not same_bytes(whole[key], tensor), owner, part.adapter)
            whole.setdefault(key, tensor)
            if key in family.slots:
                other = _first(family.parts, key)
                raise TargetError(
                    f"{part.adapter.ref} brings its own '{key}', which {other.ref} adds to",
                    "fold the first one in with merge, then the other",
                )
        for module, (ids, rows) in part.tokens.items():
            other_ids, other_rows = tokens.get(module, (ids, rows))
            differs = other_ids != ids or not (other_rows is rows or same_bytes(other_rows, rows))
            _claim(module, differs, owner, part.adapter)
            tokens.setdefault(module, (ids, rows))
    return Carried(whole, tokens, owner)


def _claim(name: str, conflict: bool, owner: dict[str, Adapter], adapter: Adapter) -> None:
    if conflict:
        raise TargetError(
            f"{owner[name].ref} and {adapter.ref} each bring their own '{name}'",
            "leave one of them out, or fold one in with merge first",
        )
    owner.setdefault(name, adapter)
