"""Which files of an input a step reads, by their names."""

from __future__ import annotations

import re

from adapterkit.checkpoint.folder import ADAPTER_CONFIG, read_index, side_names, weight_names
from adapterkit.checkpoint.listing import Listing

_PART = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf")
_MOST_PARTS = 4096


def names_beside(name: str, *, adapter: bool) -> list[str]:
    """What may be read beside a file: the config of a model or an adapter, the other parts of a split GGUF."""
    part = _PART.fullmatch(name)
    if part is not None:
        first, count = part[1], part[2]
        return [f"{first}-{number:05}-of-{count}.gguf" for number in range(1, min(int(count), _MOST_PARTS) + 1)]
    return [ADAPTER_CONFIG if adapter else "config.json"] if name.endswith(".safetensors") else []


def names_read(listing: Listing) -> set[str]:
    """The files of a folder that a step reads, by their names."""
    loose = {name for name in listing.names if name.endswith(".safetensors") and "/" not in name}
    weights = loose
    if ADAPTER_CONFIG not in listing.names:
        single, index = weight_names(listing.names)
        weights = {single} if single in loose else loose
        if single not in loose and index in listing.names:
            weights = {index, *read_index(listing, index).values()} & listing.names
    return {*weights, *side_names(listing.names, weights), *({ADAPTER_CONFIG} & listing.names)}
