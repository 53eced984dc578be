"""Opening an adapter: a PEFT or MLX folder, or a single file of another trainer; no tensor is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.adapters.adapter import WEIGHTS, Adapter
from adapterkit.adapters.config import PARTS, AdapterConfig
from adapterkit.adapters.experts import order_notes
from adapterkit.adapters.formats import mlx
from adapterkit.adapters.keys import plain_keys
from adapterkit.checkpoint.checkpoint import SideFile
from adapterkit.checkpoint.files import LocalFile, is_gguf
from adapterkit.checkpoint.folder import (
    ADAPTER_CONFIG,
    ADAPTER_INDEX,
    PICKLES,
    PIPELINE_WEIGHTS,
    read_shards,
    side_names,
)
from adapterkit.checkpoint.header import parse_header
from adapterkit.checkpoint.open import locate
from adapterkit.checkpoint.tensor import Stored
from adapterkit.errors import AdapterError, NotFound, UnsafeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.listing import Listing
    from adapterkit.checkpoint.tensor import Tensor


def load_adapter(ref: str | Path, *, headers_only: bool = False) -> Adapter:
    """Open an adapter; no tensor is read.

    Args:
        ref: a folder as PEFT or mlx-lm saves it, ``org/name[/sub/folder][@revision]`` on the Hub, or a single
            ``.safetensors`` of kohya's scripts, LyCORIS or diffusers, ``FILE#PART`` for one part of the pipeline in it
            and ``FILE#te+unet`` for several that one base holds.
        headers_only: for a Hub id, read only the headers, by HTTP range.

    Raises:
        NotFound: no adapter there.
        UnsafeError: pickled weights only.
        AdapterError: config or weights are damaged or contradict each other.
        AuthError, HubError: the Hub said so.
    """
    path, parts = file_and_parts(ref)
    if path.is_file() and path.suffix == ".safetensors":
        return _single_file(LocalFile(path, str(ref), loose=True), str(ref), only=parts)
    if is_gguf(path):
        road = f"make a PEFT adapter of it: adapterkit convert {path.name} --to peft --base BASE -o DIR"
        raise AdapterError(f"{ref} is a GGUF file, which is not read as an adapter here", road)
    listing = locate(ref, headers_only=headers_only)
    if ADAPTER_CONFIG not in listing.names:
        if PIPELINE_WEIGHTS in listing.names:
            return _single_file(listing.open(PIPELINE_WEIGHTS), listing.ref, listing.commit)
        raise _no_config(listing)
    config = AdapterConfig(listing.json(ADAPTER_CONFIG), f"{listing.ref.rstrip('/')}/{ADAPTER_CONFIG}")
    if mlx.is_mlx(listing.names, config.raw):
        source, stored = _stored(listing, mlx.WEIGHTS)
        config, tensors = mlx.read_mlx(stored, config.raw, config.where)
        return Adapter(listing.ref, config, tensors, source, commit=listing.commit, notes=("read as an MLX adapter",))
    if not config.peft_type:
        raise AdapterError(f"{config.where} names no peft_type", "it is not a PEFT adapter config, or a damaged one")
    sources, weights = _weights(listing)
    tensors, notes = plain_keys(weights, sources[0].name)
    side_files = tuple(
        SideFile(name, listing.open(name)) for name in side_names(listing.names, {WEIGHTS}) if is_brought(name)
    )
    notes = (*notes, *order_notes(config))
    return Adapter(listing.ref, config, tensors, sources[0], side_files, listing.commit, notes, sources[1:])


def file_and_parts(ref: str | Path) -> tuple[Path, tuple[str, ...]]:
    """A path, and the parts of a pipeline that ``FILE#PART`` or ``FILE#PART+PART`` names."""
    path = Path(ref).expanduser()
    head, _, parts = str(path).rpartition("#")
    named = parts and not path.exists() and Path(head).is_file()
    return (Path(head), tuple(parts.split("+"))) if named else (path, ())


