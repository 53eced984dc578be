"""Which way the experts lie in a stacked ``lora_B`` ``[b, r*experts]``.

PEFT, and every reader but one, has the expert ``fastest``: column j belongs to expert ``j % experts``. Unsloth's own
forward read it ``slowest`` (column j belongs to expert ``j // r``) until unsloth-zoo#1269 (2026-09-17), so adapters that it
trained before mean something else by the same file. Since unsloth-zoo#1232 its configs say which they are; of older ones
only the user knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.errors import AdapterError, UsageError, option

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.config import AdapterConfig

FASTEST, SLOWEST = "fastest", "slowest"
ORDERS = (FASTEST, SLOWEST)
LAYOUT, DETAIL = "lora_B_layout", "unsloth_fused_expert_lora"
FIELDS = frozenset({LAYOUT, DETAIL})
_WORDS = {"rank_major": FASTEST, "grouped_by_expert": SLOWEST}
_UNSAID = "its stacked experts are read in PEFT's order; if Unsloth trained it before 2026-09-17, merge with "


def stated_order(config: AdapterConfig, leaf: str = "") -> str | None:
    """The order that a config states, for one parameter where it states them apart; None where it does not.

    Raises:
        AdapterError: it states one that is not known.
    """
    parameters = config.mapping(DETAIL).get("parameters")
    own = parameters.get(leaf) if isinstance(parameters, Mapping) else None
    said = own.get(LAYOUT) if isinstance(own, Mapping) else None
    said = config.get(LAYOUT) if said is None else said
    if said is None:
        return None
    if said not in _WORDS:
        known = ", ".join(_WORDS)
        raise AdapterError(f"{config.where}: '{LAYOUT}' is {said!r}; known are {known}", "correct the config")
    return _WORDS[said]


def in_order(adapter: Adapter, order: str | None) -> Adapter:
    """The adapter with the order that the user gave, unless its config states one.

    Raises:
        UsageError: no such order.
    """
    if order is not None and order not in ORDERS:
        raise UsageError(f"'{order}' is no order of experts", f"use {' or '.join(ORDERS)}")
    if order is None or not adapter.config.names("target_parameters") or stated_order(adapter.config) is not None:
        return adapter
    word = next(word for word, meaning in _WORDS.items() if meaning == order)
    config = replace(adapter.config, raw={**adapter.config.raw, LAYOUT: word})
    return replace(adapter, config=config, notes=tuple(note for note in adapter.notes if not note.startswith(_UNSAID)))


def order_notes(config: AdapterConfig) -> tuple[str, ...]:
    """What to tell about an adapter that Unsloth may have trained in its own order."""
    if not config.names("target_parameters") or not str(config.base or "").startswith("unsloth/"):
        return ()
    return () if stated_order(config) is not None else (f"{_UNSAID}{option('expert_order', 'slowest')}",)
