"""From a Hugging Face checkpoint to a GGUF file: names, index maps, types and metadata, as one view."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterkit.errors import UsageError, counted, option
from adapterkit.gguf.arch.model import Model, as_gguf, file_type_entries, vocabulary, widened
from adapterkit.gguf.arch.mxfp4 import KIND, Repacked, on_mxfp4
from adapterkit.gguf.filetypes import file_type
from adapterkit.gguf.grids import on_four_bits
from adapterkit.gguf.plan import FileLayout
from adapterkit.gguf.quantize import GRID_BITS, Quantization, TypeInputs, typed_from
from adapterkit.gguf.tensors import bits_per_weight, importance_of, round_trip
from adapterkit.gguf.towers.rows import has_tower
from adapterkit.gguf.types import TYPES

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.fidelity import Importance, Through
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.dtypes import DType
    from adapterkit.gguf.arch.mapping import Mapped


@dataclass(frozen=True)
class FromHF:
    """What a GGUF output of a Hugging Face checkpoint is made of.

    Attributes:
        model: its tensors and metadata before types were chosen.
        layout: the file.
        folded: the checkpoint that is read, its merged tensors not rounded.
        types: how many tensors have each type.
        through: what a type does to rows of a changed tensor; see `adapterkit.verbs.outputs.Output`.
        importance: how strongly inputs use each column of one, where an importance matrix says it.
    """

    model: Model
    layout: FileLayout
    folded: Checkpoint
    types: dict[str, int]
    notes: tuple[str, ...]
    through: Callable[[str, tuple[int, ...]], Through | None]
    importance: Importance

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {tensor.name: tensor for tensor in self.layout.tensors}


def from_hf(
    view: Checkpoint,
    *,
    base: Checkpoint,
    config: Mapping[str, Any],
    adapters: Sequence[Adapter] = (),
    touched: Sequence[str] = (),
    files: Mapping[str, bytes] | None = None,
    asked: Quantization | None = None,
    dtype: DType | None = None,
    pre: str | None = None,
    too_lossy: frozenset[str] | None = None,
    approximate: Collection[str] = (),
    elsewhere: Collection[str] = (),
    as_reranker: bool = False,
) -> FromHF:
    """Plan a GGUF file of a view of a Hugging Face checkpoint; nothing is read but headers and the tokenizer.

    Args:
        view, base, config, adapters, touched, files: see `as_gguf`.
        asked: the types; by default those of the checkpoint.
        dtype: the float type of a file that is not quantized.
        pre: the name of the pre-tokenizer, where it is not to be recognised.
        too_lossy: the changed tensors, by the checkpoint's names, that alone are kept wider.
        approximate: see `as_gguf`.
        elsewhere: tensors that the mmproj file beside it holds.
        as_reranker: see `as_gguf`.

    Raises:
        TargetError, CheckpointError: see `as_gguf` and `read_vocab`.
        UsageError: types that cannot be had.
    """
    asked = asked or Quantization()
    if dtype is not None and asked.mix is not None:
        raise UsageError(f"{option('dtype')} and {option('quant')} both say the type of the output", "give one of them")
    view = widened(view)
    model = as_gguf(
        view,
        base=base,
        config=config,
        adapters=adapters,
        touched=touched,
        files=files,
        plain=None if dtype is None else dtype.code,
        approximate=approximate,
        elsewhere=elsewhere,
        as_reranker=as_reranker,
    )
    tokens, notes = vocabulary(model, files or {}, config, pre)
    changed = tuple(dict.fromkeys(one for name in touched for one in model.mapped.sources.get(name, ())))
    entries = (*model.entries, *tokens)
    if asked.mix is None:
        entries = (*model.entries, *file_type_entries(model.file_type), *tokens)
    asked, now, kept = _packed(model, asked, touched, view)
    if model.config.has_vision and model.mapped.dropped and not elsewhere:
        count = len(model.mapped.dropped)
        made = f"{option('mmproj', 'auto')} makes beside it"
        where = made if has_tower(config) else "is published beside the base (none is made of this class)"
        others = counted(count, "other tensor belongs", "other tensors belong")
        kept.append(f"the text part alone: {others} in an mmproj file, which {where}")
    wider = None
    if too_lossy is not None:
        wider = frozenset(one for name in too_lossy for one in model.mapped.sources.get(name, ()))
    origin = TypeInputs(model.spec.arch, model.hparams, now, entries, wider)
    found = typed_from(model.tensors, origin, asked, changed)
    layout = FileLayout(found.tensors, found.entries)
    kinds = {tensor.name: tensor.dtype.code for tensor in found.tensors}
    if too_lossy is None:
        kept += _again(base, model, touched, kinds, yes_lossy=asked.yes_lossy)
    importance = partial(_importance, model.mapped, {tensor.name: tensor for tensor in found.tensors})
    through = partial(through_types, model.mapped.sources, kinds, importance)
    return FromHF(model, layout, view, found.types, (*model.notes, *notes, *kept, *found.notes), through, importance)


def _importance(
    mapped: Mapped, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]
) -> torch.Tensor | None:
    """How strongly inputs use the columns of a checkpoint's tensor, where they lie in GGUF as in the checkpoint."""
    for one in mapped.sources.get(name, ()):
        boxes = [box for box in mapped.arrays[one].boxes if box.tensor == name] if one in tensors else []
        if boxes and all(not b.turned and b.columns.is_plain and b.columns.count == shape[-1] for b in boxes):
            return importance_of(tensors[one], shape)
    return None


