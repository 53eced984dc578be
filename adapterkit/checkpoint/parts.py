"""One part of a plan at a time: what several processes, or a cluster, run.

Each part is written into the hidden folder beside the target, by any machine that sees it, in any order and at the same
time; when all bytes of all files are said to be done, `finish_parts` makes the folder the target. The bytes are those of
one whole run. What lies in the hidden folder beside the files:

* ``.plan``: the digest of the plan whose parts these are. Parts of another plan are never put among them;
* ``.journal.FILE.jsonl``: the computed tensors of a part that are finished; see `adapterkit.checkpoint.journal`;
* ``.done.FILE``: a part that is finished, with the plan and a digest of the state of the inputs on the machine that wrote it;
* ``.inputs.HOST.DIGEST``: that state by input, so that the one that changed can be named.

A run of the whole output that takes the folder over (``--resume``) takes these files away: the bytes are its own then.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.checkpoint.cut import PlanPart, whole_files
from adapterkit.checkpoint.files import states_here
from adapterkit.checkpoint.journal import CLAIM, DONE, INPUTS, Journal, forget_parts
from adapterkit.checkpoint.plan import default_jobs
from adapterkit.checkpoint.publish import check_target, input_paths, partial_folder, staging
from adapterkit.checkpoint.sink import Sink
from adapterkit.checkpoint.write import Writing, finish, identity_of
from adapterkit.disk import open_inside, read_inside, write_all, write_inside
from adapterkit.errors import CheckpointError, OutputError, UsageError, option
from adapterkit.foreign import json_value

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.places import Address


@dataclass(frozen=True)
class Note:
    """That a range of a file is done: where, and what the inputs were there."""

    file: str
    start: int
    stop: int
    host: str
    state: str


def part_of(parts: Sequence[PlanPart], index: int) -> PlanPart:
    """One of the parts.

    Raises:
        UsageError: there is none of this number.
    """
    if not 0 <= index < len(parts):
        raise UsageError(f"there is no part {index}", f"this plan has parts 0 to {len(parts) - 1}")
    return parts[index]


def write_part(
    plan: Plan,
    part: PlanPart,
    tensors: Mapping[str, Tensor],
    sources: Sequence[Source],
    out: Path,
    *,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write a part into the hidden folder of ``out``; one that was interrupted resumes.

    Returns:
        How many computed tensors were re-used.

    Raises:
        OutputError, AdapterkitError: as for a whole run.
    """
    inputs = input_paths(plan, sources)
    check_target(out, inputs, part.nbytes, force=True, held=[partial_folder(out) / part.file.name])
    with claimed(plan, out) as folder:
        states = states_here(sources)
        state = identity_of(plan, states)
        name = _inputs_name(socket.gethostname(), state)
        _say_first(folder, name, json.dumps(states).encode())
        _check_here(plan, folder, state)
        journal = Journal(folder, state, f".journal.{part.name}.jsonl")
        sink = Sink(
            *(plan, tensors, sources, folder),
            jobs=jobs or default_jobs(),
            journal=journal,
            shared=True,
            progress=progress,
        )
        sink.run([part])
        said = {"plan": plan.digest, "file": part.file.name, "start": part.start, "stop": part.stop}
        note = {**said, "host": socket.gethostname(), "state": state}
        write_inside(folder, DONE + part.name, json.dumps(note).encode())
        _check_here(plan, folder, state)  # workers that began at the same moment did not see each other's parts
    return sink.reused


@contextmanager
def claimed(plan: Plan, out: Path) -> Iterator[Path]:
    """The hidden folder of ``out``, for parts of this plan alone, while others may write parts of it too.

    Raises:
        OutputError: a run of another plan is writing there.
    """
    while True:
        with staging(out, resume=True, shared=True) as folder:
            found = _claim(folder, plan)
            if found:
                yield folder
                return
        # Parts of another plan lie there: they go, unless somebody is at them.
        with staging(out, resume=True) as folder:
            forget_parts(folder)
            write_inside(folder, CLAIM, plan.digest.encode())


def _claim(folder: Path, plan: Plan) -> bool:
    """Whether the parts in a hidden folder are those of this plan; the first that comes says so."""
    return _say_first(folder, CLAIM, plan.digest.encode()) or _said(folder) == plan.digest.encode()


