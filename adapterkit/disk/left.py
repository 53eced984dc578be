"""What killed runs left on this machine: found by names, known by marks, locks and owners.

The names, from the code that makes them:

* ``.NAME.partial``, where an output is made, and ``.NAME.replaced``, while it takes the place of another (`disk.folders`);
* ``.NAME.….part``, a small file on its way (`disk.files`), and a folder of 24 hex digits that looks whose a new folder is;
* ``.adapterkit-….`` beside a file that is measured or probed, and ``adapterkit-….`` in the folder for temporary files.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from adapterkit.disk.folders import hidden_folder, is_busy, is_of_user, is_own, may_be_shortened, recover, remove_own
from adapterkit.errors import NotFound

_WORKING = re.compile(r"\.(.+)\.(partial|replaced)")
_FILE = re.compile(r"\..+\.[0-9a-f]{16}\.part")
_PROBE = re.compile(r"\.[0-9a-f]{24}")
# As tempfile names it; eight letters without a digit may be a word, of a user's own folder.
_LENT = re.compile(r"\.?adapterkit-([a-z]+-)?(?=[a-z]*[0-9_])[a-z0-9_]{8}")


@dataclass(frozen=True)
class SweptFolder:
    """What runs left on this machine.

    Attributes:
        folder: where it was looked.
        left: files and folders that nobody is at and nobody wrote to lately; taken away where that was asked for.
        kept: those of them that could not be taken away.
    """

    folder: str
    left: tuple[str, ...]
    kept: tuple[str, ...] = ()
    applied: bool = False


def sweep_folder(where: Path, *, keep_days: float = 1.0, apply: bool = False) -> SweptFolder:
    """Take away what runs left at or below a folder, or of one output, that nobody is at.

    Args:
        keep_days: for how long nothing was written there.
        apply: take it away; else it is only named.

    Raises:
        NotFound: there is no such folder, nor anything of an output of that name.
    """
    named = sorted(_named(where))
    if not named and not os.path.exists(where):
        raise NotFound(f"{where} does not exist", "give a folder, an output, or an address like s3://bucket/folder")
    found = [path for path in named if _is_left(path, time.time() - keep_days * 86400)]
    kept = [path for path in found if apply and not _take_away(path, where)]
    return SweptFolder(str(where), tuple(map(str, found)), tuple(map(str, kept)), apply)


def _take_away(path: Path, where: Path) -> bool:
    """Take away something that was left; False where somebody is at it by now, or the system refuses. An output that was being
    replaced is put right first; if its name is too long to stand in ours, only where it was asked for by that name."""
    name = _WORKING.fullmatch(path.name)
    if name is not None and name[2] == "replaced":
        asked = path == hidden_folder(where, "replaced")
        if not asked and may_be_shortened(name[1]):
            return False
        recover(where if asked else path.with_name(name[1]))
        return not os.path.lexists(path)
    if not path.is_dir():
        try:
            path.unlink()
        except OSError:
            return False
        return True
    return remove_own(path)


def _named(where: Path) -> Iterator[Path]:
    """Files and folders that are called as a run calls its own; no link is followed."""
    if where.name:  # by their names alone: a folder above may be closed to listing, as /home often is
        beside = [hidden_folder(where, kind) for kind in ("partial", "replaced")]
        yield from (one for one in beside if os.path.lexists(one))
    for folder, names, files in os.walk(where):
        ours = [name for name in names if any(kind.fullmatch(name) for kind in (_WORKING, _PROBE, _LENT))]
        yield from (Path(folder, name) for name in (*ours, *(name for name in files if _FILE.fullmatch(name))))
        names[:] = [name for name in names if name not in ours]


def _is_left(path: Path, before: float) -> bool:
    try:
        info = path.lstat()
        if stat.S_ISREG(info.st_mode):
            mine = not hasattr(os, "geteuid") or info.st_uid == os.geteuid()
            return mine and info.st_mtime <= before
        if _WORKING.fullmatch(path.name):
            ours = is_own(path) and not is_busy(path) and not is_busy(path / "new")
        else:
            unused = not _PROBE.fullmatch(path.name) or not os.listdir(path)
            # tempfile closes its folders to others; most that users make are open.
            closed = not _LENT.fullmatch(path.name) or os.name == "nt" or not stat.S_IMODE(info.st_mode) & 0o077
            ours = is_of_user(path) and unused and closed
        return ours and newest(path) <= before
    except OSError:
        return False


def newest(path: Path) -> float:
    """When a file, or anything in a folder, was last written, in seconds since 1970. No link is followed.

    Raises:
        OSError: it is gone, or something in it went while it was looked at.
    """
    times = [path.lstat().st_mtime]
    for above, names, files in os.walk(path) if not path.is_symlink() else ():
        times += [Path(above, name).lstat().st_mtime for name in (*names, *files)]
    return max(times)
