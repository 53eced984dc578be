"""Folders whose weights are pickles, made into folders of safetensors: only when asked for, and in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from adapterkit.checkpoint.files import FirstSeen, LocalFile, seen
from adapterkit.checkpoint.folder import ADAPTER_WEIGHTS, INDEX, SINGLE, is_beside
from adapterkit.checkpoint.listing import LocalFolder, check_plain, read_json
from adapterkit.checkpoint.sharded import sharded_checkpoint
from adapterkit.errors import CheckpointError, NotFound
from adapterkit.pickles.apart import CHILD, answered
from adapterkit.pickles.checkpoints import gather
from adapterkit.pickles.megatron import gather_megatron

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from adapterkit.checkpoint.checkpoint import Checkpoint

_NAMES = {"adapter_model.bin": ADAPTER_WEIGHTS, "pytorch_model.bin": SINGLE}
_INDEX = "pytorch_model.bin.index.json"


@contextmanager
def unpickled(
    src: str | Path,
    beside: Path,
    base: Callable[[], Checkpoint] | None = None,
    watched: list[FirstSeen] | None = None,
) -> Iterator[Path]:
    """The same folder with its pickled weights as safetensors, for as long as the context lasts.

    A child process loads each file with ``torch.load(weights_only=True)``, which builds tensors and nothing else, and
    writes its tensors out. Other files come along. A folder that has no pickled weights is given back as it is.

    Args:
        src: a folder.
        beside: where the temporary folder is made; it needs as much room as the weights.
        base: opens the base, which a checkpoint of Megatron needs; raises where none was given.
        watched: gets the files that were read, as they were before.

    Raises:
        NotFound: no such folder.
        UnsafeError: a pickle that is more than tensors, or names that lead out of the folder.
        CheckpointError: it cannot be read, holds something else, or changed while it was read.
    """
    folder = Path(src).expanduser()
    if not folder.is_dir():
        raise NotFound(f"{src} is no folder here", "pickles are only converted from a folder; download it first")
    sharded = sharded_checkpoint(folder)
    if sharded is not None:
        configs = [one for one in (sharded.config, sharded.run) if one is not None]
        before = [first for one in (sharded.folder, *configs) for first in seen(one)]
        with TemporaryDirectory(dir=beside, prefix=".gathered.") as made:
            place = Path(made) / (folder.resolve().name or "adapter")
            if sharded.kind == "mcore":
                assert base is not None
                gather_megatron(sharded, Path(made), place, base())
            else:
                place.mkdir()
                gather(sharded, place)
            _unchanged(before, watched)
            yield place
        return
    found = _pickled(folder)
    if not found:
        yield folder
        return
    before = [LocalFile(folder / name).seen for name in found]
    with TemporaryDirectory(dir=beside, prefix=".unpickled.") as made:
        place = Path(made) / folder.resolve().name
        place.mkdir()
        weight_map: dict[str, str] = {}
        for name, new in found.items():
            for key in _convert(folder / name, place / new):
                weight_map[key] = new
        if len(found) > 1:
            (place / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        listing = LocalFolder(folder)
        for name in listing.names - {*found, _INDEX}:
            if is_beside(name, listing.names) and (folder / name).is_file():
                listing.open(name)  # a link out of the folder would be a plain file in this one
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                _link(folder / name, place / name)
        _unchanged(before, watched)
        yield place


def _unchanged(before: list[FirstSeen], watched: list[FirstSeen] | None) -> None:
    for one in before:
        one.check_unchanged()
    if watched is not None:
        watched += before


def _link(path: Path, new: Path) -> None:
    """The same file in another folder; a copy where a link cannot be made."""
    try:
        os.link(path.resolve(), new)
    except OSError:
        shutil.copyfile(path, new)


def _pickled(folder: Path) -> dict[str, str]:
    """Pickled weights of a folder, and what their files are called as safetensors."""
    for name, new in _NAMES.items():
        if (folder / name).is_file() and not (folder / new).exists():
            return {name: new}
    index = folder / _INDEX
    if not index.is_file() or (folder / SINGLE).exists() or (folder / INDEX).exists():
        return {}
    try:
        shards = sorted(set(read_json(LocalFile(index))["weight_map"].values()))
    except (KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{index} is damaged", "download it again") from None
    for name in shards:
        check_plain(str(name), str(index))
        if not (folder / name).is_file():
            raise NotFound(f"{folder / name} is missing", "download it too")
    count = len(shards)
    return {name: f"model-{number:05d}-of-{count:05d}.safetensors" for number, name in enumerate(shards, 1)}


def _convert(path: Path, out: Path) -> list[str]:
    """Convert one file; gives the names of its tensors."""
    return answered(CHILD.name, str(path), str(out))
