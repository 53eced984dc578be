"""``adapterkit.lock``: what a recipe's references meant, byte for byte, and what was made of them.

A Hub id is pinned by its commit, a registry name by its version, a path by the sha256 of its files. Versions of what
computes are pinned too, and the digests of the outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from adapterkit import disk
from adapterkit._version import __version__
from adapterkit.adapters.load import file_and_parts
from adapterkit.checkpoint.hub_ref import parse_hub
from adapterkit.checkpoint.json_data import parse_json
from adapterkit.checkpoint.listing import LocalFolder
from adapterkit.checkpoint.open import locate
from adapterkit.errors import CheckFailed, CheckpointError, NotFound, RecipeError, option
from adapterkit.places import address_of
from adapterkit.recipe.in_store import states_of, states_of_file
from adapterkit.recipe.input_names import names_beside, names_read
from adapterkit.recipe.parse import OPTIONS, RecipeFile, shown
from adapterkit.recipe.schema import Table, known_options
from adapterkit.recipe.state import State, digest_of, key_of
from adapterkit.recipe.steps import Input, Step, located
from adapterkit.requests.option import PAIRS

FORMAT = 1
TORCH = ("torch", "numpy")
_MOVING = ("registry", "hub")  # kinds of references that may mean something else tomorrow
_HUB = "hf://"
GGUF_TOO = ("numba", "llvmlite", "xllamacpp")  # what encodes K-quants and i-quants


@dataclass(frozen=True)
class Pinned:
    """What a reference means now.

    Attributes:
        ref: as the recipe says it.
        kind: ``path``, ``store``, ``registry`` or ``hub``.
        pin: ``org/name@commit``, ``name@version``, or the path or address itself.
        files: sha256 of what is read, by name, and of objects in a store their size and ETag; empty where the pin says it
            all.
    """

    ref: str
    kind: str
    pin: str
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """What decides the bytes that are read; a path's name does not."""
        return digest_of(self.files) if self.files else key_of(self.pin)


@dataclass(frozen=True)
class Locked:
    """An output as it was made."""

    path: str
    digest: str
    files: Mapping[str, str]


@dataclass(frozen=True)
class Lock:
    """The content of a lock file.

    Attributes:
        recipe: digest of what the recipe says; comments and layout do not count.
        versions: of what computes.
        inputs: by the key of the recipe that names them.
        outputs: by name.
        machine: on which kind of processor they were made; another one may round the last bit of float32 otherwise.
    """

    recipe: str
    versions: Mapping[str, str]
    inputs: Mapping[str, Pinned]
    outputs: Mapping[str, Locked] = field(default_factory=dict)
    machine: str = ""

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def lock_path(recipe: Path) -> Path:
    """The lock of a recipe: ``adapterkit.lock``, or ``NAME.lock`` of another ``NAME.toml``."""
    return recipe.with_name("adapterkit.lock" if recipe.name == "pyproject.toml" else f"{recipe.stem}.lock")


def read_lock(path: Path) -> Lock | None:
    """A lock, or None where there is none.

    Raises:
        RecipeError: it is damaged, or of another version.
    """
    try:
        data = parse_json(disk.read_regular(path, 1 << 28), str(path))
        if data.pop("format") != FORMAT:
            raise RecipeError(
                f"{path} is of another version of adapterkit",
                f"build without {option('locked', True)} to write it anew",
            )
        inputs = {name: Pinned(**entry) for name, entry in data.pop("inputs").items()}
        outputs = {name: Locked(**entry) for name, entry in data.pop("outputs").items()}
        return Lock(inputs=inputs, outputs=outputs, **data)
    except NotFound:
        return None
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError):
        hint = f"restore it, or delete it and build without {option('locked', True)}"
        raise RecipeError(f"{path} is not a lock file, or a damaged one", hint, (str(path), 1)) from None


def write_lock(path: Path, lock: Lock) -> bool:
    """Write a lock where it says something new; whether it did."""
    data = lock.to_json().encode()
    if path.is_file() and path.read_bytes() == data:
        return False
    with disk.writing(path.name, path.parent):
        disk.write_file(path, data)
    return True


class Resolver:
    """Finds out what references mean; each is looked up once.

    Args:
        file: the recipe.
        state: remembers hashes.
        locked: pins to use in the place of what a Hub branch or an alias means today.
    """

    def __init__(self, file: RecipeFile, state: State, locked: Lock | None = None) -> None:
        self._file, self._state, self._locked = file, state, locked
        self._known: dict[tuple[str, bool], Pinned] = {}

    def pinned(self, one: Input) -> Pinned:
        """What an input of a step means.

        Raises:
            NotFound, AuthError, HubError, RegistryError
        """
        adapter = one.place[0] == "adapters"
        if (one.ref, adapter) not in self._known:
            with located(self._file, *one.place):
                self._known[one.ref, adapter] = self._look(one, adapter)
        return self._known[one.ref, adapter]

    def _look(self, one: Input, adapter: bool) -> Pinned:
        if isinstance(one.path, Path):
            files = read_files(one.path, adapter=adapter)
            return Pinned(one.ref, "path", one.ref, self._state.hash_files(files))
        address = address_of(one.ref)
        if address is not None:
            known = states_of_file(address) if one.whole else states_of(address, adapter=adapter)
            return Pinned(one.ref, "store", str(address), known)
        before = self._locked.inputs.get(shown(one.place)) if self._locked is not None else None
        ref = before.pin if before is not None and before.ref == one.ref and before.kind in _MOVING else one.ref
        if "/" not in one.ref.removeprefix(_HUB):
            from adapterkit.provenance.register import registered

            record = registered(ref)
            if record is None:
                raise NotFound(f"{ref} is not in the registry", "register or pull it first")
            return Pinned(one.ref, "registry", record.ref, {file.path: file.sha256 for file in record.files})
        hub = parse_hub(ref)
        assert hub is not None
        commit = hub.revision if hub.revision and len(hub.revision) == 40 else locate(ref, headers_only=True).commit
        whole = f"{hub.repo}/{hub.subfolder}" if hub.subfolder else hub.repo
        return Pinned(one.ref, "hub", f"{whole}@{commit}")