def _again(
    base: Checkpoint, model: Model, touched: Sequence[str], kinds: Mapping[str, str], *, yes_lossy: bool
) -> list[str]:
    """Refuse, or with ``yes_lossy`` say, that a change is written in few bits onto values that were in few bits before."""

    def coarse(name: str) -> bool:
        became = model.mapped.sources.get(name, ())
        return any(kinds[one] in TYPES and bits_per_weight(TYPES[kinds[one]]) < GRID_BITS for one in became)

    lost = [name for name in touched if name in base and coarse(name) and on_four_bits(base[name])]
    if not lost:
        return []
    some = counted(len(lost), "tensor that the adapter changes holds", "tensors that the adapter changes hold")
    what = f"{some} values of a 4-bit grid, as '{lost[0]}'"
    if yes_lossy:
        return [f"{what}; written on a coarse grid again, much of the change is rounded away"]
    raise UsageError(
        f"{what}; written on a coarse grid again most of the change would be rounded away",
        f"merge into the 16-bit original, or add {option('keep_touched', 'Q8_0')}, or "
        f"{option('yes_lossy', True)} to do it all the same",
    )


def _packed(
    model: Model, asked: Quantization, touched: Sequence[str], view: Checkpoint
) -> tuple[Quantization, dict[str, str], list[str]]:
    """MXFP4 weights of the base: they stay as they are in a coarse mix, and changed ones do not go back onto their grid."""
    now, notes = dict(model.kinds), []
    held = [name for name, tensor in model.tensors.items() if isinstance(tensor, Repacked)]
    if asked.mix is not None and held:
        default = TYPES[file_type(asked.mix)[1].default]
        if default.name != KIND.name and bits_per_weight(default) < GRID_BITS:
            pattern = "^(" + "|".join(map(re.escape, held)) + ")$"
            asked = replace(asked, tensor_types=(*asked.tensor_types, (pattern, KIND.name)))
            notes.append(
                f"{counted(len(held), 'tensor stays', 'tensors stay')} {KIND.name}, as the checkpoint has them"
            )
    if asked.mix is not None and file_type(asked.mix)[1].default == KIND.name:
        for name in touched:
            if on_mxfp4(view[name]):
                now |= dict.fromkeys(model.mapped.sources.get(name, ()), KIND.name)
    return asked, now, notes


def through_types(
    sources: Mapping[str, tuple[str, ...]],
    kinds: Mapping[str, str],
    importance: Importance | None,
    name: str,
    shape: tuple[int, ...],
) -> Through | None:
    """Rows of a checkpoint's tensor through the type of what it becomes: a row keeps its values under an index map."""
    became = next((kinds[one] for one in sources.get(name, ()) if one in kinds), None)
    if became is None or len(shape) < 2:
        return None
    columns, by = shape[-1], None if importance is None else importance(name, shape)

    def through(rows: torch.Tensor) -> torch.Tensor:
        return round_trip(TYPES[became], rows.reshape(-1, columns), by).view(rows.shape)

    return through
