"""Adapters folded into a GGUF model: only the tensors that they change are decoded and encoded again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.fold import Folded, fold
from adapterkit.errors import TargetError, UsageError
from adapterkit.gguf.arch.back import mapper_of_gguf
from adapterkit.gguf.arch.views import reordered
from adapterkit.gguf.checkpoint import GGUFCheckpoint
from adapterkit.gguf.diffusion import check_types, diffusion_names, in_shapes, is_diffusion, original_shapes
from adapterkit.gguf.hf import gguf_names
from adapterkit.gguf.names import OUTPUT
from adapterkit.gguf.plan import FileLayout
from adapterkit.gguf.quantize import Quantization, typed
from adapterkit.gguf.scales import scales_of
from adapterkit.gguf.tensors import decoded, importance_of, kind_of, round_trip
from adapterkit.gguf.text_part import text_part
from adapterkit.ops.device import CPU

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.bound_rule import BoundRule
    from adapterkit.adapters.fidelity import Through
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.gguf.metadata import Entry
    from adapterkit.gguf.names import GGUFNames
    from adapterkit.gguf.reader import GGUFHeader


@dataclass(frozen=True)
class GGUFFolded:
    """The fold, and what a GGUF output of it is made of.

    Attributes:
        folded: in floats, its merged tensors not rounded.
        written: handles of the output's own types.
        layout: the file.
    """

    folded: Folded
    written: Checkpoint
    layout: FileLayout
    notes: tuple[str, ...]

    def through(self, name: str, shape: tuple[int, ...]) -> Through | None:
        """What the type of a changed tensor does to its rows; see `adapterkit.verbs.outputs.Output`."""
        if name not in self.written or len(shape) < 2:
            return None
        kind = kind_of(self.written[name])
        by = self.importance(name, shape)
        return lambda rows: round_trip(kind, rows.reshape(-1, shape[-1]), by).view(rows.shape)

    def importance(self, name: str, shape: tuple[int, ...]) -> torch.Tensor | None:
        """How strongly inputs use the columns of a changed tensor; see `adapterkit.verbs.outputs.Output`."""
        return None if name not in self.written else importance_of(self.written[name], shape)


def fold_gguf(
    base: GGUFCheckpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    quantization: Quantization | None = None,
    residual_base: bool = False,
    allow_unknown: bool = False,
    rule: BoundRule | None = None,
    device: str = CPU,
    too_lossy: frozenset[str] | None = None,
) -> GGUFFolded:
    """Fold adapters into a GGUF model; every other byte of it stays.

    Args:
        base: the model.
        adapters: one or more.
        weights: one per adapter, 1 each by default.
        quantization: the types of the output; by default each tensor keeps its own.
        residual_base, allow_unknown, rule, device: as for `fold`.
        too_lossy: changed tensors whose change would not survive the type; only these get the wider type.

    Raises:
        UsageError: the change would drown in a coarse grid, or options contradict each other.
        TargetError: an adapter does not fit, or the architecture is not known here.
    """
    how: dict[str, Any] = {"residual_base": residual_base, "allow_unknown": allow_unknown, "rule": rule}
    how["device"] = device
    if is_diffusion(base):
        check_types(base, quantization)
    folded = fold_values(base, adapters, weights, **how)
    touched = set(folded.touched)
    tensors = {name: t if name in touched else base[name] for name, t in folded.checkpoint.items()}
    found = typed(tensors, base, quantization or Quantization(), folded.touched, too_lossy)
    written = replace(folded.checkpoint, tensors={tensor.name: tensor for tensor in found.tensors})
    entries, said = with_template(found.entries, base.header, adapters)
    layout = FileLayout(found.tensors, entries, base.header.alignment, base.sources[0])
    return GGUFFolded(folded, written, layout, (*found.notes, *said))


def with_template(
    entries: Sequence[Entry], header: GGUFHeader, adapters: Sequence[Adapter]
) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """The key-values with the chat template that an adapter was trained with, in place of the base's, and notes.

    Raises:
        CheckpointError: the template does not parse.
    """
    from adapterkit.gguf.vocab import templates
    from adapterkit.gguf.vocab.sources import Sources

    for adapter in adapters:
        files = {file.name: file.bytes() for file in adapter.side_files}
        found = templates.templates(Sources(files, {}))
        if found.get(templates.DEFAULT) in (None, templates.of_header(header).get(templates.DEFAULT)):
            continue
        own = {one.key: one for one in templates.entries(found)}
        kept = [one for one in entries if not one.key.startswith(templates.TEMPLATE)]
        return (*kept, *own.values()), (f"chat template taken from {adapter.ref}",)
    return tuple(entries), ()


def fold_values(
    base: GGUFCheckpoint, adapters: Sequence[Adapter], weights: Sequence[float] | None = None, **how: Any
) -> Folded:
    """The fold in floats, before every tensor gets its type; ``how`` as for `fold`.

    Raises:
        UsageError: this is no model.
        TargetError: as for `fold_gguf`.
    """
    if base.kind != "model":
        raise UsageError(f"{base.ref} is a GGUF {base.kind}, not a model", "give the model first, then the adapter")
    if is_diffusion(base):
        return _fold_diffusion(base, adapters, weights, **how)
    names = gguf_names(base)
    pairs = [text_part(adapter) for adapter in adapters]
    adapters, left = [adapter for adapter, _ in pairs], tuple(note for _, notes in pairs for note in notes)
    tensors = {name: decoded(tensor) for name, tensor in base.items()}
    scales = scales_of(base, mapper_of_gguf(base))
    turned = {name: columns for name in tensors if (columns := names.columns_of(name)) is not None}
    own = {name: scales.times(tensors[name]) for name in scales.of}
    own |= {name: reordered(scales.times(tensors[name]), columns, undo=True) for name, columns in turned.items()}
    folded = fold(replace(base, tensors={**tensors, **own}, config=names.config), adapters, weights, names=names, **how)
    _check(base, folded, names)
    folded = replace(folded, notes=(*folded.notes, *left))
    if own:
        after = dict(folded.checkpoint.tensors)
        for name in own:
            made = reordered(after[name], turned[name]) if name in turned else after[name]
            after[name] = scales.undone(made) if name in folded.touched else tensors[name]
        folded = replace(folded, checkpoint=replace(folded.checkpoint, tensors=after))
    return folded


def _fold_diffusion(
    base: GGUFCheckpoint, adapters: Sequence[Adapter], weights: Sequence[float] | None, **how: Any
) -> Folded:
    """The fold of an image or video model, whose tensors are those of its checkpoint.

    Raises:
        TargetError: as for `fold_gguf`.
    """
    shapes = original_shapes(base)
    tensors = in_shapes({name: decoded(tensor) for name, tensor in base.items()}, shapes)
    names = diffusion_names(base, shapes)
    folded = fold(replace(base, tensors=tensors, config={}), adapters, weights, names=names, **how)
    if folded.added:
        raise TargetError(
            f"the adapter adds '{folded.added[0]}', which {base.ref} has no place for",
            "merge into the safetensors base, and convert the result with ComfyUI-GGUF's tools",
        )
    after = in_shapes(folded.checkpoint.tensors, {name: base[name].shape for name in shapes})
    return replace(folded, checkpoint=replace(folded.checkpoint, tensors=after, config=base.config))


def _check(base: GGUFCheckpoint, folded: Folded, names: GGUFNames) -> None:
    """Changes that a GGUF file has no room for."""
    road = "merge into the Hugging Face base: adapterkit merge BASE ADAPTER -o OUT.gguf"
    if folded.vocab is not None:
        old, new = folded.vocab
        raise TargetError(
            f"the adapter resizes the vocabulary from {old} to {new}, and the tokenizer in {base.ref}", road
        )
    moved = [name for name in folded.touched if names.moved(name) and names.columns_of(name) is None]
    if moved:
        raise TargetError(f"the adapter trains '{moved[0]}', which a GGUF {base.arch} stores with other values", road)
    strange = [name for name in folded.added if name != OUTPUT]
    if strange:
        raise TargetError(f"the adapter adds '{strange[0]}', which a GGUF {base.arch} has no place for", road)
    if folded.untied and names.always_tied:
        raise TargetError(
            f"the adapter changes the embedding or the output layer alone, and {base.arch} in GGUF has one for both",
            road,
        )
