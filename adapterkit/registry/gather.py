"""Which files of a folder belong to an artefact, and what the folder says about itself.

Only data is read here: no pickle is opened, no code imported, and a configuration is parsed as JSON.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.folder import PIPELINE_WEIGHTS
from adapterkit.errors import NotFound, RegistryError, UnsafeError, UsageError
from adapterkit.registry.canonical import MAX_BYTES, parse
from adapterkit.registry.identity import Identity
from adapterkit.registry.names import check_path, is_repo
from adapterkit.registry.record import BESIDE

if TYPE_CHECKING:
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.listing import Listing

# Left behind by training, version control and desktops; a leading dot also keeps `.env` and its kind out.
_SKIPPED = re.compile(
    r"(?:\..*|__pycache__|checkpoint-\d+|runs|wandb|.*\.tmp|.*~|optimizer\.(?:pt|bin)|trainer_state\.json|scheduler\.pt|scaler\.pt"
    r"|rng_state.*\.pth|training_args\.bin|lost\+found|thumbs\.db|desktop\.ini)",
    re.IGNORECASE,
)
_KEPT = {".gitattributes"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_METHODS = {
    "LORA": "lora",
    "ADALORA": "adalora",
    "LOHA": "loha",
    "LOKR": "lokr",
    "IA3": "ia3",
    "VERA": "vera",
    "OFT": "oft",
}


@dataclass(frozen=True)
class GatheredFiles:
    """The files of an artefact as ``(path in the record, path on disk)``, and what was left out."""

    files: tuple[tuple[str, Path], ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Described:
    """What a folder says about itself; an empty field is not said."""

    kind: str = ""
    method: str = ""
    parameters: tuple[tuple[str, Any], ...] = ()
    base: Identity | None = None


def gather(path: Path) -> GatheredFiles:
    """The regular files of a folder (or the one file), without training state, hidden files and ``adapterkit.json``.

    Raises:
        NotFound: ``path`` does not exist.
        UnsafeError: a symbolic link leads out of the folder; those in a Hugging Face cache or registry are followed.
        UsageError: no file is left.
    """
    if path.is_file():
        return GatheredFiles(((check_path(path.name, str(path)), path),), ())
    if not path.is_dir():
        raise NotFound(f"{path} does not exist")
    top = _allowed_root(path)
    files: list[tuple[str, Path]] = []
    skipped: list[str] = []
    for folder, names, found in os.walk(path):
        inside = Path(folder).relative_to(path)
        for name in [name for name in names if _skip(name)]:
            names.remove(name)
            skipped.append((inside / name).as_posix() + "/")
        for name in found:
            relative = (inside / name).as_posix()
            if _skip(name):
                skipped.append(relative)
            elif relative != BESIDE:
                files.append((check_path(relative, f"a file of {path}"), _regular(Path(folder) / name, top)))
        for name in [name for name in names if Path(folder, name).is_symlink()]:
            raise UnsafeError(f"{Path(folder, name)} is a link to a folder", "copy the folder in its place")
    if not files:
        raise UsageError(f"{path} holds no file that belongs to an artefact")
    return GatheredFiles(tuple(sorted(files)), tuple(sorted(skipped)))


def gather_listed(listing: Listing) -> list[tuple[str, Source]]:
    """As `gather`, of a folder that is not on this disk: the files that belong to an artefact, with their bytes."""
    names = [name for name in listing.every if name != BESIDE and not any(map(_skip, name.split("/")))]
    return [(check_path(name, f"a file of {listing.ref}"), listing.open(name)) for name in sorted(names)]


def describe(path: Path) -> Described:
    """What ``adapter_config.json`` or ``config.json`` of a folder tells.

    Raises:
        RegistryError: the configuration is not JSON.
    """
    config = _json(path / "adapter_config.json")
    if config is not None:
        peft = str(config.get("peft_type", ""))
        method = "dora" if config.get("use_dora") is True else _METHODS.get(peft, peft.lower() or "lora")
        names = ("r", "lora_alpha", "use_rslora", "target_modules", "modules_to_save", "rank_pattern", "alpha_pattern")
        parameters = tuple((name, config[name]) for name in names if config.get(name) not in (None, [], {}))
        return Described("adapter", method, parameters, _base(config))
    if (path / PIPELINE_WEIGHTS).is_file():
        return Described("adapter", "lora")
    if _json(path / "config.json") is not None:
        return Described("merged")
    return Described()


def named_base(path: Path) -> str:
    """What ``adapter_config.json`` of a folder calls the base: a Hub id, a path, or any other name; "" where it says none.

    Raises:
        RegistryError: the configuration is not JSON.
    """
    name = (_json(path / "adapter_config.json") or {}).get("base_model_name_or_path")
    return name if isinstance(name, str) and name.isprintable() else ""


def _base(config: Mapping[str, Any]) -> Identity | None:
    """The base that a PEFT configuration names: a Hub id and a pinned commit, never a local path."""
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not is_repo(name) or os.path.exists(name):
        return None
    return Identity(name, revision if isinstance(revision, str) and _COMMIT.fullmatch(revision) else "")


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_BYTES:
        raise RegistryError(f"{path} is larger than {MAX_BYTES} bytes and is not read as JSON")
    value = parse(path.read_bytes(), str(path))
    if not isinstance(value, dict):
        raise RegistryError(f"{path} is not a JSON object")
    return value


def _skip(name: str) -> bool:
    return name not in _KEPT and _SKIPPED.fullmatch(name) is not None


def _allowed_root(path: Path) -> Path:
    """The folder that links may not leave: the Hugging Face cache or registry it is a part of, else itself."""
    real = path.resolve()
    for parent in real.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith(("models--", "datasets--")):
            return parent.parent.parent
        if parent.name == "trees" and (parent.parent / "format").is_file():
            return parent.parent
    return real


def _regular(path: Path, top: Path) -> Path:
    real = path.resolve()
    if path.is_symlink() and not real.is_relative_to(top):
        raise UnsafeError(f"{path} is a link that leads out of its folder", "copy the file in its place")
    if not real.is_file():
        raise UnsafeError(f"{path} is not a regular file", "take it out of the folder")
    return real
