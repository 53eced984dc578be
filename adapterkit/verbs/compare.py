"""`compare`: will these adapters fight? Pairwise directions, subspaces and signs, per layer and in total."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.checkpoint.plan import default_jobs
from adapterkit.errors import UsageError
from adapterkit.ops.threads import FEW
from adapterkit.verbs.family import Family, open_family
from adapterkit.verbs.ordered import in_order

if TYPE_CHECKING:
    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.factors import Slot
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.ops.rows import DeltaRows

Ref = str | Path

_LEADING = 16  # directions looked at of a delta that has no low rank


@dataclass(frozen=True)
class Pair:
    """Two adapters on one layer, or over all layers.

    Attributes:
        one, other: their places in the list of adapters.
        cosine: between their deltas as vectors: 1 the same direction, 0 unrelated, -1 opposed.
        output_overlap, input_overlap: how far they write to, and read from, the same directions, 0 to 1
            (arXiv:2106.09685, equation 4). Over all layers: the mean, layers weighted by the product of the two norms.
        expected_output, expected_input: what unrelated deltas of these ranks have on average.
        sign_conflict: the share of entries with opposite signs; 0.5 is unrelated. Over all layers: of all entries.
    """

    one: int
    other: int
    cosine: float
    output_overlap: float
    input_overlap: float
    sign_conflict: float
    expected_output: float = 0.0
    expected_input: float = 0.0


@dataclass(frozen=True)
class LayerComparison:
    """One layer: the norm of each adapter's delta (0 where it has none) and the pairs that both act on it."""

    module: str
    norms: tuple[float, ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class CompareReport:
    """Adapters held against each other.

    Attributes:
        norms: of each adapter over all layers.
        shared: layers that at least two adapters act on.
        total: every pair over all layers; pairs without a common layer have cosine and overlaps of 0.
        layers: every layer.
    """

    adapters: tuple[str, ...]
    norms: tuple[float, ...]
    shared: int
    total: tuple[Pair, ...]
    layers: tuple[LayerComparison, ...]
    notes: tuple[str, ...] = ()


def compare(
    adapters: Sequence[Ref | Adapter] | Family,
    *,
    base: Ref | Checkpoint | None = None,
    samples: int | None = 65536,
    jobs: int | None = None,
    allow_unknown: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CompareReport:
    """Compare two or more adapters of one base.

    Args:
        adapters: PEFT folders or Hub ids, open adapters, or what `open_family` made of them.
        base: their base, for methods whose change depends on the weights; those are compared by their rows, and their
            overlaps by their 16 leading directions.
        samples: entries drawn per layer for the sign conflict; None looks at all of them.
        jobs: worker threads.
        allow_unknown: go on where a config has fields that are not known here.
        progress: called now and then with bytes done and bytes in all.

    Raises:
        UsageError: fewer than two adapters, or the base is needed.
        TargetError: adapters of different bases.
        NotFound, AdapterError, UnsafeError, AuthError, HubError
    """
    family = adapters if isinstance(adapters, Family) else open_family(adapters, base, allow_unknown=allow_unknown)
    count = len(family.adapters)
    if count < 2:
        raise UsageError("one adapter alone cannot be compared", "name at least two")

    def work(slot: Slot) -> list[LayerComparison]:
        users, experts = family.load(slot.parameter)
        return [
            _layer(f"{slot.parameter}.{index}" if slot.count > 1 else slot.parameter, users, parts, count, samples)
            for index, parts in enumerate(experts)
        ]

    slots = list(family.slots.values())
    sizes = [sum(delta.change.reads for _, delta in family.deltas(slot.parameter)) for slot in slots]
    layers: list[LayerComparison] = []
    entries: list[int] = []
    for slot, found in zip(slots, in_order(work, slots, jobs or default_jobs(), sizes, progress, FEW), strict=True):
        layers += found
        entries += [slot.shape[0] * slot.shape[1]] * len(found)
    norms = tuple(sum(layer.norms[i] ** 2 for layer in layers) ** 0.5 for i in range(count))
    total = tuple(_total(i, j, layers, entries, norms) for i, j in combinations(range(count), 2))
    shared = sum(1 for layer in layers if layer.pairs)
    return CompareReport(
        tuple(adapter.ref for adapter in family.adapters), norms, shared, total, tuple(layers), family.notes
    )


def _layer(
    module: str, users: tuple[int, ...], parts: Sequence[DeltaRows], count: int, samples: int | None
) -> LayerComparison:
    from adapterkit.ops.extract import low_rank
    from adapterkit.ops.lowrank import Factors, numerical_rank, spectrum
    from adapterkit.ops.measure import cosine, norm, overlap, sign_conflict

    # Leading directions stand for what has no low rank; norms, cosines and signs are those of all its rows.
    factors = [part if isinstance(part, Factors) else low_rank(part, rank=_LEADING).factors for part in parts]
    exact = all(isinstance(part, Factors) for part in parts)
    sizes = [norm(one) if one is part else _dot(part, part) ** 0.5 for one, part in zip(factors, parts, strict=True)]
    ranks = [numerical_rank(spectrum(one)) for one in factors]
    m, n = parts[0].shape
    norms = [0.0] * count
    for user, size in zip(users, sizes, strict=True):
        norms[user] = size
    pairs = []
    for i, j in combinations(range(len(parts)), 2):
        if not sizes[i] or not sizes[j]:
            continue
        x, y = factors[i], factors[j]
        larger = max(ranks[i], ranks[j])
        pairs.append(
            Pair(
                users[i],
                users[j],
                cosine(x, y) if exact else _dot(parts[i], parts[j]) / (sizes[i] * sizes[j]),
                overlap(x, y, "output"),
                overlap(x, y, "input"),
                sign_conflict(x, y, samples) if exact else sign_conflict(parts[i], parts[j]),
                larger / m,
                larger / n,
            )
        )
    return LayerComparison(module, tuple(norms), tuple(pairs))


def _dot(x: DeltaRows, y: DeltaRows) -> float:
    from adapterkit.ops.rows import blocks

    return sum(float((x.rows(a, b).double() * y.rows(a, b).double()).sum()) for a, b in blocks(x.shape))


def _total(i: int, j: int, layers: Sequence[LayerComparison], entries: Sequence[int], norms: Sequence[float]) -> Pair:
    both = [
        (pair, layer.norms[i] * layer.norms[j], size)
        for layer, size in zip(layers, entries, strict=True)
        for pair in layer.pairs
        if (pair.one, pair.other) == (i, j)
    ]
    weight, size = sum(w for _, w, _ in both), sum(s for _, _, s in both)
    if not weight:
        return Pair(i, j, 0.0, 0.0, 0.0, 0.0)

    def mean(name: str) -> float:
        return float(sum(getattr(pair, name) * w for pair, w, _ in both)) / weight

    return Pair(
        i,
        j,
        sum(pair.cosine * w for pair, w, _ in both) / (norms[i] * norms[j]),
        mean("output_overlap"),
        mean("input_overlap"),
        sum(pair.sign_conflict * s for pair, _, s in both) / size,
        mean("expected_output"),
        mean("expected_input"),
    )
