"""The tensor level: every tensor of MERGED beside the view that `merge` would write, streamed in the same blocks.

Two views are compared, so nothing is held but the blocks at hand. Where bytes are equal nothing more is asked. Where they
are not, values decide: a merge by another tool is rounded otherwise, and a quantized file may be encoded otherwise; both
are right as long as what differs is no more than rounding or the format explains, and the change is all there.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint import odd as not_finite
from adapterkit.checkpoint.plan import default_jobs
from adapterkit.ops.threads import OneAtATime, settle, start_all
from adapterkit.verbs.verify.report import (
    EQUAL,
    EXTRA,
    FORMAT,
    MISSING,
    OFF,
    RIGHT,
    ROUNDING,
    SHAPE,
    TensorCheck,
    TensorLevel,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch

    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.ops.fidelity import FidelitySums
    from adapterkit.verbs.verify.subject import Item, Subject

CHUNK = 8 << 20  # bytes of untouched tensors per task
WHOLE = 1 << 20  # elements up to which every row is measured
SAMPLE = 16  # of a larger float tensor, one row in so many is
MOST_STEPS = 4.0  # of the dtype: what a tool that rounds several times is off by
AS_GOOD = 1.6  # squared error over that of our encoding; an importance matrix shifts it so much
NEAR = 0.05  # of the retention, beside five standard errors
NEAR_FORMAT = 0.1
FED = 0.8  # relative error of a weight that is rounded with feedback; another weight's is above 1
HALF = 0.5  # of a change, by which it may be weaker or stronger there than with the nearest values
UNKNOWN_FORMAT = 3.0  # relative error of a format with b bits is at most this times 2^-b


@dataclass
class Tally:
    """What the blocks of one weight showed so far; by the element a block starts at, so that sums keep their order."""

    item: Item
    missing: int
    there: Tensor  # the values of MERGED; of a Conv1D in the base's own format on their side, as they are encoded
    found: dict[int, FidelitySums] = field(default_factory=dict)
    ours: dict[int, FidelitySums] = field(default_factory=dict)
    differing: int = 0
    parts: set[str] = field(default_factory=set)
    steps: float = 0.0
    odd: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class Judged:
    """A weight and what became of it; ``odd`` counts the values of what should be there that are NaN or infinite."""

    item: Item
    status: str
    sums: FidelitySums
    ours: FidelitySums
    differing: int
    steps: float | None
    parts: frozenset[str] = frozenset()
    odd: int = 0

    def said(self) -> dict[str, Any]:
        """As JSON, without the item."""
        return {
            "status": self.status,
            "sums": list(self.sums.values()),
            "ours": list(self.ours.values()),
            "differing": self.differing,
            "steps": self.steps,
            "parts": sorted(self.parts),
            "odd": self.odd,
        }

    @classmethod
    def of(cls, item: Item, said: Mapping[str, Any]) -> Judged:
        """Out of `said`."""
        from adapterkit.ops.fidelity import FidelitySums

        sums, ours = FidelitySums(*said["sums"]), FidelitySums(*said["ours"])
        steps = None if said["steps"] is None else float(said["steps"])
        parts = frozenset(map(str, said["parts"]))
        return cls(item, str(said["status"]), sums, ours, int(said["differing"]), steps, parts, int(said["odd"]))


def compare(
    subject: Subject, *, jobs: int | None = None, progress: Callable[[int, int], None] | None = None
) -> tuple[Judged, ...]:
    """Compare every weight that is in both.

    Raises:
        CheckpointError, AdapterError: something cannot be read or computed.
    """
    return TensorComparison(subject, progress).run(jobs or default_jobs())


class TensorComparison:
    """See `compare`; a weight may be compared alone too."""

    def __init__(self, subject: Subject, progress: Callable[[int, int], None] | None = None) -> None:
        self._subject, self._progress = subject, progress
        self._total = sum(item.nbytes for item in subject.items)
        self._done = 0
        self._lock, self._stop, self._turns = threading.Lock(), threading.Event(), OneAtATime()
        self._failure: BaseException | None = None
        self._seen = threading.local()
        self._judged: dict[str, Judged] = {}

    def run(self, jobs: int) -> tuple[Judged, ...]:
        # Large weights first would be quicker at the end; in order of the files is quicker on a disk.
        tasks = deque((item.nbytes, task) for item in self._subject.items for task in self._tasks(item))
        threads = [threading.Thread(target=self._worker, args=(tasks,), daemon=True) for _ in range(jobs)]
        try:
            threads = start_all(threads)
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.1)
                    if self._progress is not None:
                        self._progress(min(self._done, self._total), self._total)
        except BaseException:
            self._stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
        if self._failure is not None:
            raise self._failure
        return tuple(self._judged[item.name] for item in self._subject.items)

    def alone(self, item: Item) -> Judged:
        """Compare one weight, in this thread; several threads may do so at a time."""
        for task in self._tasks(item):
            task()
        with self._lock:
            return self._judged.pop(item.name)

    def _worker(self, tasks: deque[tuple[int, Callable[[], int]]]) -> None:
        try:
            import torch

            settle()
            with torch.inference_mode():
                while not self._stop.is_set():
                    try:
                        nbytes, task = tasks.popleft()
                    except IndexError:
                        return
                    with self._turns.of(nbytes):
                        count = task()
                    with self._lock:
                        self._done += count
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self._stop.set()

    def _tasks(self, item: Item) -> Iterator[Callable[[], int]]:
        """Each task gives the bytes it compared."""
        if item.encoding is not None:
            item.encoding.witness = self._witness
        elif item.merged is not None:
            item.merged.watch = partial(self._watch, item.name)
        if not item.parts:
            starts = range(0, item.floats.numel, item.floats.block) or (0,)
            tally = Tally(item, len(starts), item.values)
            for start in starts:
                yield partial(self._values_only, tally, start)
            return
        expected, found = item.parts[0]
        if expected.extent is not None and found.extent is not None and not item.touched:
            chunks = range(0, expected.nbytes, CHUNK) or (0,)
            tally = Tally(item, len(chunks), item.values)
            yield from (partial(self._bytes, tally, at) for at in chunks)
            return
        blocks = range(0, expected.numel, expected.block) or (0,)  # a tensor of no values is judged too
        tally = Tally(item, len(blocks), _as_encoded(item))
        for start in blocks:
            yield partial(self._block, tally, expected, found, start)

    def _watch(self, name: str, start: int, base: torch.Tensor, wanted: torch.Tensor) -> None:
        """Called by `Merged` while a block is computed, in the thread that asked for it."""
        self._seen.__dict__.setdefault("blocks", []).append((name, start, base, wanted))

    def _blocks(self, item: Item) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """What was computed of a weight; others that share a scale with it may have been read for that."""
        return (block[1:] for block in self._seen.blocks if block[0] == item.name)

    def _witness(self, start: int, base: torch.Tensor, wanted: torch.Tensor, written: torch.Tensor) -> None:
        """Called when a range is encoded, in the thread that asked for it."""
        self._seen.__dict__.setdefault("encoded", []).append((start, base, wanted, written))

    def _encoded(self, tally: Tally) -> None:
        """Sums of the ranges that this thread encoded: what was wanted, what adapterkit writes of it, and what is there."""
        from adapterkit.ops.fidelity import block_sums

        for at, base, wanted, written in self._seen.__dict__.get("encoded", ()):
            there = tally.there.read(at, at + wanted.numel()).to(wanted.device).float()
            columns = tally.there.shape[-1]
            columns = columns if wanted.numel() % columns == 0 else 1
            one, two, mine, other = (part.view(-1, columns) for part in (base, wanted, written, there))
            found, ours = (block_sums(one, two, what, error=True) for what in (other, mine))
            with tally.lock:
                tally.found[at], tally.ours[at] = found, ours
        self._seen.encoded = []

    def _bytes(self, tally: Tally, at: int) -> int:
        """Untouched on both sides: bytes against bytes."""
        (expected, found) = tally.item.parts[0]
        mine, theirs = expected.extent, found.extent
        assert mine is not None
        assert theirs is not None
        count = min(CHUNK, mine.nbytes - at)
        one = mine.source.read(mine.offset + at, count)
        other = theirs.source.read(theirs.offset + at, count)
        if bad := not_finite.count(one, expected.dtype):
            with tally.lock:
                tally.odd += bad
        if one != other:
            size = max(1, expected.dtype.bits // 8)
            differing = _differing(one, other, size)
            with tally.lock:
                tally.differing += differing
        self._finish(tally)
        return count

    def _block(self, tally: Tally, expected: Tensor, found: Tensor, start: int) -> int:
        import torch

        stop = min(start + expected.block, expected.numel)
        self._seen.blocks = []
        wanted = expected.read(start, stop)
        there = found.read(start, stop)
        same = _same_bytes(wanted, there)
        if not same:
            unequal = int((wanted.view(torch.uint8) != there.view(torch.uint8)).view(len(wanted), -1).any(1).sum())
            with tally.lock:
                tally.differing += unequal
        item = tally.item
        if item.merged is None and (bad := not_finite.count_in(wanted, expected.dtype)):
            with tally.lock:
                tally.odd += bad
        if item.encoding is not None:
            self._encoded(tally)
            self._finish(tally)
            return int(there.numel()) * there.element_size()
        for at, base, new in self._blocks(item):
            ready = (there, wanted) if item.format is None and at == start and len(new.view(-1)) == len(there) else None
            self._measure(tally, at, base, new, ready, same)
        if item.merged is None and item.base is not None:
            self._beside(tally, expected, there, wanted, start, same)
        elif item.merged is None and not same:
            self._unwatched(tally, expected, there, wanted, start)
        self._seen.blocks = []
        self._finish(tally)
        return int(there.numel()) * there.element_size()

    def _values_only(self, tally: Tally, start: int) -> int:
        """A format that is only read here: values against values."""
        item = tally.item
        self._seen.blocks = []
        stop = min(start + item.floats.block, item.floats.numel)
        wide = item.floats.read_wide(start, stop)
        for at, base, new in self._blocks(item):
            self._measure(tally, at, base, new, None, False)
        if item.merged is None:
            columns = item.floats.shape[-1]
            base = wide if item.base is None else item.base.read_wide(start, stop)
            self._measure(tally, start, base.view(-1, columns), wide.float().view(-1, columns), None, False)
        self._seen.blocks = []
        self._finish(tally)
        return item.values.dtype.nbytes((stop - start,))

    def _measure(
        self,
        tally: Tally,
        at: int,
        base: torch.Tensor,
        wanted: torch.Tensor,
        ready: tuple[torch.Tensor, torch.Tensor] | None,
        same: bool,
    ) -> None:
        """Sums of one block of the fold: W and W' as they were computed, and what is there."""
        from adapterkit.ops.fidelity import block_sums
        from adapterkit.verbs.verify.measure import steps

        item = tally.item
        columns = base.shape[-1]
        there = ready[0] if ready is not None else item.values.read(at, at + wanted.numel())
        there = there.to(wanted.device).view(-1, columns)
        off = 0.0
        if not same and item.format is None and there.dtype.is_floating_point:
            off = steps(base, wanted, there)
        rows = slice(None)
        if item.format is None and item.floats.numel > WHOLE and base.shape[0] >= SAMPLE:
            # Some rows of every block, not always the first.
            count = base.shape[0] // SAMPLE
            first = at // item.floats.block % SAMPLE * count
            rows = slice(first, first + count)
        base, wanted, there = base[rows], wanted.view(-1, columns)[rows], there[rows]
        sums = block_sums(base, wanted, there, error=True)
        ours = sums
        if not same:
            mine = self._ours(item, wanted, ready, rows, columns)
            ours = sums if mine is None else block_sums(base, wanted, mine.to(wanted.device), error=True)
        with tally.lock:
            tally.found[at], tally.ours[at] = sums, ours
            tally.steps = max(tally.steps, off)

    def _ours(
        self,
        item: Item,
        wanted: torch.Tensor,
        ready: tuple[torch.Tensor, torch.Tensor] | None,
        rows: slice,
        columns: int,
    ) -> torch.Tensor | None:
        """These rows as `merge` would write them, as floats again."""
        if ready is not None:
            return ready[1].view(-1, columns)[rows]
        if item.format is None or not item.parts:
            return None
        return through(item)(wanted)

    def _beside(
        self, tally: Tally, expected: Tensor, there: torch.Tensor, wanted: torch.Tensor, start: int, same: bool
    ) -> None:
        """A block of rows of a fold in another order: the base is read beside it."""
        item = tally.item
        assert item.base is not None
        start, stop = _range(expected, start)
        columns = item.floats.shape[-1] if item.floats.shape else 1
        new = item.floats.read_wide(start, stop).float().view(-1, columns)
        base = item.base.read_wide(start, stop).view(-1, columns)
        ready = (there, wanted) if item.format is None else None
        self._measure(tally, start, base, new, ready, same)

    def _unwatched(self, tally: Tally, expected: Tensor, there: torch.Tensor, wanted: torch.Tensor, start: int) -> None:
        """A block that adapters do not add to, and that is other than it should be."""
        from adapterkit.ops.fidelity import block_sums
        from adapterkit.verbs.verify.measure import steps

        item = tally.item
        if item.format is None:
            if not there.dtype.is_floating_point:
                with tally.lock:
                    tally.steps = float("inf")
                return
            one = wanted.view(-1, 1)
            off = steps(one, expected.read_wide(start, start + len(wanted)).view(-1, 1), there.view(-1, 1))
            sums = block_sums(one, one, there, error=True)
            with tally.lock:
                tally.steps = max(tally.steps, off)
                tally.found[start], tally.ours[start] = sums, block_sums(one, one, one, error=True)
            return
        start, stop = _range(expected, start)
        new = item.floats.read_wide(start, stop).float().view(-1, item.floats.shape[-1])
        sums = block_sums(new, new, item.values.read(start, stop), error=True)
        with tally.lock:
            tally.found[start], tally.ours[start] = sums, block_sums(new, new, through(item)(new), error=True)

    def _finish(self, tally: Tally) -> None:
        with tally.lock:
            tally.missing -= 1
            if tally.missing:
                return
        item = tally.item
        if item.parts and tally.differing:
            tally.parts.add(item.parts[0][1].name)
        alike = not tally.differing
        for expected, found in item.parts[1:]:
            self._seen.blocks = []
            one, other = (_as_bytes(tensor) for tensor in (expected, found))
            differing = int((one != other).any(1).sum())
            tally.differing += differing
            if differing:
                tally.parts.add(found.name)
            expected.release()
        if alike and tally.differing and item.encoding is None and item.format is not None and not item.own:
            self._again(tally)
        (item.parts[0][0] if item.parts else item.floats).release()
        tally.there.release()
        judged = judge(tally)
        with self._lock:
            self._judged[item.name] = judged

    def _again(self, tally: Tally) -> None:
        """The codes are as they should be and what stands beside them is not: values against values."""
        item = tally.item
        tally.found.clear()
        tally.ours.clear()
        columns = item.floats.shape[-1]
        step = item.floats.block if item.merged is not None else max(1, item.floats.block // columns) * columns
        for start in range(0, item.floats.numel, step):
            self._seen.blocks = []
            stop = min(start + step, item.floats.numel)
            wide = item.floats.read_wide(start, stop)
            for at, base, new in self._blocks(item):
                self._measure(tally, at, base, new, None, False)
            if item.merged is None:
                base = wide if item.base is None else item.base.read_wide(start, stop)
                self._measure(tally, start, base.view(-1, columns), wide.float().view(-1, columns), None, False)
        self._seen.blocks = []


def _as_bytes(tensor: Tensor) -> torch.Tensor:
    """A whole tensor as ``[elements, bytes of one]``."""
    import torch

    return tensor.read(0, tensor.numel).contiguous().view(torch.uint8).view(max(tensor.numel, 1), -1)


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two blocks are the same bytes: by numpy, eight at a time, a twentieth of the time of ``torch.equal``."""
    import numpy as np
    import torch

    left, right = (block.contiguous().view(torch.uint8).numpy().reshape(-1) for block in (one, other))
    words = left.size // 8 * 8
    return (
        left.size == right.size
        and np.array_equal(left[:words].view(np.int64), right[:words].view(np.int64))
        and np.array_equal(left[words:], right[words:])
    )


def _range(expected: Tensor, start: int) -> tuple[int, int]:
    """The weights in the block of what is compared that starts there: a word of codes holds several."""
    from adapterkit.checkpoint.encoded import Encoded

    stop = min(start + expected.block, expected.numel)
    if not isinstance(expected, Encoded):
        return start, stop
    weights = expected.weight.numel
    return start * weights // expected.numel, stop * weights // expected.numel


def _differing(one: bytes, other: bytes, size: int) -> int:
    import torch

    mine, theirs = (torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in (one, other))
    count = len(mine) // size * size
    odd = bool((mine[count:] != theirs[count:]).any())
    return int((mine[:count] != theirs[:count]).view(-1, size).any(1).sum()) + odd


def through(item: Item) -> Callable[[torch.Tensor], torch.Tensor]:
    """decode(encode(.)) of whole rows, by this weight's format."""
    from adapterkit.adapters.fidelity import through_format
    from adapterkit.gguf.types import TYPES

    if item.format in TYPES:
        return partial(_through_gguf, item.format)
    found = through_format(item.format or "", item.floats.shape)
    assert found is not None
    return found


def _through_gguf(kind: str, rows: torch.Tensor) -> torch.Tensor:
    import torch

    from adapterkit.gguf.encode import decode, encode

    return torch.from_numpy(decode(kind, encode(kind, rows.float()), rows.shape[-1]))


def judge(tally: Tally) -> Judged:
    """Whether a weight is right, from what its blocks showed."""
    from adapterkit.ops.fidelity import FidelitySums

    item = tally.item
    sums = sum((tally.found[at] for at in sorted(tally.found)), FidelitySums())
    same = tally.ours.keys() == tally.found.keys() and all(tally.ours[at] is tally.found[at] for at in tally.found)
    ours = sums if same else sum((tally.ours[at] for at in sorted(tally.ours)), FidelitySums())
    near = abs(sums.retention - ours.retention) - 5 * sums.uncertainty
    steps: float | None = None
    if item.parts and not tally.differing:
        status = EQUAL
    elif item.fed:
        # The error of a column is in the columns after it. How far that goes depends on the text: where few directions have
        # inputs, the others may move freely.
        status = FORMAT if sums.off <= FED and is_there(sums, ours, own=item.own) else OFF
    elif item.own and not item.touched:
        status = OFF  # nobody changed it: other bytes are other codes or scales
    elif item.format is None:
        steps = tally.steps
        # Untouched tensors that are both plain bytes are never measured: they are equal or they are not.
        measured = bool(tally.found)
        status = ROUNDING if measured and steps <= MOST_STEPS and near <= NEAR else OFF
    elif item.parts:
        status = FORMAT if sums.ee <= AS_GOOD * ours.ee and near <= NEAR_FORMAT else OFF
    else:
        limit = UNKNOWN_FORMAT * 2.0**-item.bits
        near = abs(sums.retention - 1) - 5 * sums.uncertainty
        status = FORMAT if sums.off <= limit and near <= NEAR_FORMAT else OFF
    if sums.lost and status != EQUAL:
        status = OFF
    odd = sum(item.merged.odd.values()) if item.merged is not None else tally.odd
    return Judged(item, status, sums, ours, tally.differing, steps, frozenset(tally.parts), odd)


def _as_encoded(item: Item) -> Tensor:
    """What MERGED holds of an item, in the order in which its encoding is told of values."""
    from adapterkit.checkpoint.tensor import Transposed

    on_its_side = item.encoding is not None and isinstance(item.encoding.weight, Transposed)
    return Transposed(item.values) if on_its_side else item.values


def is_there(sums: FidelitySums, ours: FidelitySums, *, own: bool) -> bool:
    """Whether a change that was rounded with feedback is there once: not left out, not twice, not with the wrong sign.

    Args:
        sums: of what is there.
        ours: of the nearest values, of which feedback keeps about as much, or more.
        own: the base is on the same grid, so that a weight that nobody changed does not move at all.
    """
    if not sums.dd:
        return True
    if own and not sums.moved:
        return False
    slack = 5 * sums.uncertainty
    return HALF * min(1.0, ours.retention) - slack <= sums.retention <= 1 + HALF + slack


def level(subject: Subject, judged: tuple[Judged, ...], named: dict[str, str], started: float) -> TensorLevel:
    """The figures of the level; ``named`` says which finding a tensor is part of."""
    from adapterkit.ops.fidelity import FidelitySums

    counts: dict[str, int] = {}
    rows: list[TensorCheck] = []
    total = FidelitySums()
    for one in judged:
        counts[one.status] = counts.get(one.status, 0) + 1
        if one.item.touched and one.sums.count:
            # Sampled tensors count as whole ones.
            scale = one.item.floats.numel / one.sums.count
            total += one.sums.scaled(scale)
        if one.item.touched or one.status not in RIGHT:
            rows.append(_row(one, named.get(one.item.name, "")))
    for status, names in ((MISSING, subject.missing), (EXTRA, subject.extra)):
        for name in names:
            counts[status] = counts.get(status, 0) + 1
            tensor = subject.found.get(name) or subject.folded.checkpoint.get(name)
            shape, dtype = (tensor.shape, str(tensor.dtype)) if tensor is not None else ((), "")
            rows.append(
                TensorCheck(name, status, name in subject.folded.touched, dtype, shape, finding=named.get(name, ""))
            )
    for name, shape, _ in subject.misshapen:
        counts[SHAPE] = counts.get(SHAPE, 0) + 1
        touched = name in subject.folded.touched
        rows.append(TensorCheck(name, SHAPE, touched, "", shape, finding=named.get(name, "")))
    untouched = sum(1 for one in judged if not one.item.touched and one.status == EQUAL)
    return TensorLevel(
        len(subject.folded.checkpoint),
        len(subject.folded.touched),
        counts,
        untouched,
        total.retention,
        total.cosine,
        total.relative,
        total.unmoved,
        total.error,
        tuple(rows),
        sum(one.item.nbytes for one in judged),
        time.monotonic() - started,
    )


def _row(one: Judged, finding: str) -> TensorCheck:
    item, sums = one.item, one.sums
    dtype = item.format or str(item.values.dtype)
    known = item.touched and sums.count > 0
    return TensorCheck(
        item.name,
        one.status,
        item.touched,
        dtype,
        item.values.shape,
        item.floats.how,
        relative=sums.relative if known else None,
        retention=sums.retention if known else None,
        cosine=sums.cosine if known else None,
        unmoved=sums.unmoved if known else None,
        error=sums.error if sums.count else None,
        ours=one.ours.error if sums.count else None,
        differing=one.differing,
        steps=one.steps if one.steps is not None and one.steps != float("inf") else None,
        finding=finding,
    )
