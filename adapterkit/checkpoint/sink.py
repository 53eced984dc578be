"""The sink: the only place where bytes are written.

Files are sized first, then a few worker threads take blocks in order: untouched tensors are copied by the kernel, the
others are read, computed and written block by block at their offsets. Everything happens in a hidden folder beside the
target, which is fsynced and renamed when it is whole.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.checkpoint.cut import elements_between
from adapterkit.checkpoint.files import LocalFile, check_unchanged
from adapterkit.checkpoint.journal import Journal, block_digest, tensor_digest
from adapterkit.errors import AdapterkitError, CheckpointError, OutputError, no_memory, out_of_memory
from adapterkit.ops.threads import OneAtATime, settle, start_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch

    from adapterkit.checkpoint.cut import PlanPart
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.plan import Plan, PlannedFile
    from adapterkit.checkpoint.plan_file import PlanStep
    from adapterkit.checkpoint.tensor import Tensor

COPY_CHUNK = 32 << 20  # bytes per copy task, so that a large tensor is shared among workers
ALLOCATE = 128 << 20  # bytes for which a file is given room in one step
ASIDE = 4096  # tasks that wait for torch while others are done before them
FLUSH = 256 << 20  # bytes after which what was written so far is sent to the disk, while the workers go on


@dataclass
class _Job:
    """A computed tensor on its way: its blocks' hashes, and how many blocks are still missing."""

    file: PlannedFile
    step: PlanStep
    tensor: Tensor
    fd: int
    digests: list[bytes]
    missing: int
    proof: str | None = None  # the journal's digest, to be checked before it is trusted
    plain: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class _Task:
    """One piece of work, which gives how many bytes it wrote.

    Attributes:
        plain: torch is not needed for it.
        reads: bytes that are read for the whole tensor, where one is computed.
        elements: how many elements of tensors it goes on by.
    """

    run: Callable[[], int]
    plain: bool = True
    reads: int | None = None
    elements: float = 0


@dataclass(eq=False)
class _Queue:
    """What is left to do for one file of a sink, and how many workers are at it.

    Tasks are made when they are taken: those of a large model, all at once, would need memory that grows with it.
    """

    sink: Sink
    tasks: Iterator[_Task]
    left: int  # bytes
    workers: int = 0
    empty: bool = False
    aside: deque[_Task] = field(default_factory=deque)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> _Task | None:
        """The next task; None when there are no more."""
        with self.lock:
            task = self.aside.popleft() if self.aside else next(self.tasks, None)
            self.empty = task is None
        return task

    def take_plain(self) -> _Task | None:
        """The next task without torch; those before it are put aside. None when there are no more near."""
        with self.lock:
            while len(self.aside) < ASIDE and (task := next(self.tasks, None)) is not None:
                if task.plain:
                    return task
                self.aside.append(task)
        return None


