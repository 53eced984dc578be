"""A GGUF model without some of its layers, as ``llama-quantize --prune-layers`` writes it.

llama-quantize renames the tensors and sets ``block_count``. Arrays of a value per layer lose those of the layers here too;
where the runtime tells layers apart by their place, the layers that stay would become others, so that is refused.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.errors import TargetError, UsageError, option
from adapterkit.gguf.metadata import Entry, array, u32
from adapterkit.gguf.reader import ARRAY
from adapterkit.gguf.tensors import stored

if TYPE_CHECKING:
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.gguf.checkpoint import GGUFCheckpoint

_LAYER = re.compile(r"blk\.(\d+)\.(.+)", re.DOTALL)
# Architectures of which llama.cpp computes a layer, or all of them, by its place or by how many there are.
# Source: src/models of llama.cpp.
_BY_PLACE = frozenset(
    ("smollm3", "llama4", "gemma2", "gemma3", "gemma3n", "gemma4", "command-r", "baichuan", "exaone4", "grovemoe")
)
# Keys whose layers are counted from the first.
_COUNTED = (
    *("attention.sliding_window", "leading_dense_block_count", "interleave_moe_layer_step", "nextn_predict_layers"),
    *("n_deepstack_layers", "attention.shared_kv_layers", "moe_every_n_layers", "full_attention_interval"),
)
# Architectures whose windows lie where a list of a value per layer says, and nothing else goes by place.
_LISTED = frozenset(("mellum", "mimo2", "granite_swa"))
_NOT_BY_LAYER = ("rope.dimension_sections", "classifier.output_labels")
_BESIDE = "xielu."  # keys of a value per layer that have no architecture in front


def layers_of(said: str) -> frozenset[int]:
    """Numbers of layers, written like ``3,5-8``.

    Raises:
        UsageError: not of that form.
    """
    found: set[int] = set()
    for part in said.split(","):
        ends = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if ends is None or int(ends[2] or ends[1]) < int(ends[1]):
            raise UsageError(f"{option('prune_layers', said[:60])} is no list of layers", "write it like 3,5-8")
        found.update(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return frozenset(found)


def pruned(base: GGUFCheckpoint, layers: frozenset[int]) -> tuple[GGUFCheckpoint, list[Entry]]:
    """The model without these layers, and the key-values that are others then.

    Raises:
        UsageError: it has no such layer, or no other.
        TargetError: its layers differ by their place.
    """
    count = base.number("block_count")
    strange = sorted(one for one in layers if one >= count)
    if strange or len(layers) >= count:
        said = f"has no layer {strange[0]}" if strange else "would have none left"
        raise UsageError(f"{base.ref} has {count} layers and {said}", f"name some of 0 to {count - 1}")
    _check_alike(base, count)
    new = {old: number for number, old in enumerate(one for one in range(count) if one not in layers)}
    tensors: dict[str, Tensor] = {}
    for source, header in zip(base.sources, base.headers, strict=True):
        for info in header.tensors.values():
            found = _LAYER.fullmatch(info.name)
            if found is None:
                tensors[info.name] = stored(info, source)
            elif int(found[1]) in new:
                name = f"blk.{new[int(found[1])]}.{found[2]}"
                tensors[name] = stored(replace(info, name=name), source)
    entries = [u32(f"{base.arch}.block_count", len(new))]
    for key, entry in base.header.keys.items():
        own = key.startswith((f"{base.arch}.", _BESIDE)) and not key.endswith(_NOT_BY_LAYER)
        if own and entry.type == ARRAY and entry.count == count:
            assert entry.item_type is not None
            entries.append(array(key, entry.item_type, [base.header[key][one] for one in new]))
    return replace(base, tensors=tensors), entries


def _check_alike(base: GGUFCheckpoint, count: int) -> None:
    """Refuse a model of layers that are not interchangeable."""
    key = next((one for one in _COUNTED if base.number(one)), None)
    patterned = isinstance(base.header.get(f"{base.arch}.attention.sliding_window_pattern"), list)
    if key == _COUNTED[0] and patterned and base.arch in _LISTED:
        key = None
    if base.arch in _BY_PLACE or key is not None:
        why = f"'{base.arch}.{key}'" if key is not None else f"a {base.arch}"
        raise TargetError(
            f"{base.ref}: llama.cpp tells the layers of {why} apart by their place, so without some the others would be "
            "computed otherwise",
            f"leave out {option('prune_layers')}",
        )
    kinds = [set[tuple[str, tuple[int, ...]]]() for _ in range(count)]
    for name, tensor in base.items():
        found = _LAYER.fullmatch(name)
        if found is not None and int(found[1]) < count:
            kinds[int(found[1])].add((found[2], tuple(tensor.shape)))
    other = next((number for number, one in enumerate(kinds) if one != kinds[0]), None)
    if other is not None:
        raise TargetError(
            f"{base.ref}: its layers 0 and {other} hold other tensors, and llama.cpp expects each kind at its place",
            f"leave out {option('prune_layers')}",
        )
