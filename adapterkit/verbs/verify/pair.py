"""MERGED together with the residual that stands beside it: what of the change the two hold."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.merged import Merged
from adapterkit.errors import UsageError, option
from adapterkit.ops.threads import SMALL, one_thread
from adapterkit.verbs.ordered import in_order
from adapterkit.verbs.residual_of import residual_path
from adapterkit.verbs.verify.report import ERROR, NOTE, WARNING, Finding, TensorCheck

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.ops.fidelity import FidelitySums
    from adapterkit.registry.record import Record
    from adapterkit.verbs.verify.report import TensorLevel
    from adapterkit.verbs.verify.subject import Item, Subject

_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
# Rounding of the factors to 16 bits may add so much to an error that is nothing.
SLACK = 1.01
FLOOR = 1e-3  # of the change


def stated_residual(record: Record | None, where: Path | None) -> tuple[Path | None, tuple[Finding, ...]]:
    """The residual that the record beside MERGED speaks of, and a finding where it is not there."""
    rank = None if record is None or record.operation is None else record.operation.parameters.get("residual")
    if rank is None:
        return None, ()
    if where is None:  # in a store, or on the Hub
        text = f"MERGED was written with a residual of rank {rank} beside it: the figures are of MERGED alone"
        return None, (Finding("no residual", WARNING, text, f"name it with {option('residual')}"),)
    path = residual_path(where.with_name(_PART.sub(".gguf", where.name)))
    assert isinstance(path, Path)
    if path.exists():
        return path, ()
    text = (
        f"MERGED was written with a residual of rank {rank} beside it, and {path.name} is not there: the figures are of "
        "MERGED alone"
    )
    return None, (Finding("no residual", WARNING, text, f"name it with {option('residual')}"),)


def together(
    subject: Subject,
    alone: TensorLevel,
    residual: Adapter,
    *,
    jobs: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TensorLevel, tuple[Finding, ...]]:
    """The figures of MERGED + residual beside base + adapters, and what is wrong with the residual.

    Args:
        alone: the figures of MERGED.
        residual: as opened.

    Raises:
        TargetError, AdapterError: it does not fit MERGED.
    """
    from adapterkit.ops.fidelity import FidelitySums

    started = time.monotonic()
    pair, named = _sum(subject, residual)
    items = [item for item in subject.items if item.touched or item.name in named]

    def work(item: Item) -> tuple[Item, FidelitySums, float]:
        return (item, *_measured(item, pair[item.name]))

    rows, total, apart, without = [], FidelitySums(), [], []
    sizes = [item.floats.nbytes for item in items]
    for item, sums, off in in_order(work, items, jobs, sizes, progress, SMALL):
        if item.touched:
            total += sums
            rows.append(_row(item, sums))
        # What was cut of rounding's loss is never more than that loss.
        if item.name in named and sums.ee**0.5 > SLACK * off**0.5 + FLOOR * sums.dd**0.5:
            apart.append(item.name)
        elif item.touched and item.name not in named and item.format is not None and off:
            without.append(item.name)
    found: list[Finding] = []
    if apart:
        more = f" and {len(apart) - 1} more" if len(apart) > 1 else ""
        text = (
            f"{residual.ref} takes MERGED further from what was trained, in {apart[0]}{more}: it is of another output"
        )
        found.append(Finding("other residual", ERROR, text, "give the one that was written beside it", tuple(apart)))
    if without:
        more = f" and {len(without) - 1} more" if len(without) > 1 else ""
        text = f"{without[0]}{more} lost something to rounding and has no part in the residual"
        found.append(Finding("no residual", NOTE, text, tensors=tuple(without)))
    figures: dict[str, Any] = {
        name: getattr(total, name) for name in ("retention", "cosine", "relative", "unmoved", "error")
    }
    return replace(alone, tensors=tuple(rows), seconds=time.monotonic() - started, **figures), tuple(found)


def _sum(subject: Subject, residual: Adapter) -> tuple[Mapping[str, Tensor], frozenset[str]]:
    """MERGED with the residual folded in, by the names of the items, and the names that it acts on."""
    from adapterkit.gguf.checkpoint import GGUFCheckpoint

    if isinstance(subject.found, GGUFCheckpoint):
        from adapterkit.gguf.fold import fold_values

        made = fold_values(subject.found, [residual])
    else:
        from adapterkit.adapters.fold import fold

        floats: Checkpoint = subject.folded.checkpoint
        values = {item.name: item.values for item in subject.items}
        made = fold(replace(floats, tensors={**floats.tensors, **values}), [residual])
    lost = [name for name in made.added if name not in subject.folded.added]
    if lost:
        raise UsageError(f"{residual.ref} adds '{lost[0]}' to MERGED", "a residual has factors alone: give that")
    return made.checkpoint.tensors, frozenset(made.touched)


def _measured(item: Item, pair: Tensor) -> tuple[FidelitySums, float]:
    """Sums of a weight with its residual, and <E, E> of MERGED alone."""
    from adapterkit.ops.fidelity import FidelitySums, block_sums

    sums, off = FidelitySums(), 0.0
    if item.merged is not None:
        item.merged.watch = None  # it tells of blocks that nobody takes any more
    step = item.floats.block
    for start in range(0, item.floats.numel, step):
        stop = min(start + step, item.floats.numel)
        if item.merged is not None:
            wanted, base = item.merged.both(start, stop)
        else:
            wanted = item.floats.read_wide(start, stop)
            base = wanted if item.base is None else item.base.read_wide(start, stop)
        there = pair.read_wide(start, stop)
        sums += block_sums(base, wanted, there, error=True)
        alone = item.values.read_wide(start, stop)
        with one_thread():
            off += float((alone.double() - wanted.double()).square().sum())
    for tensor in (item.floats, item.values, pair):
        tensor.release()
    return sums, off


def _row(item: Item, sums: FidelitySums) -> TensorCheck:
    how = item.floats.how if isinstance(item.floats, Merged) else ""
    return TensorCheck(
        item.name,
        "",
        True,
        item.format or str(item.values.dtype),
        item.values.shape,
        how,
        relative=sums.relative,
        retention=sums.retention,
        cosine=sums.cosine,
        unmoved=sums.unmoved,
        error=sums.error,
    )