class Sink:
    """Executes a plan, or some of its files, into a folder.

    Args:
        plan: what to write.
        tensors: the handles that the plan was made from.
        sources: the input files, for verbatim copies.
        folder: the hidden folder, which exists.
        jobs: worker threads.
        journal: where finished tensors are noted.
        shared: other processes may write the same files at this moment.
        progress: called now and then with bytes done and bytes in all.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: Mapping[str, Tensor],
        sources: Sequence[Source],
        folder: Path,
        *,
        jobs: int,
        journal: Journal,
        shared: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._shared = shared
        self._plan, self._tensors = plan, tensors
        self._sources = {source.name: source for source in sources}
        self._folder, self._jobs, self._journal, self._progress = folder, jobs, journal, progress
        self._count = threading.Lock()
        self._fds: list[int] = []
        self.rooms: Sequence[Callable[[], int]] = ()
        """Steps that give the files room for what is computed, so that less is left to the writing."""
        self.done = self.total = 0
        self.passed = self.elements = 0.0
        """Elements of tensors that are done, and of all: outputs of one base hold the same, in other numbers of bytes."""
        self.reused = 0
        self.needs_torch = True
        """Whether torch computes something of what was opened."""

    def run(self, parts: Sequence[PlanPart]) -> None:
        """Write parts.

        Raises:
            OutputError: the disk is full or fails.
            AdapterkitError: an input could not be read or a tensor not computed.
        """
        run_together([(self, parts)], jobs=self._jobs, progress=self._progress)

    def open(self, parts: Sequence[PlanPart]) -> list[_Queue]:
        """Make the files, and give what is to be done for each part."""
        expect(self._plan, [part.file for part in parts], self._sources.values(), _copied_elsewhere(parts))
        proved = self._journal.read()
        self._journal.start()
        queues = []
        for part in parts:
            make = disk.open_shared_inside if self._shared else disk.open_kept_inside
            fd = make(self._folder, part.file.name)
            self._fds.append(fd)
            if not part.whole:
                disk.calls.hold_range(fd, part.start, part.nbytes)
            if os.fstat(fd).st_size != part.file.nbytes:
                os.ftruncate(fd, part.file.nbytes)
            if not proved:
                self.rooms = (*self.rooms, *_rooms(part, fd))
            queues.append(_Queue(self, self._tasks(part, fd, proved), part.nbytes))
        self.total = sum(part.nbytes for part in parts)
        self.elements = sum(elements_between(part.file, part.start, part.stop) for part in parts)
        steps = [step for part in parts if part.file.verbatim is None for step in part.steps]
        tensors = [self._tensors[step.tensor] for step in steps]
        self.needs_torch = not all(tensor.extent is not None or tensor.plain for tensor in tensors)
        return queues

    def check_sources(self) -> None:
        """See that no input changed since it was opened.

        Raises:
            CheckpointError: one did.
        """
        check_unchanged(self._sources.values())

    def sync(self) -> None:
        """Put the files on disk."""
        for fd in self._fds:
            disk.fsync(fd)

    def close(self) -> None:
        self._journal.close()
        for source in self._sources.values():
            source.expect(())
        while self._fds:
            os.close(self._fds.pop())

    @property
    def place(self) -> str:
        return str(self._folder)

    def _tasks(self, part: PlanPart, fd: int, proved: Mapping[tuple[str, str], str]) -> Iterator[_Task]:
        file = part.file
        if file.verbatim is not None:
            yield from _copy_tasks(self._sources[file.verbatim], part.start, fd, part.start, part.nbytes, part.nbytes)
            return
        if not file.head and part.start == 0:
            header = self._plan.header(file)
            yield _Task(lambda: _write(fd, memoryview(header), 0))
        for chunk in file.head:
            if not part.start <= chunk.offset < part.stop:
                continue
            if chunk.source is not None:
                source = self._sources[chunk.source]
                yield from _copy_tasks(source, chunk.source_offset, fd, chunk.offset, chunk.nbytes, 0)
            else:
                yield _Task(partial(_write, fd, memoryview(chunk.content), chunk.offset))
        for gap in file.gaps:
            if part.start <= gap[0] < part.stop:
                yield _Task(partial(_write_zeros, fd, gap[1], gap[0]))
        for step in part.steps:
            tensor = self._tensors[step.tensor]
            extent = tensor.extent
            if extent is not None:
                yield from _copy_tasks(extent.source, extent.offset, fd, step.offset, step.nbytes, step.elements)
                continue
            blocks = range(0, tensor.numel, tensor.block)
            proof = proved.get((file.name, step.tensor))
            job = _Job(file, step, tensor, fd, [b""] * len(blocks), len(blocks), proof, tensor.plain)
            if proof is not None:
                yield _Task(partial(self._check, job), job.plain, tensor.reads, step.elements)
                continue
            reads = tensor.reads
            for index, start in enumerate(blocks):
                count = min(tensor.block, tensor.numel - start)
                share = step.elements * count / tensor.numel
                yield _Task(partial(self._compute, job, index, start), job.plain, reads, share)

    def _compute(self, job: _Job, index: int, start: int) -> int:
        tensor = job.tensor
        stop = min(start + tensor.block, tensor.numel)
        data = tensor.array(start, stop).data if job.plain else _bytes(tensor.read(start, stop))
        _write(job.fd, data, job.step.offset + tensor.dtype.nbytes((start,)))
        job.digests[index] = block_digest(data)
        with job.lock:
            job.missing -= 1
            last = job.missing == 0
        if last:
            tensor.release()
            self._journal.add(job.file.name, job.step.tensor, tensor_digest(job.digests))
        return len(data)

    def _check(self, job: _Job) -> int:
        """Re-use a tensor that an earlier run wrote if its bytes are what the journal says; else compute it."""
        tensor, nbytes = job.tensor, job.tensor.dtype.nbytes
        digests = []
        for start in range(0, tensor.numel, tensor.block):
            count = nbytes((min(tensor.block, tensor.numel - start),))
            digests.append(block_digest(disk.calls.pread(job.fd, count, job.step.offset + nbytes((start,)))))
        if tensor_digest(digests) == job.proof:
            tensor.release()
            with self._count:
                self.reused += 1
            return job.step.nbytes
        return sum(self._compute(job, index, start) for index, start in enumerate(range(0, tensor.numel, tensor.block)))


class _Pool:
    """Worker threads that take the tasks of one sink, or of several abreast."""

    def __init__(
        self, sinks: Sequence[Sink], queues: list[_Queue], progress: Callable[[int, int], None] | None
    ) -> None:
        self._sinks, self._queues, self._progress = sinks, queues, progress
        self._several = len(sinks) > 1
        self._count, self._turns = threading.Lock(), OneAtATime()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._first, self._ready = threading.Lock(), threading.Event()
        self._rooms = iter([(sink, room) for sink in sinks for room in sink.rooms])

    def work(self, jobs: int) -> None:
        threads = [threading.Thread(target=self._worker, daemon=True) for _ in range(jobs)]
        flusher = threading.Thread(target=self._flusher, daemon=True)
        total = sum(sink.total for sink in self._sinks)
        try:
            threads = start_all(threads)
            start_all([flusher], needed=False)
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.1)
                    if self._progress is not None:
                        self._progress(min(sum(sink.done for sink in self._sinks), total), total)
        except BaseException:
            # The flusher is not waited for: a slow disk would make stopping slow.
            self._stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
        self._stop.set()
        if flusher.ident is not None:
            flusher.join()
        if self._failure is not None:
            raise self._failure
        # A worker that ended without a word would leave holes in the files.
        if missing := [queue for queue in self._queues if not queue.empty]:
            raise OutputError(f"{missing[0].sink.place} was not written to its end", "run it again, and report it")
        if self._progress is not None:
            self._progress(total, total)

    def _worker(self) -> None:
        queue: _Queue | None = None
        try:
            with self._torch() if any(sink.needs_torch for sink in self._sinks) else nullcontext():
                while not self._stop.is_set():
                    if queue is None or queue.empty or self._several:
                        queue = self._next(queue)
                        if queue is None:
                            return
                    task = queue.take()
                    if task is None:
                        continue
                    self._do(queue, task)
        except BaseException as error:
            if no_memory(error):
                error = out_of_memory(error)
            elif isinstance(error, OSError) and queue is not None:
                error = _output_error(error, queue.sink.place)
            with self._count:
                self._failure = self._failure or error
            self._stop.set()

    def _torch(self) -> AbstractContextManager[Any]:
        """What a thread computes with torch in; others do what they can while the first one imports it."""
        if not self._first.acquire(blocking=False):
            self._before_torch()
        import torch

        self._ready.set()
        settle()  # threads of our own beat torch's: those wait for each other after every operation
        return torch.inference_mode()

    def _do(self, queue: _Queue, task: _Task) -> None:
        with nullcontext() if task.reads is None else self._turns.of(task.reads):
            count = task.run()
        with self._count:
            queue.sink.done += count
            queue.sink.passed += task.elements
            queue.left -= count

    def _before_torch(self) -> None:
        """While the first worker imports torch, the others copy what is only copied, and give the files room."""
        for queue in self._queues:
            while not self._passed() and (task := queue.take_plain()) is not None:
                try:
                    self._do(queue, task)
                except OSError as error:
                    raise _output_error(error, queue.sink.place) from error
        while not self._passed():
            with self._count:
                sink, room = next(self._rooms, (None, None))
            if sink is None or room is None:
                return
            try:
                room()
            except OSError as error:
                raise _output_error(error, sink.place) from error

    def _passed(self) -> bool:
        return self._ready.is_set() or self._stop.is_set()

    def _flusher(self) -> None:
        """Flush while writing, so that the final fsync has little left to do."""
        flushed = 0  # bytes that had been written when the last flush began
        while not self._stop.wait(0.02):
            done = sum(sink.done for sink in self._sinks)
            if done - flushed < FLUSH:
                continue
            flushed = done
            for sink in self._sinks:
                try:
                    sink.sync()
                except OSError as error:
                    # The kernel tells of a failed write once, so nobody else would hear of it.
                    with self._count:
                        self._failure = self._failure or _output_error(error, sink.place)
                    self._stop.set()
                    return

    def _next(self, left: _Queue | None) -> _Queue | None:
        """The file that a worker turns to: one that nobody writes, in order, else the one with most left to do.

        The kernel lets one thread at a time write into a file, so two of them in one file wait for each other. Of several
        sinks the one that is furthest behind goes first: outputs of one base then read it side by side, and what the
        first one had fetched from the disk is still in memory when the others want it.
        """
        with self._count:
            if left is not None:
                left.workers -= 1
            open_ones = [queue for queue in self._queues if not queue.empty]
            if not open_ones:
                return None
            free = [queue for queue in open_ones if queue.workers == 0]
            if self._several and free:
                found = min(free, key=lambda queue: queue.sink.passed / max(queue.sink.elements, 1.0))
            else:
                found = free[0] if free else max(open_ones, key=lambda queue: queue.left)
            found.workers += 1
            return found


def run_together(
    runs: Sequence[tuple[Sink, Sequence[PlanPart]]],
    *,
    jobs: int,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write parts of several sinks, abreast, with one set of workers.

    Raises:
        OutputError: the disk is full or fails.
        AdapterkitError: an input could not be read or a tensor not computed.
    """
    sinks = [sink for sink, _ in runs]
    try:
        queues = []
        for sink, parts in runs:
            try:
                queues += sink.open(parts)
            except OSError as error:
                raise _output_error(error, sink.place) from error
        _Pool(sinks, queues, progress).work(jobs)
        for sink in sinks:
            sink.check_sources()
        for sink in sinks:
            try:
                sink.sync()
            except OSError as error:
                raise _output_error(error, sink.place) from error
    finally:
        for sink in sinks:
            sink.close()