def read_files(path: Path, *, adapter: bool = False) -> dict[str, Path]:
    """The files of a path that a step reads: weights, config, and what travels with them; no pickle, no training state."""
    path, _ = file_and_parts(path)
    if path.is_file():
        beside = {name: path.with_name(name) for name in names_beside(path.name, adapter=adapter)}
        return {path.name: path, **{name: one for name, one in beside.items() if one.is_file()}}
    return {name: path / name for name in names_read(LocalFolder(path)) if (path / name).is_file()}


def versions(steps: Sequence[Step]) -> dict[str, str]:
    """Versions of what computes the outputs; nothing of it is imported."""
    from importlib.metadata import PackageNotFoundError, version

    names = [*TORCH, *(GGUF_TOO if any(step.to == "gguf" for step in steps) else ())]
    found = {"adapterkit": __version__}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def recipe_digest(file: RecipeFile) -> str:
    """A digest of what the recipe says; what it leaves at the default counts no more than a comment, so that a key which
    a later version knows moves no lock."""
    return key_of(_said(file.recipe))


def _said(value: Any) -> Any:
    """A value of a recipe as plain JSON, without fields that have their default."""
    if isinstance(value, Mapping):
        return {name: _said(one) for name, one in value.items()}
    if not is_dataclass(value):
        return value
    pairs = [(one, getattr(value, one.name)) for one in fields(value) if one.name != OPTIONS]
    found = {
        one.name: _said(given)
        for one, given in pairs
        if given != (one.default if one.default_factory is MISSING else one.default_factory())
    }
    for key, known in known_options(getattr(value, "TABLE", "")).items():
        given = getattr(value, OPTIONS).get(known.name, known.default) if isinstance(value, Table) else known.default
        if given != known.default:
            plain = dict(given) if known.option.kind == PAIRS else given
            found[_NAMES.get(key, key.replace("-", "_"))] = _said(plain)
    return found


# Keys that a lock calls by another name.
_NAMES = {"for": "for_", "lambda": "scale"}


def check_locked(path: Path, before: Lock | None, now: Lock) -> None:
    """Hold what is there now against a lock.

    Raises:
        NotFound: there is no lock.
        CheckFailed: something moved; the sentence names it.
    """
    if before is None:
        raise NotFound(f"{path} does not exist", f"build once without {option('locked', True)} and commit the lock")
    moved = []
    if before.recipe != now.recipe:
        moved.append("the recipe changed")
    for name in sorted(before.versions.keys() | now.versions.keys()):
        old, new = before.versions.get(name, "none"), now.versions.get(name, "none")
        if old != new:
            moved.append(f"{name} {old} -> {new}")
    for name, one in now.inputs.items():
        moved += _moved(name, before.inputs.get(name), one)
    if moved:
        more = f" (and {len(moved) - 4} more)" if len(moved) > 4 else ""
        raise CheckFailed(
            f"{path} is of something else: {'; '.join(moved[:4])}{more}",
            f"restore it, or build without {option('locked', True)} to move the lock",
            (str(path), 1),
        )


def _moved(name: str, before: Pinned | None, now: Pinned) -> list[str]:
    if before is None:
        return [f"{name} is not in it"]
    if before.kind != now.kind:
        return [f"{name} was a {before.kind} and is a {now.kind}"]
    if before.kind in _MOVING and before.pin != now.pin:
        return [f"{name} {before.pin} -> {now.pin}"]
    found = []
    for file in sorted(before.files.keys() | now.files.keys()):
        old, new = before.files.get(file, ""), now.files.get(file, "")
        if old != new:
            most = None if now.kind == "store" else 12
            how = "is gone" if not new else "is new" if not old else f"changed ({old[:most]} -> {new[:most]})"
            found.append(f"{now.ref}/{file} {how}")
    return found


def check_outputs(path: Path, before: Lock, outputs: Mapping[str, Locked]) -> list[str]:
    """Hold what was made against a lock; notes where another kind of processor made it.

    Raises:
        CheckFailed: an output has other bytes than the lock says, on the same kind of processor.
    """
    notes = []
    for name, made in outputs.items():
        said = before.outputs.get(name)
        if said is None or said.digest == made.digest:
            continue
        file = next((f for f, digest in made.files.items() if said.files.get(f) != digest), "a file that is gone")
        what = f"outputs.{name} has other bytes than {path.name} says, first in {file}"
        here = machine()
        if before.machine not in ("", here):
            notes.append(f"{what}: it was made on {before.machine}, and this is {here}")
            continue
        hint = f"build without {option('locked', True)} to see what changed, and look at the versions of what computes"
        raise CheckFailed(what, hint, (str(path), 1))
    return notes


def machine() -> str:
    """The kind of processor, as far as it decides how float32 is rounded."""
    import platform

    import torch

    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