def is_adapter(ref: str | Path) -> bool:
    """Whether `load_adapter` is what opens ``ref``: a folder or Hub id with an adapter in it, or a file of one.

    Raises:
        NotFound, CheckpointError, AuthError, HubError
    """
    from adapterkit.adapters.formats import diffusers, kohya

    path, _ = file_and_parts(ref)
    if path.is_file():
        if path.suffix != ".safetensors":
            return False
        source = LocalFile(path, str(ref), loose=True)
        keys = parse_header(source.read, source.size, source.name).tensors
        return kohya.is_kohya(keys) or diffusers.is_diffusers(keys)
    return bool({ADAPTER_CONFIG, PIPELINE_WEIGHTS} & locate(ref, headers_only=True).names)


def _single_file(source: Source, ref: str, commit: str | None = None, only: tuple[str, ...] = ()) -> Adapter:
    """A file that is an adapter by itself, as kohya's scripts, LyCORIS and diffusers write it."""
    from adapterkit.adapters.formats import diffusers, kohya
    from adapterkit.adapters.formats.parts import named, selected

    header = parse_header(source.read, source.size, source.name)
    stored = {key: Stored(key, t.dtype, t.shape, source, t.start) for key, t in header.tensors.items()}
    if kohya.is_kohya(stored):
        config, tensors = kohya.read_kohya(stored, ref, only)
        parts = "".join(f", {part or 'one model'}" for part in config.raw.get(PARTS, ()))
        note = f"read as a kohya or LyCORIS file{parts and f' for {parts[2:]}'}"
        return Adapter(ref, config, tensors, source, commit=commit, notes=(note,))
    if diffusers.is_diffusers(stored):
        config, tensors, notes = diffusers.read_diffusers(stored, header.metadata, ref)
        adapter = Adapter(ref, config, tensors, source, commit=commit, notes=notes)
        if only:
            return named(adapter, only)
        return adapter if len(config.raw[PARTS]) > 1 else selected(adapter, None)
    raise AdapterError(f"{ref} has no keys of a single-file adapter", "give the folder with adapter_config.json")


def _weights(listing: Listing) -> tuple[tuple[Source, ...], Mapping[str, Tensor]]:
    """The weight file of a PEFT folder, or the several that an index names (transformers splits large adapters).

    Raises:
        NotFound: there are none, or one that the index names is missing.
        UnsafeError: pickles only, or an index that leads out of the folder.
        CheckpointError: the index and the files contradict each other.
    """
    if WEIGHTS in listing.names:
        source, stored = _stored(listing, WEIGHTS)
        return (source,), stored
    if ADAPTER_INDEX not in listing.names:
        raise _no_weights(listing)
    return read_shards(listing, ADAPTER_INDEX)


def _stored(listing: Listing, name: str) -> tuple[Source, dict[str, Stored]]:
    source = listing.open(name)
    header = parse_header(source.read, source.size, source.name)
    return source, {key: Stored(key, t.dtype, t.shape, source, t.start) for key, t in header.tensors.items()}


# What an adapter folder may bring for the merged model to use; anything else in it is about training.
_BROUGHT = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "spiece",
    "sentencepiece",
)


def is_brought(name: str) -> bool:
    """Whether a file beside an adapter is a tokenizer's."""
    return name.startswith(_BROUGHT)


def _no_config(listing: Listing) -> Exception:
    nested = sorted(name for name in listing.names if name.endswith("/" + ADAPTER_CONFIG))
    if nested:
        folders = ", ".join(name.rpartition("/")[0] for name in nested[:4])
        return NotFound(f"{listing.ref} holds adapters in sub-folders ({folders})", "name one of them")
    if "config.json" in listing.names:
        return NotFound(f"{listing.ref} is a model, not an adapter", "give the base first, then the adapters")
    return NotFound(f"{listing.ref} has no {ADAPTER_CONFIG}", "give the folder that PEFT saved")


def _no_weights(listing: Listing) -> Exception:
    pickled = sorted(name for name in listing.names if name.endswith(PICKLES) and "adapter" in name)
    if pickled:
        return UnsafeError(
            f"{listing.ref} holds its weights only as a pickle ({pickled[0]}), which can run code when loaded",
            f"if you trust it: adapterkit convert {listing.ref} --to peft --allow-pickle -o DIR",
        )
    return NotFound(f"{listing.ref} has no {WEIGHTS}", "download the missing file")