def expect(
    plan: Plan,
    files: Sequence[PlannedFile],
    sources: Iterable[Source],
    inside: Mapping[str, Sequence[tuple[int, int]]] | None = None,
) -> None:
    """Tell remote inputs which of their bytes these files of a plan are made of: all that no other file copies.

    Args:
        inside: by source, the ranges that do not come here since a store copies them itself.
    """
    for source, ranges in wanted_ranges(plan, files, sources, inside):
        source.expect(ranges)


def wanted_ranges(
    plan: Plan,
    files: Sequence[PlannedFile],
    sources: Iterable[Source],
    inside: Mapping[str, Sequence[tuple[int, int]]] | None = None,
) -> list[tuple[Source, list[tuple[int, int]]]]:
    """What `expect` tells each remote input."""
    remote = [source for source in sources if source.path is None]
    if not remote:
        return []
    here = {file.name for file in files}
    apart: dict[str, list[tuple[int, int]]] = {name: list(ranges) for name, ranges in (inside or {}).items()}
    for file in plan.files:
        if file.name not in here and file.verbatim is not None:
            apart.setdefault(file.verbatim, []).append((0, file.nbytes))
        elif file.name not in here:
            for step in file.steps:
                if step.source is not None:
                    copied = (step.source_offset, step.source_offset + step.nbytes)
                    apart.setdefault(step.source, []).append(copied)
    return [(source, _rest(source, sorted(apart.get(source.name, [])))) for source in remote]


