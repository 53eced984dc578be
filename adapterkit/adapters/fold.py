"""`fold`: a checkpoint and adapters become a checkpoint. Nothing is read but headers; the result is a view."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.change import Checked
from adapterkit.adapters.composed import composed_edits, separate_note
from adapterkit.adapters.edits import adapter_edits, settle
from adapterkit.adapters.embeddings import check_embeddings
from adapterkit.adapters.heads import Brought, brought, prefixed, prefixes, unheld
from adapterkit.adapters.merged import Applied, Loaded, Merged, StoredWeights, merged_columns
from adapterkit.adapters.names import Names
from adapterkit.adapters.orientation import orientation_notes
from adapterkit.adapters.replicate import replicated
from adapterkit.adapters.target import Target
from adapterkit.adapters.ties import Weighted, same_bytes, settle_ties
from adapterkit.adapters.widened import widened_base
from adapterkit.checkpoint.decoded import dequantized
from adapterkit.checkpoint.pipeline import lead_of
from adapterkit.checkpoint.tensor import Cast, Tensor
from adapterkit.dtypes import FLOATS
from adapterkit.errors import AdapterError, TargetError, UsageError, counted, option
from adapterkit.ops.device import CPU
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.bound_rule import BoundRule
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.dtypes import DType


@dataclass(frozen=True)
class Folded:
    """The result of a fold.

    Attributes:
        checkpoint: the view; a touched tensor is a `Merged`, an untouched one is the base's own handle.
        touched: tensors that adapters change, in order.
        added: tensors that the base did not have.
        vocab: old and new number of rows, where a vocabulary changed its size.
        untied: the output layer got values of its own.
        head: what adapters that bring a head say of the merged model.
        notes: what a user should know.
        flag_off: the config may no longer say that embeddings are tied.
        unheld: what the merged model's class has and nothing holds; "" where that is nothing.
    """

    checkpoint: Checkpoint
    touched: tuple[str, ...]
    added: tuple[str, ...]
    vocab: tuple[int, int] | None
    untied: bool
    head: Brought
    notes: tuple[str, ...]
    flag_off: bool = False
    unheld: str = ""


def fold(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    dtype: DType | None = None,
    residual_base: bool = False,
    allow_unknown: bool = False,
    names: Names | None = None,
    rule: BoundRule | None = None,
    device: str = CPU,
) -> Folded:
    """Fold adapters into a base: W + sum of w_k (f_k(W) - W), summed in float32, rounded once.

    Args:
        base: the base.
        adapters: one or more.
        weights: one per adapter, 1 each by default; may be negative.
        dtype: of all floating tensors; None keeps each tensor's own.
        residual_base: the base is what training left behind (PiSSA, LoRA-GA, ...), not the original model.
        allow_unknown: go on where a config has fields that we do not know.
        names: where parameters are, for bases whose tensors have names of another format.
        rule: how deltas of several adapters become one; None is their weighted sum.
        device: where blocks are computed; see `Merged`.

    Raises:
        UsageError: no adapters, or another number of weights.
        TargetError, AdapterError, UnsupportedAdapter: see `adapter_edits` and `check_embeddings`.
    """
    if not adapters:
        raise UsageError("no adapter was given", "name at least one")
    factors = [1.0] * len(adapters) if not weights else [float(weight) for weight in weights]
    if not all(map(math.isfinite, factors)):
        raise UsageError("a weight is not a finite number", f"give each {option('weights')} a number")
    if len(factors) != len(adapters):
        given = f"{counted(len(factors), 'weight')} for {counted(len(adapters), 'adapter')}"
        raise UsageError(given, f"give one {option('weights')} for each adapter")
    base, notes = replicated_base(dequantized(base), adapters)
    if names is None:
        base, wider = widened_base(base, adapters)
        notes += wider
    names = names or Names(base.shapes, base.config)
    adapters = [settle(adapter, names, base.config) for adapter in adapters]

    def found(base: Checkpoint, names: Names) -> list[Weighted]:
        if any(adapter.whole for adapter in adapters):
            from adapterkit.adapters.whole_model import model_edits
        how = {"residual_base": residual_base, "allow_unknown": allow_unknown}
        made: list[Weighted] = []
        for adapter, factor in zip(adapters, factors, strict=True):
            if adapter.whole:
                edits = model_edits(adapter, names, base)
            else:
                edits = adapter_edits(adapter, names, base.config, **how)
                check_embeddings(adapter, edits, names, base.config)
            made += [Weighted(edit, adapter, factor) for edit in edits]
        return made

    for prefix in prefixes(adapters, base.config):
        names.also_under(prefix)
    edits = found(base, names)
    head = brought(edits, base.config, base)
    if head.prefix and type(names) is Names:
        base = prefixed(base, head, names)
        names = Names(base.shapes, base.config)
        edits = found(base, names)
    for adapter in adapters:
        notes += orientation_notes(adapter, [one.edit for one in edits if one.adapter is adapter], names)
        notes += adapter.notes
        if adapter.whole:
            from adapterkit.adapters.whole_model import config_notes

            notes += config_notes(adapter, base.config)
    settled = settle_ties(edits, names, base, base.config)
    tensors: dict[str, Tensor] = {**base.tensors, **settled.added}
    by_tensor: dict[str, list[Weighted]] = {}
    if rule is None:
        together, order = composed_edits(settled.edits)
    else:
        together, order = _ruled(settled.edits, rule, adapters, base.tensors), separate_note(settled.edits)
    notes += order
    for item in together:
        for name in item.edit.target.tensors:
            by_tensor.setdefault(name, []).append(item)
    added = [name for name in by_tensor if name not in base]
    added += [name for name in settled.added if name not in by_tensor]
    result = _Fold(base, tensors, by_tensor, dtype, device, settled.factors)
    merged = result.tensors()
    _check_vocabulary(base, merged, names)
    shards = _shards(base, merged)
    checkpoint = replace(base, tensors=merged, shards=shards)
    resized = [(base[n].shape[0], merged[n].shape[0]) for n in by_tensor if n in base and _resized(base[n], merged[n])]
    vocab = resized[0] if resized and head.labels is None else None
    lost = unheld(head, adapters, base.config, merged, names)
    every = (*notes, *settled.notes, *head.notes, *((lost,) if lost else ()))
    touched = (*by_tensor, *(name for name in settled.factors if name not in by_tensor))
    return Folded(checkpoint, touched, tuple(added), vocab, settled.untied, head, every, settled.flag_off, lost)


def _ruled(
    edits: Sequence[Weighted], rule: BoundRule, adapters: Sequence[Adapter], names: Iterable[str]
) -> tuple[Weighted, ...]:
    from adapterkit.adapters.combined import combined_edits

    return combined_edits(edits, rule, adapters, names)


class _Fold:
    """Puts the handles together; kernels are shared between the tensors that hold one parameter."""

    def __init__(
        self,
        base: Checkpoint,
        tensors: Mapping[str, Tensor],
        by_tensor: Mapping[str, list[Weighted]],
        dtype: DType | None,
        device: str,
        factors: Mapping[str, float],
    ) -> None:
        self._tensors, self._by_tensor, self._dtype, self._device = dict(tensors), by_tensor, dtype, device
        self._factors = factors
        self._loaded: dict[int, Loaded] = {}
        for name, items in by_tensor.items():
            self._override(name, items, base)

    def tensors(self) -> dict[str, Tensor]:
        return {name: self._tensor(name, tensor) for name, tensor in self._tensors.items()}

    def _override(self, name: str, items: list[Weighted], base: Checkpoint) -> None:
        """What stands in the place of the base's tensor before deltas are added."""
        found = [item for item in items if item.edit.override or self._takes_over(item, items, base)]
        if not found:
            return
        first = found[0].edit.change.replaced
        others = [item.edit.change.replaced for item in found[1:]]
        if first is None or not all(new is first or (new is not None and same_bytes(first, new)) for new in others):
            raise TargetError(f"two adapters each bring their own '{name}'", "merge one of them first, then the other")
        for item in found:
            items.remove(item)
        dtype = base[name].dtype if name in base else first.dtype
        stored: Tensor = Checked(name, first)
        self._tensors[name] = stored if dtype is first.dtype else Cast(stored, dtype)

    @staticmethod
    def _takes_over(item: Weighted, items: list[Weighted], base: Checkpoint) -> bool:
        """A whole parameter that is alone on its tensor, with weight 1: nothing is left of the base's values."""
        new = item.edit.change.replaced
        if new is None or len(item.edit.target.pieces) != 1 or item.edit.target.pieces[0].transposed:
            return False
        name = item.edit.target.pieces[0].tensor
        whole = name not in base or item.edit.target.shape == base[name].shape
        if whole and new.shape != item.edit.target.shape and (len(items) > 1 or item.weight != 1):
            raise TargetError(
                f"{item.adapter.ref} brings '{name}' in another size, which cannot be weighted or added to",
                "merge it alone with weight 1",
            )
        return whole and len(items) == 1 and item.weight == 1

    def _tensor(self, name: str, tensor: Tensor) -> Tensor:
        items = self._by_tensor.get(name, [])
        dtype = self._dtype if self._dtype is not None and tensor.dtype in FLOATS else tensor.dtype
        factor = self._factors.get(name, 1.0)
        if not items and factor == 1:
            return tensor if dtype is tensor.dtype else Cast(tensor, dtype)
        if tensor.dtype not in FLOATS:
            raise TargetError(
                f"'{name}' is stored as {tensor.dtype}, a quantized weight that a delta cannot be added to",
                "give the 16-bit base",
            )
        applied = tuple(
            Applied(item.edit.change, item.edit.target, piece, item.weight, item.adapter.ref)
            for item in items
            for piece in item.edit.target.pieces
            if piece.tensor == name
        )
        targets = {id(item.edit.change): item.edit.target for item in items}
        pairs = tuple((one, self._load(one.change, targets[id(one.change)], name)) for one in applied)
        return Merged(name, tensor, pairs, dtype, merged_columns(applied, tensor.shape), self._device, factor)

    def _load(self, change: Any, target: Target, name: str) -> Loaded:
        if id(change) not in self._loaded:
            stored = self._tensors[name].shape  # more rows than the module has: a resized vocabulary
            rows = stored[0] if len(stored) < 3 and len(target.tensors) == 1 and not target.pieces[0].transposed else 0
            shape = (max(rows, target.matrix[0]), target.matrix[1]) if not target.stacked else target.matrix
            weights = StoredWeights(target, self._tensors, shape)
            self._loaded[id(change)] = Loaded(change, weights, len(target.tensors))
        return self._loaded[id(change)]


