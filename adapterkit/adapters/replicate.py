"""LoRA's ``layer_replication``: a deeper model made of a base's own layers, each copy with its own adapter.

PEFT shares the repeated weights in memory and folds every copy's delta onto the same tensor when it merges (its guard
against that never fires in 0.21). Here the copies become layers of their own, so that the merged model is the trained one.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.tensor import Renamed
from adapterkit.errors import AdapterError

if TYPE_CHECKING:
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Tensor

_LAYER = re.compile(r"(.*?\.?(?:layers|layer|h)\.)(\d+)(\..+)")
MAX_LAYERS = 10_000  # of the deeper model; the deepest published ones have some hundreds
_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def _pairs(ranges: Any, where: str) -> list[tuple[int, int]]:
    """The ranges as pairs of numbers.

    Raises:
        AdapterError: they are something else, or more than a model has layers.
    """
    if isinstance(ranges, list) and len(ranges) > MAX_LAYERS:
        raise AdapterError(f"{where}: 'layer_replication' has {len(ranges):,} ranges", "correct the config")
    try:
        return [(int(start), int(stop)) for start, stop in ranges]
    except (TypeError, ValueError, OverflowError):
        raise AdapterError(f"{where}: 'layer_replication' is not a list of ranges", "correct the config") from None


def replicated(base: Checkpoint, ranges: Any, where: str) -> tuple[Checkpoint, list[str]]:
    """The base with layers ``[start, stop)`` of each range one after the other, and a note.

    Raises:
        AdapterError: the ranges are not pairs of layer numbers of this base.
    """
    pairs = _pairs(ranges, where)
    found: dict[str, dict[int, list[tuple[str, str]]]] = {}
    for name in base:
        match = _LAYER.fullmatch(name)
        if match:
            found.setdefault(match[1], {}).setdefault(int(match[2]), []).append((match[3], name))
    if not found or not any(start < stop for start, stop in pairs):
        raise AdapterError(
            f"{where}: 'layer_replication' fits no layers of this base", "give the base it was trained on"
        )
    prefix, layers = max(found.items(), key=lambda item: len(item[1]))
    if any(start < stop and not (start >= 0 and stop <= max(layers) + 1) for start, stop in pairs):
        raise AdapterError(f"{where}: 'layer_replication' names layers past the base's {len(layers)}", "give its base")
    if sum(max(0, stop - start) for start, stop in pairs) > MAX_LAYERS:
        raise AdapterError(f"{where}: 'layer_replication' makes more than {MAX_LAYERS:,} layers", "correct the config")
    order = [layer for start, stop in pairs for layer in range(start, stop)]
    if any(layer not in layers for layer in order):
        raise AdapterError(f"{where}: 'layer_replication' names layers that the base lacks", "give its base")
    tensors: dict[str, Tensor] = {}
    shards: dict[str, str] = {}
    repeated = {name for group in layers.values() for _, name in group}
    for name, tensor in base.items():
        if name not in repeated:
            tensors[name], shards[name] = tensor, base.shards[name]
    for new, old in enumerate(order):
        for rest, name in layers[old]:
            copy = f"{prefix}{new}{rest}"
            tensors[copy] = base[name] if copy == name else Renamed(copy, base[name])
            shards[copy] = base.shards[name]
    config = dict(base.config)
    for key in _DEPTH:
        if key in config:
            config[key] = len(order)
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = [config["layer_types"][old] for old in order]
    note = f"layers repeated as the adapter was trained: {len(layers)} became {len(order)}"
    return replace(base, tensors=tensors, shards=shards, config=config), [note]