def _copied_elsewhere(parts: Sequence[PlanPart]) -> dict[str, list[tuple[int, int]]]:
    """By source, what the other parts of the files that these parts lie in copy."""
    if all(part.whole for part in parts):
        return {}
    here = {(part.file.name, step.tensor) for part in parts for step in part.steps}
    found: dict[str, list[tuple[int, int]]] = {}
    for file in {part.file.name: part.file for part in parts}.values():
        for step in file.steps:
            if step.source is not None and (file.name, step.tensor) not in here:
                found.setdefault(step.source, []).append((step.source_offset, step.source_offset + step.nbytes))
    return found


def _rest(source: Source, apart: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The bytes of a file behind its header that do not lie in these ranges."""
    found, position = [], getattr(source, "held", 0)
    for start, stop in apart:
        found.append((position, start))
        position = max(position, stop)
    return [*found, (position, source.size)]


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write(fd: int, data: memoryview, offset: int) -> int:
    done = 0
    while done < len(data):
        done += disk.calls.pwrite(fd, data[done:], offset + done)
    return len(data)


def _rooms(part: PlanPart, fd: int) -> Iterator[Callable[[], int]]:
    """Steps that give a file room for the tensors that are computed: found while nothing else can be done."""
    start = stop = 0
    for step in (*part.steps, None):
        if step is not None and step.offset == stop and step.source is None:
            stop += step.nbytes
            continue
        for at in range(start, stop, ALLOCATE):
            yield partial(disk.calls.allocate, fd, at, min(ALLOCATE, stop - at))
        if step is not None:
            start, stop = step.offset, step.offset + (step.nbytes if step.source is None else 0)


def _write_zeros(fd: int, count: int, offset: int) -> int:
    return _write(fd, memoryview(bytes(count)), offset)


def _copy_tasks(source: Source, start: int, fd: int, offset: int, nbytes: int, elements: float) -> Iterator[_Task]:
    for at in range(0, nbytes, COPY_CHUNK):
        count = min(COPY_CHUNK, nbytes - at)
        yield _Task(partial(_copy, source, start + at, fd, offset + at, count), elements=elements * count / nbytes)


def _copy(source: Source, start: int, fd: int, offset: int, nbytes: int) -> int:
    """Copy a byte range, by the kernel where it can."""
    done = 0
    if isinstance(source, LocalFile):
        # Two file systems, or one that cannot: the bytes go through this process instead.
        done = disk.copy_range(source.fd, fd, start, offset, nbytes)
    while done < nbytes:
        chunk = memoryview(source.read(start + done, min(1 << 20, nbytes - done)))
        if not chunk:
            raise CheckpointError(f"{source.name} ended while it was copied", "download or save it again")
        done += _write(fd, chunk, offset + done)
    return nbytes


def _output_error(error: OSError, where: str) -> AdapterkitError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk is full at {where}", "free some space or write elsewhere")
    return OutputError(f"writing {where} failed ({error.strerror or error})", "check the disk and the permissions")