def replicated_base(base: Checkpoint, adapters: Sequence[Adapter]) -> tuple[Checkpoint, list[str]]:
    """The base with its layers repeated, when an adapter was trained on such a model."""
    asked = {str(adapter.config.get("layer_replication")) for adapter in adapters}
    if asked == {"None"}:
        return base, []
    if len(asked) > 1:
        raise AdapterError("the adapters were trained on models of different depth", "merge them one at a time")
    return replicated(base, adapters[0].config.get("layer_replication"), adapters[0].config.where)


def _shards(base: Checkpoint, merged: Mapping[str, Tensor]) -> dict[str, str]:
    last = list(base.shards.values())[-1] if base.shards else "model.safetensors"
    of_folder = {lead_of(file): file for file in base.shards.values() if "/" in file}
    found = {}
    for name in merged:
        own = next((file for lead, file in of_folder.items() if name.startswith(lead)), last) if of_folder else last
        found[name] = base.shards.get(name, own)
    return found


def _check_vocabulary(base: Checkpoint, merged: Mapping[str, Tensor], names: Names) -> None:
    """An embedding and an output layer that had as many rows before must have as many afterwards."""
    for pair in names.declared_ties():
        targets = [names.find(parameter) for parameter in pair]
        if None in targets:
            continue
        one, other = (target.pieces[0].tensor for target in targets if target is not None)
        old, new = [(base[one].shape, base[other].shape), (merged[one].shape, merged[other].shape)]
        if old[0][:1] == old[1][:1] and new[0][:1] != new[1][:1]:
            raise TargetError(
                f"the adapter brings {new[0][0]} rows for '{one}' and leaves '{other}' with {new[1][0]}",
                "give the base whose vocabulary was resized before training",
            )


def _resized(old: Tensor, new: Tensor) -> bool:
    return len(old.shape) == 2 and old.shape != new.shape
