"""``fsck``: reads everything and says what is damaged. It changes nothing, unless repair is asked for.

Repair moves rotten blobs to ``quarantine/``, writes again what other files still say in full (journals, the index, a
ref from its history, a history from its sound lines) after moving the old file to ``quarantine/``, and touches nothing
else.
"""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from adapterkit import disk
from adapterkit.errors import AdapterkitError, NotFound, RegistryError, UsageError, counted
from adapterkit.registry import blobs, chain, index, refs, store
from adapterkit.registry.canonical import sha256
from adapterkit.registry.home import FOLDERS, LAYOUT, Home, default_home, entries, is_number, read_file
from adapterkit.registry.names import is_name
from adapterkit.registry.record import OpaqueRecord, Record
from adapterkit.registry.scan import catch_up, folder_stamps, scan_name


@dataclass(frozen=True)
class RegistryProblem:
    """Something that is not as it should be. ``kind`` names the sort of file; ``repaired`` says whether it is right
    again.
    """

    kind: str
    path: str
    sentence: str
    repaired: bool = False


@dataclass(frozen=True)
class FsckReport:
    """What was read and what was found; ``notes`` are harmless (leftovers of killed writers, records of newer
    versions).
    """

    records: int
    blobs: int
    bytes: int
    aliases: int
    problems: tuple[RegistryProblem, ...]
    notes: tuple[str, ...]

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong that is not repaired."""
        return all(problem.repaired for problem in self.problems)


def fsck(*, repair: bool = False, part: tuple[int, int] = (1, 1), home: Path | None = None) -> FsckReport:
    """Reads and checks every record, journal, blob, alias, history, mark and tree, then compares the index with them.

    Writers may go on meanwhile; what is checked under its name's lock is never seen half done.

    Args:
        repair: put right what other files still say.
        part: ``(2, 7)`` checks the second of seven parts: the names and the blobs whose digests fall into it. All parts
            together check everything, in any order and on different days.

    Raises:
        UsageError: there is no such part.
    """
    if not 1 <= part[0] <= part[1] <= 1024:
        raise UsageError(f"there is no part {part[0]} of {part[1]}", "parts are counted from 1; there are at most 1024")
    return _Check(Home(home if home is not None else default_home()), repair, part).run()


class _Check:
    def __init__(self, home: Home, repair: bool, part: tuple[int, int]) -> None:
        self.home = home
        self.repair = repair
        self.part = part
        self.known: dict[int, Record | OpaqueRecord | None] = {}
        self.problems: list[RegistryProblem] = []
        self.notes: list[str] = []
        self.stored: dict[str, tuple[int, str]] = {}
        self.counts = {"records": 0, "blobs": 0, "bytes": 0, "aliases": 0}

    def run(self) -> FsckReport:
        if self.home.root.exists() and not self.home.root.is_dir():
            raise RegistryError(f"{self.home.root} is no folder", "name another home, or move it away")
        if self.home.root.exists() and any(entries(self.home.root)):
            first = self.part[0] == 1
            if first:
                self._folders()
                self._format()
            with closing(index.empty()) as wanted:
                self._all_names(wanted)
                rotten = self._blobs()
                self._missing(rotten)
                self._index(wanted)
            if first:
                self._chains()
                self._trees()
                self._leftovers()
        return FsckReport(**self.counts, problems=tuple(self.problems), notes=tuple(self.notes))

    def _all_names(self, wanted: sqlite3.Connection) -> None:
        """Checks each name, and puts what its files say into a fresh index, so that every record is read once."""
        stamps = folder_stamps(self.home, time.time_ns(), self._mine)
        wanted.execute("begin")
        for name in sorted(self._names()):
            with self._lock(name):
                self.known = {}
                self._records(name)
                self._journal(name)
                self._refs(name)
                self._marks(name)
            if name in stamps:
                scan_name(self.home, wanted, name, partial(self._loaded, name))
                wanted.execute("insert into scanned values (?, ?)", (name, stamps[name]))
        wanted.execute("commit")

    def _loaded(self, name: str, version: int) -> Record | OpaqueRecord:
        return self.known.get(version) or store.load(self.home, name, version)

    def _mine(self, name: str) -> bool:
        """Whether a name falls into this part."""
        number, parts = self.part
        return parts == 1 or int(sha256(name.encode())[:8], 16) % parts == number - 1

    def _my_blobs(self, folder: str) -> bool:
        number, parts = self.part
        right = re.fullmatch("[0-9a-f]{2}", folder) is not None
        return (int(folder, 16) if right else 0) % parts == number - 1

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """The lock of a name; none on a disk that cannot be written, where nobody changes anything."""
        with ExitStack() as stack:
            if os.access(self.home.root / "locks", os.W_OK):
                stack.enter_context(self.home.lock(name))
            yield

    def _say(self, kind: str, path: Path, sentence: str, fix: Callable[[], object] | None = None) -> None:
        repaired = False
        if self.repair and fix is not None:
            try:
                fix()
                repaired = True
            except (AdapterkitError, OSError) as error:
                sentence += f"; it could not be repaired: {error}"
        self.problems.append(RegistryProblem(kind, path.relative_to(self.home.root).as_posix(), sentence, repaired))

    def _folders(self) -> None:
        """Every folder of the layout is there and is one."""
        if not self.home.exists:
            return  # begun and never finished, see `_format`
        for name in FOLDERS:
            path = self.home.root / name
            if not os.path.lexists(path):
                self._say("folder", path, "this folder is missing", partial(path.mkdir, parents=True))
            elif not path.is_dir():
                self._say(
                    "folder", path, "something else is in the place of a folder", partial(self._folder_again, path)
                )

    def _folder_again(self, path: Path) -> None:
        if path == self.home.quarantine:
            path.rename(path.with_name(f"quarantine.{os.urandom(6).hex()}"))
        disk.make_folder(self.home.quarantine)
        blobs.set_aside(self.home, path, "no-folder")
        path.mkdir()

    def _read(self, path: Path) -> bytes:
        """A small file; nothing where it is missing or cannot be read, which is said where it matters."""
        try:
            return read_file(path)
        except (FileNotFoundError, RegistryError):
            return b""

    def _format(self) -> None:
        path = self.home.format
        if not os.path.lexists(path) and not self._names():
            # The mark comes last, so a home without it has nothing in it yet.
            self.notes.append("the registry was begun and never finished; whoever registers next finishes it")
            return
        data = self._read(path)
        if data == LAYOUT:
            return
        newer = re.fullmatch(rb"adapterkit registry [1-9][0-9]*\n", data) is not None
        what = "of a newer adapterkit" if newer else "damaged"
        self._say(
            "format", path, f"the mark of the layout is {what}", None if newer else partial(self._mark_again, path)
        )

    def _mark_again(self, path: Path) -> None:
        disk.make_folder(self.home.staging)
        disk.make_folder(self.home.quarantine)
        if os.path.lexists(path):
            blobs.set_aside(self.home, path, "damaged")
        with disk.staged(self.home.staging, LAYOUT) as temporary:
            disk.publish_new(temporary, path)

    def _names(self) -> set[str]:
        found: set[str] = set()
        for folder in ("records", "journal", "refs", "history", "hidden"):
            for entry in entries(self.home.root / folder):
                path = self.home.root / folder / entry.name
                if not self._mine(entry.name if is_name(entry.name) else ""):
                    continue
                if not is_name(entry.name):
                    self._say("stray", path, "this cannot be the name of an entry")
                    continue
                found.add(entry.name)
                if folder == "journal" and not path.is_file():
                    self._say("journal", path, "this is no file", partial(self._rebuild_journal, entry.name))
                elif folder != "journal" and not path.is_dir():
                    self._say("folder", path, "something else is in the place of a folder", partial(self._aside, path))
        return found

    def _aside(self, path: Path) -> None:
        blobs.set_aside(self.home, path, "no-folder")

    def _records(self, name: str) -> None:
        on_disk = self.home.versions(name)
        for entry in entries(self.home.records(name)):
            if not (entry.name.endswith(".json") and is_number(entry.name[:-5])):
                self._say("stray", Path(entry.path), "this is not the file of a version")
        for version in sorted(set(range(1, on_disk[-1] + 1 if on_disk else 1)) - set(on_disk)):
            self._say(
                "record",
                self.home.record(name, version),
                f"{name}@{version} is missing between versions that are there",
            )
        for version in on_disk:
            self.counts["records"] += 1
            record = self._load(name, version)
            if isinstance(record, OpaqueRecord):
                self.notes.append(f"{name}@{version} was written by a newer adapterkit and its files were not checked")
            elif record is not None and version not in self.home.hidden_versions(name):
                for file in record.files:
                    if file.stored:
                        self.stored.setdefault(file.sha256, (file.size, f"{record.ref} {file.path}"))

    def _load(self, name: str, version: int) -> Record | OpaqueRecord | None:
        try:
            self.known[version] = store.load(self.home, name, version)
            return self.known[version]
        except RegistryError as error:
            self._say("record", self.home.record(name, version), error.message)
        except NotFound:
            pass
        return None

    def _journal(self, name: str) -> None:
        path = self.home.journal(name)
        data = self._read(path)
        on_disk = self.home.versions(name)
        whole = data[: data.rfind(b"\n") + 1]
        lines = store.journal_lines(whole)
        # One line more than records is a registration that was killed, if its record is in staging still; one less is one
        # after a power cut.
        count = len(lines) if lines is not None else -1
        newest = on_disk[-1] if on_disk else 0
        killed = lines is not None and count == newest + 1 and lines[-1][2] in store.begun(self.home)
        if count > newest and not killed:
            gone = f"{name}@{newest + 1}{f' to {count}' if count > newest + 1 else ''}"
            self._say("record", self.home.record(name, newest + 1), f"{gone} vanished, says the journal")
            return
        wrong = lines is None
        for version, body, digest in lines or ():
            record = self.known.get(version)
            if record is not None and digest != store.UNKNOWN and record.digest != digest:
                wrong = True
            if isinstance(record, Record) and body not in (store.UNKNOWN, record.body):
                wrong = True
        if wrong or (len(whole) < len(data) and count < newest):
            fix = partial(self._rebuild_journal, name)
            self._say("journal", path, "it does not say what the records say", fix)
        elif count < newest or len(whole) < len(data):
            self.notes.append(f"the journal of {name} lacks its end, which the next registration adds")
        elif count > newest:
            self.notes.append(f"the journal of {name} has the line of a registration that was killed")

    def _rebuild_journal(self, name: str) -> None:
        store.rebuilt_journal(self.home, name)

    def _refs(self, name: str) -> None:
        aliases = set(self.home.alias_names(name))
        aliases |= {e.name for e in entries(self.home.root / "history" / name) if is_name(e.name)}
        for alias in sorted(aliases):
            self.counts["aliases"] += 1
            path = self.home.root / "refs" / name / alias
            good, sound = self._history(name, alias)
            try:
                current = refs.read_move(read_file(path), name, alias, str(path)) if os.path.lexists(path) else None
            except (RegistryError, FileNotFoundError) as error:
                said = error.message if isinstance(error, RegistryError) else "this leads nowhere"
                self._say("ref", path, said, partial(self._restore_ref, good[-1]) if good and sound else None)
                continue
            if current is None:
                if len(good) > 1 or not sound:
                    fix = partial(self._restore_ref, good[-1]) if good and sound else None
                    self._say("ref", path, f"{name}@{alias} has a history and no ref", fix)
                continue
            self._history_fits(name, alias, current, good, sound)
            if current.version:
                self._target(path, current)

    def _history(self, name: str, alias: str) -> tuple[list[refs.Move], bool]:
        """The sound lines of a history and whether all of it is sound and chained; a torn last line is no damage."""
        path = self.home.root / "history" / name / alias
        data = self._read(path)
        good: list[refs.Move] = []
        sound = True
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            try:
                move = refs.read_move(line, name, alias, str(path))
            except RegistryError:
                sound = False
                continue
            sound = sound and (not good or (move.prev == good[-1].sum and move.seq == good[-1].seq + 1))
            good.append(move)
        return good, sound

    def _history_fits(self, name: str, alias: str, current: refs.Move, good: list[refs.Move], sound: bool) -> None:
        path = self.home.root / "history" / name / alias
        sums = [move.sum for move in good]
        # One line behind the ref is a move that was killed before anybody saw it.
        if sound and current.sum in sums[-2:]:
            return
        chain = [current]
        for move in reversed(good):
            if move.sum == chain[-1].prev:
                chain.append(move)
        lines = b"".join(move.line for move in reversed(chain))
        sentence = f"the history of {name}@{alias} is damaged or does not end where the alias is"
        self._say("history", path, sentence, partial(self._rewrite, path, lines))

    def _target(self, path: Path, move: refs.Move) -> None:
        try:
            record = store.load(self.home, move.name, move.version)
        except NotFound:
            self._say("ref", path, f"{move.name}@{move.alias} points to version {move.version}, which is not there")
        except RegistryError:
            pass  # Said already, with the record.
        else:
            if record.digest != move.digest:
                self._say(
                    "ref",
                    path,
                    f"{move.name}@{move.alias} was set to another record than version {move.version} is now",
                )

    def _restore_ref(self, move: refs.Move) -> None:
        self._rewrite(self.home.ref(move.name, move.alias), move.line)

    def _rewrite(self, path: Path, data: bytes) -> None:
        if os.path.lexists(path):
            blobs.set_aside(self.home, path, path.parent.parent.name)
        if os.path.lexists(path.parent) and not path.parent.is_dir():
            self._aside(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk.staged(self.home.staging, data) as temporary:
            disk.publish_over(temporary, path)

    def _marks(self, name: str) -> None:
        on_disk = self.home.versions(name)
        for entry in entries(self.home.root / "hidden" / name):
            path = Path(entry.path)
            if not is_number(entry.name) or int(entry.name) not in on_disk:
                self._say("hidden", path, "this marks no version that is there")
                continue
            try:
                store.check_mark(read_file(path), name, int(entry.name), str(path))
            except (RegistryError, FileNotFoundError) as error:
                self._say("hidden", path, getattr(error, "message", "this leads nowhere"))

    def _chains(self) -> None:
        for path in chain.chains(self.home):
            try:
                chain.read_chain(path)
            except RegistryError as error:
                self._say(path.parent.name, path, error.message)

    def _blob_files(self) -> Iterator[Path]:
        top = self.home.root / "objects" / "sha256"
        for folder in sorted(entries(top), key=lambda entry: entry.name):
            if not self._my_blobs(folder.name):
                continue
            for entry in sorted(entries(top / folder.name), key=lambda entry: entry.name):
                yield Path(entry.path)

    def _blobs(self) -> set[str]:
        """Reads every blob; the digests of those that are rotten."""
        rotten: set[str] = set()
        for path in self._blob_files():
            try:
                if not path.is_symlink() and not path.is_file():
                    if os.path.lexists(path):  # else gc took it
                        rotten.add(path.name)
                        self._say("blob", path, "this is no file", partial(self._quarantine, path))
                    continue
                digest, size = disk.hash_file(path)
            except FileNotFoundError:
                continue  # gc may run meanwhile.
            except OSError as error:
                rotten.add(path.name)
                self._say("blob", path, f"it cannot be read: {error.strerror}")
                continue
            self.counts["blobs"] += 1
            self.counts["bytes"] += size
            if digest != path.name or path.parent.name != digest[:2]:
                rotten.add(path.name)
                of = self.stored.get(path.name)
                lost = f"; {of[1]} is lost here" if of else ""
                self._say("blob", path, f"its bytes have another digest{lost}", partial(self._quarantine, path))
        return rotten

    def _quarantine(self, path: Path) -> None:
        blobs.set_aside(self.home, path, "rotten")

    def _missing(self, rotten: set[str]) -> None:
        for digest, (size, what) in sorted(self.stored.items()):
            if digest not in rotten and not blobs.has(self.home, digest, size):
                self._say(
                    "missing", self.home.blob(digest), f"the bytes of {what} are not there; register or import it again"
                )

    def _trees(self) -> None:
        """Trees are links that can be made again; a link to something else than a blob or record was not made here."""
        top = self.home.root.resolve()
        for tree in entries(self.home.root / "trees"):
            for path in Path(tree.path).rglob("*"):
                if path.is_symlink() or not path.is_dir():
                    real = path.resolve()
                    inside = real.is_relative_to(top / "objects") or real.is_relative_to(top / "records")
                    if not path.is_symlink() or not inside:
                        self._say(
                            "tree", path, "this is not a link to a blob; remove the tree, it is made again when needed"
                        )

    def _index(self, wanted: sqlite3.Connection) -> None:
        """Compares a copy of the index, brought up to date in memory, with the one that was made of the files."""
        if not os.path.lexists(self.home.index):
            return
        catch_up(self.home, wanted, self._mine)
        mine = None if self.part[1] == 1 else self._mine
        found = index.checked_copy(self.home, mine)
        if found is not None and found != index.content_of(wanted, mine):
            fix = partial(index.reindex, self.home)
            self._say("index", self.home.index, "it is damaged or does not say what the files say", fix)

    def _leftovers(self) -> None:
        for folder in ("staging", "incoming"):
            if count := len(entries(self.home.root / folder)):
                self.notes.append(
                    f"{folder}/ holds {counted(count, 'temporary file')} of writers at work or killed; gc takes old ones away"
                )
