"""From a Hugging Face checkpoint to the mmproj file of its tower: names, index maps, types and metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterkit.errors import TargetError, UsageError, counted, option
from adapterkit.gguf.arch.hyper import hyper_entries, hyperparameters
from adapterkit.gguf.arch.mapping import Mapped, Mapper
from adapterkit.gguf.arch.model import file_type_entries, floats_of, kind_in_file, own_type
from adapterkit.gguf.arch.views import gathered
from adapterkit.gguf.from_hf import through_types
from adapterkit.gguf.general import general, size_label
from adapterkit.gguf.metadata import text
from adapterkit.gguf.plan import FileLayout
from adapterkit.gguf.quantize import Quantization, TypeInputs, typed_from
from adapterkit.gguf.towers.rows import CLIP, TowerConfig, tower_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.fidelity import Through
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.dtypes import DType

# Weights that are float32 in every file but one of float16, and those that are always float16: llama.cpp computes its
# convolutions with these. Source: tensor_force_quant of the converter's MmprojModel and its subclasses.
WIDE = (".patch_embd.weight", ".patch_merger.weight")
HALF = ("a.conv1d.1.weight", "a.conv1d.2.weight", "mm.input_projection.weight")


@dataclass(frozen=True)
class FromTower:
    """What an mmproj output is made of.

    Attributes:
        mapped: which stored tensor went where.
        unused: tensors of the tower that nothing is computed with, such as SigLIP's pooling head in Gemma 3.
        layout: the file.
        types: how many tensors have each type.
        through: what a type does to rows of a changed tensor; see `FromHF`.
    """

    mapped: Mapped
    unused: frozenset[str]
    layout: FileLayout
    types: dict[str, int]
    notes: tuple[str, ...]
    through: Callable[[str, tuple[int, ...]], Through | None]

    @property
    def held(self) -> frozenset[str]:
        """The stored tensors that are this file's business, not the language model's."""
        return frozenset(self.mapped.sources) | self.unused

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {tensor.name: tensor for tensor in self.layout.tensors}


def _mapper(base: Checkpoint, config: Mapping[str, Any], files: Mapping[str, bytes]) -> Mapper:
    tower = tower_of(config, base.ref)
    read = TowerConfig(config, tower.kind, base.ref, files)
    return Mapper(tower.row(read), read)


def from_tower(
    view: Checkpoint,
    *,
    base: Checkpoint,
    config: Mapping[str, Any],
    adapters: Sequence[Adapter] = (),
    touched: Sequence[str] = (),
    files: Mapping[str, bytes] | None = None,
    asked: Quantization | None = None,
    dtype: DType | None = None,
) -> FromTower:
    """Plan the mmproj file of a view of a checkpoint; nothing is read but headers and small files beside it.

    Args:
        view: its tensors, with adapters folded in or not.
        base, config, adapters, files: as for `as_gguf`.
        touched: the tensors that adapters changed; those of the language model are none of its business.
        asked: the types; by default those of the checkpoint.
        dtype: the float type of a file that is not quantized.

    Raises:
        TargetError: a model or a tensor of its tower that the table does not know.
        CheckpointError: a config, a preprocessor or tensors that are incomplete.
        UsageError: types that cannot be had.
    """
    asked = asked or Quantization()
    if dtype is not None and asked.mix is not None:
        raise UsageError(f"{option('dtype')} and {option('quant')} both say the type of the output", "give one of them")
    mapper = _mapper(base, config, files or {})
    mapped = mapper.to_gguf(view.shapes, base.ref)
    if not mapped.arrays:
        raise TargetError(f"{base.ref}: no tensor of it is part of a tower", "give the whole model")
    wide = floats_of(view)
    tensors: dict[str, Tensor] = {name: gathered(name, array, wide) for name, array in mapped.arrays.items()}
    values = hyperparameters(mapper.spec, mapper.config)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    own = dtype.code if dtype is not None else own_type(view, mapped)
    entries = [
        text("general.type", "mmproj") if entry.key == "general.type" else entry
        for entry in general(base, adapters, files or {}, size_label(shapes, 0), CLIP)
    ]
    entries += hyper_entries(CLIP, values)
    if asked.mix is None:
        entries += file_type_entries(own)
    layers = int(values.get("vision.block_count", values.get("audio.block_count", 0)))
    heads = values.get("vision.attention.head_count", values.get("audio.attention.head_count", 0))
    hparams = {"n_layer": layers, "n_expert": 0, "n_head": heads, "n_head_kv": heads}
    kinds = {name: kind_of_tower(name, shape, own) for name, shape in shapes.items()}
    changed = tuple(dict.fromkeys(one for name in touched for one in mapped.sources.get(name, ())))
    found = typed_from(tensors, TypeInputs(CLIP, hparams, kinds, tuple(entries)), asked, changed)
    layout = FileLayout(found.tensors, found.entries)
    types = {tensor.name: tensor.dtype.code for tensor in found.tensors}
    # The first of a row's drops is what is no part of the tower.
    unused = frozenset(name for name in mapped.dropped if not re.search(mapper.spec.drops[0], mapper.canonical(name)))
    idle = sorted(unused & set(touched))
    notes = (
        [f"adapters change {counted(len(idle), 'tensor')}, as '{idle[0]}', that the tower is not computed with"]
        if idle
        else []
    )
    return FromTower(
        mapped, unused, layout, found.types, (*found.notes, *notes), partial(through_types, mapped.sources, types, None)
    )


def kind_of_tower(name: str, shape: Sequence[int], plain: str) -> str:
    """The type of a tensor in a file of floats."""
    if name in HALF:
        return "F16"
    if name.endswith(WIDE) and plain != "F16":
        return "F32"
    return kind_in_file(name, shape, plain)
