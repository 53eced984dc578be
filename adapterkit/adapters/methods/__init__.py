"""The table of methods, by ``peft_type``."""

from __future__ import annotations

from adapterkit.adapters.method import Method
from adapterkit.adapters.methods import (
    adalora,
    blocks,
    decomposed,
    lora,
    lowrank,
    lycoris,
    pooled,
    rotations,
    sparse,
    spectral,
    tokens,
    unmergeable,
    vectors,
    vera,
)

_FAMILIES = (
    lora,
    adalora,
    vera,
    vectors,
    lycoris,
    rotations,
    blocks,
    lowrank,
    spectral,
    sparse,
    decomposed,
    pooled,
    tokens,
)

METHODS: dict[str, Method] = {method.peft_type: method for family in _FAMILIES for method in family.METHODS}
UNMERGEABLE = unmergeable.REASONS
