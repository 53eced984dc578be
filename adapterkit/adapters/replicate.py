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
_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def replicated(base: Checkpoint, ranges: Any, where: str) -> tuple[Checkpoint, list[str]]:
    """The base with layers ``[start, stop)`` of each range one after the other, and a note.

    Raises:
        AdapterError: the ranges are not pairs of layer numbers of this base.
    """
    try:
        order = [layer for start, stop in ranges for layer in range(int(start), int(stop))]
    except (TypeError, ValueError):
        raise AdapterError(f"{where}: 'layer_replication' is not a list of ranges", "correct the config") from None
    found: dict[str, dict[int, list[tuple[str, str]]]] = {}
    for name in base:
        match = _LAYER.fullmatch(name)
        if match:
            found.setdefault(match[1], {}).setdefault(int(match[2]), []).append((match[3], name))
    if not found or not order:
        raise AdapterError(
            f"{where}: 'layer_replication' fits no layers of this base", "give the base it was trained on"
        )
    prefix, layers = max(found.items(), key=lambda item: len(item[1]))
    if any(layer not in layers for layer in order):
        raise AdapterError(f"{where}: 'layer_replication' names layers past the base's {len(layers)}", "give its base")
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