def _say_first(folder: Path, name: str, data: bytes) -> bool:
    """Write a small file that all workers have one name for, and may write at one moment; False where it was there."""
    try:
        fd = open_inside(folder, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        return False
    try:
        write_all(fd, data)
    finally:
        os.close(fd)
    return True


def _said(folder: Path) -> bytes:
    """What plan a hidden folder is for; one that is being made at this moment is waited for."""
    found = b""
    for _ in range(50):
        found = read_inside(folder, CLAIM) or b""
        if len(found) == 64:
            break
        time.sleep(0.02)
    return found


def forget(plan: Plan, out: Path, state: str) -> None:
    """Take away what this machine said to be done with inputs in another state than they are in now.

    Args:
        state: as `identity` has it.
    """
    with claimed(plan, out) as folder:
        host = socket.gethostname()
        for name, note in _named_notes(plan, folder):
            if note.host == host and note.state != state:
                os.unlink(folder / name)
        for name in os.listdir(folder):
            if name.startswith(_inputs_name(host, "")) and name != _inputs_name(host, state):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(folder / name)


def left(plan: Plan, parts: Sequence[PlanPart], out: Path) -> list[PlanPart]:
    """The parts that are not said to be done."""
    folder = partial_folder(out)
    if not folder.is_dir():
        return list(parts)
    return _left(folder, _notes(plan, folder), parts)


def _left(folder: Path, notes: Iterable[Note], parts: Sequence[PlanPart]) -> list[PlanPart]:
    covered = _covered(notes)
    return [
        part
        for part in parts
        if _holes(covered.get(part.file.name, []), part.start, part.stop) or not _there(folder, part)
    ]


def finish_parts(
    plan: Plan,
    out: Path,
    *,
    side_files: Mapping[str, bytes],
    force: bool = False,
    record: Callable[[Path], Mapping[str, bytes]] | None = None,
    parts: Sequence[PlanPart] | None = None,
    first: Callable[[], None] = lambda: None,
) -> None:
    """Make the target once every part is done.

    Args:
        parts: as the caller counts them, for the error that names those that are missing; by default one a file.
        first: called when all parts are known to be done, before the target has its name.

    Raises:
        OutputError: parts are missing, or belong to another plan.
        CheckpointError: an input changed between two parts.
    """
    if os.path.lexists(out) and not force:
        raise OutputError(f"{out} exists", f"choose another name, or replace it with {option('force', True)}")
    if not partial_folder(out).is_dir():
        raise OutputError(f"{out}: no part is done", "execute the parts, then finish")
    with staging(out, resume=True) as folder:
        check_done(plan, parts or whole_files(plan.files), folder, out)
        first()
        finish(Writing(plan, {}, (), out, side_files, record), folder, force=force)


def check_done(plan: Plan, parts: Sequence[PlanPart], folder: Path, out: Path | Address) -> None:
    """See that all parts of a plan are done, in the hidden folder of ``out``, of inputs that stayed what they were.

    Raises:
        OutputError: parts are missing, or belong to another plan.
        CheckpointError: an input changed between two parts.
    """
    notes = _notes(plan, folder)
    missing = [str(part.index) for part in _left(folder, notes, parts)]
    if missing:
        raise OutputError(f"{out}: parts {', '.join(missing[:8])} are not done", "execute them, then finish again")
    _check_inputs(notes, folder, {})


def _check_inputs(notes: Iterable[Note], folder: Path, states: dict[str, str]) -> None:
    """Refuse parts that one machine wrote of inputs in two states.

    Args:
        states: by machine, where that is known.

    Raises:
        CheckpointError: an input changed while the parts were executed; it is named where the states were noted.
    """
    for note in notes:
        known = states.setdefault(note.host, note.state)
        if note.state != known:
            before, now = (_noted_inputs(folder, note.host, state) for state in (note.state, known))
            names = sorted(before.keys() | now.keys()) if before and now else []
            changed = next((name for name in names if before.get(name) != now.get(name)), "an input")
            raise CheckpointError(
                f"{changed} changed while the parts were executed (on {note.host})",
                f"remove the parts that are done ({DONE}* in the hidden folder) and execute them again",
            )


def _check_here(plan: Plan, folder: Path, state: str) -> None:
    """The same, of what this machine did, while its inputs are in this state. Notes are read only where another state was
    seen: there may be thousands.

    Raises:
        CheckpointError: an input changed since a part was executed here.
    """
    host = socket.gethostname()
    own, other = _inputs_name(host, state), _inputs_name(host, "")
    if any(name.startswith(other) and name != own for name in os.listdir(folder)):
        _check_inputs((note for note in _notes(plan, folder) if note.host == host), folder, {host: state})


def _inputs_name(host: str, state: str) -> str:
    """What the state of the inputs of a machine is noted under."""
    return f"{INPUTS}{hashlib.sha256(host.encode()).hexdigest()[:12]}.{state[:32]}"


def _noted_inputs(folder: Path, host: str, state: str) -> dict[str, str]:
    try:
        return dict(json_value(read_inside(folder, _inputs_name(host, state)) or b"{}"))
    except (ValueError, TypeError):
        return {}  # torn, as a kill leaves it


def _notes(plan: Plan, folder: Path) -> list[Note]:
    """The parts of this plan that are done, by what their writers said."""
    return [note for _, note in _named_notes(plan, folder)]


def _named_notes(plan: Plan, folder: Path) -> list[tuple[str, Note]]:
    found = []
    for name in sorted(os.listdir(folder)):
        if not name.startswith(DONE):
            continue
        try:
            said = json_value(read_inside(folder, name) or b"")
            if said.pop("plan") == plan.digest:
                found.append((name, Note(**said)))
        except (ValueError, KeyError, TypeError, AttributeError):
            continue  # torn: its part is not done
    return found


def _covered(notes: Iterable[Note]) -> dict[str, list[tuple[int, int]]]:
    found: dict[str, list[tuple[int, int]]] = {}
    for note in notes:
        found.setdefault(note.file, []).append((note.start, note.stop))
    return {name: sorted(ranges) for name, ranges in found.items()}


def _holes(covered: Iterable[tuple[int, int]], start: int, stop: int) -> bool:
    """Whether bytes of a range are not covered; an empty file is when something says so."""
    place = start
    hit = False
    for low, high in covered:
        hit = hit or low <= start <= high
        if low > place:
            break
        place = max(place, high)
    return place < stop or not hit


def _there(folder: Path, part: PlanPart) -> bool:
    try:
        info = (folder / part.file.name).lstat()
        return stat.S_ISREG(info.st_mode) and info.st_size == part.file.nbytes
    except FileNotFoundError:
        return False
