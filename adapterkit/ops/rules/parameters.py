"""Parameters that several methods share: one meaning, one range, one help text."""

from __future__ import annotations

from typing import Annotated, Literal

from adapterkit.ops.rules.registry import PerAdapter, Range

Density = Annotated[float, Range(0, 1, open_low=True), PerAdapter, "share of entries kept"]
Share = Annotated[float, Range(0, 1, open_low=True), "share of entries kept"]
Election = Annotated[
    Literal["total", "frequency"], "elect each sign by the sum of the entries, or by the number of adapters"
]
Normalize = Annotated[
    Literal["weights", "count", "none"],
    "divide by the weights of the adapters that have a part in an entry, by their number, or not at all",
]
Own = Annotated[bool, "elect signs on the adapters' own deltas, before their weights, as PEFT does"]
Seed = Annotated[int, Range(0, 2**63 - 1), "seed of the random mask; the same seed gives the same mask"]
Rank = Annotated[int | None, Range(1), "rank of the result; the largest rank of the adapters when left out"]
Rule = Annotated[
    Literal[
        "linear",
        "ties",
        "dare",
        "dare-ties",
        "magnitude-prune",
        "della",
        "ties-peft",
        "breadcrumbs",
        "breadcrumbs-ties",
        "slerp",
        "nuslerp",
        "multislerp",
        "karcher",
        "sce",
        "tsv",
        "iso-c",
        "iso-cts",
    ],
    "method that combines the aligned adapters; its own parameters are taken too",
]
