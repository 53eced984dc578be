"""Opening an adapter: a PEFT or MLX folder, or a single file of another trainer; no tensor is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.adapters.adapter import WEIGHTS, Adapter
from adapterkit.adapters.brought import is_brought
from adapterkit.adapters.config import AdapterConfig
from adapterkit.adapters.experts import order_notes
from adapterkit.adapters.keys import plain_keys
from adapterkit.adapters.methods import METHODS
from adapterkit.checkpoint.checkpoint import SideFile
from adapterkit.checkpoint.files import LocalFile, is_gguf
from adapterkit.checkpoint.folder import (
    ADAPTER_CONFIG,
    ADAPTER_INDEX,
    PICKLED_WHOLE,
    PICKLES,
    PIPELINE_WEIGHTS,
    TRAINED_WHOLE,
    VALUE_HEAD,
    read_shards,
    side_names,
)
from adapterkit.checkpoint.header import parse_header
from adapterkit.checkpoint.open import is_object, locate
from adapterkit.checkpoint.tensor import Stored
from adapterkit.errors import AdapterError, NotFound, UnsafeError, UnsupportedAdapter, counted
from adapterkit.places import address_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.listing import Listing
    from adapterkit.checkpoint.objects import ObjectFile
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
        UnsupportedAdapter: parameters that were trained whole lie in a file of the trainer's own beside it.
        AuthError, HubError: the Hub said so.
    """
    if is_object(_whole(ref), (".safetensors",)):
        return _object(ref)
    path, parts = file_and_parts(ref)
    if path.name == WEIGHTS and path.with_name(ADAPTER_CONFIG).is_file():
        return load_adapter(path.parent)  # PEFT's own file, whose config lies beside it
    if path.is_file() and path.suffix == ".safetensors":
        source = LocalFile(path, str(ref), loose=True)
        beside = path.with_name(ADAPTER_CONFIG)
        source.beside = (LocalFile(beside).seen,) if beside.is_file() else ()
        said = _mlx_beside(path)
        if said is not None and not parts:
            return _mlx(source, said, str(ref))
        return _single_file(source, str(ref), only=parts)
    if is_gguf(path):
        road = f"make a PEFT adapter of it: adapterkit convert {path.name} --to peft --base BASE -o DIR"
        raise AdapterError(f"{ref} is a GGUF file, which is not read as an adapter here", road)
    listing = locate(ref, headers_only=headers_only)
    if ADAPTER_CONFIG not in listing.names:
        if PIPELINE_WEIGHTS in listing.names:
            return _single_file(listing.open(PIPELINE_WEIGHTS), listing.ref, listing.commit)
        raise _no_config(listing)
    config = AdapterConfig(listing.json(ADAPTER_CONFIG), f"{listing.ref.rstrip('/')}/{ADAPTER_CONFIG}")
    if not config.peft_type:
        from adapterkit.adapters.formats import mlx

        weights_of_mlx = mlx.mlx_file(listing.names, config.raw)
        if weights_of_mlx is not None:
            return _mlx(listing.open(weights_of_mlx), config, listing.ref, listing.commit)
        raise AdapterError(f"{config.where} names no peft_type", "it is not a PEFT adapter config, or a damaged one")
    whole = next((name for name in PICKLED_WHOLE if name in listing.names), None)
    if whole is not None:
        by, way = PICKLED_WHOLE[whole]
        raise UnsupportedAdapter(f"{listing.ref} is half of what was trained: {whole} beside it holds {by}", way)
    sources, weights = _weights(listing)
    told: tuple[str, ...] = ()
    if TRAINED_WHOLE in listing.names:
        file, more = _stored(listing, TRAINED_WHOLE)
        sources, weights = (*sources, file), _with_whole(weights, more, listing)
        some = counted(len(more), "parameter")
        told = (f"{TRAINED_WHOLE} beside it holds {some} that ms-swift trained whole, in the place of the base's",)
    tensors, notes = plain_keys(weights, sources[0].name, METHODS.get(config.peft_type))
    side_files = tuple(
        SideFile(name, listing.open(name))
        for name in sorted({*side_names(listing.names, {WEIGHTS}), *({VALUE_HEAD} & listing.names)})
        if is_brought(name, listing.names)
    )
    notes = (*told, *notes, *order_notes(config))
    return Adapter(listing.ref, config, tensors, sources[0], side_files, listing.commit, notes, sources[1:])


def is_trained_whole(tensor: object) -> bool:
    """Whether a tensor lies in the file of parameters that a trainer trained whole."""
    source = getattr(tensor, "source", None)
    return source is not None and str(source.name).rpartition("/")[2] == TRAINED_WHOLE


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
    path, _ = file_and_parts(ref)
    if is_object(_whole(ref), (".safetensors", ".gguf")):
        if is_object(ref, (".gguf",)):
            return False
        from adapterkit.adapters.formats.keys import is_single

        found = _file_in_store(ref)
        return _of_peft(found) or is_single(parse_header(found.read, found.size, found.name).tensors)
    if path.is_file():
        if path.suffix != ".safetensors":
            return False
        from adapterkit.adapters.formats.keys import is_single

        source = LocalFile(path, str(ref), loose=True)
        return is_single(parse_header(source.read, source.size, source.name).tensors) or _mlx_beside(path) is not None
    return bool({ADAPTER_CONFIG, PIPELINE_WEIGHTS} & locate(ref, headers_only=True).names)


def _whole(ref: str | Path) -> str:
    """The file of ``FILE#PART``."""
    return str(ref).rpartition("#")[0] or str(ref)


def _file_in_store(ref: str | Path) -> ObjectFile:
    from adapterkit.checkpoint.objects import object_file

    found = object_file(_whole(ref), loose=True)
    if found is None:
        raise NotFound(f"{_whole(ref)} does not exist", "check the bucket, the name and the endpoint")
    return found


def _of_peft(file: ObjectFile) -> bool:
    """Whether PEFT's config lies beside a file in a store."""
    beside = file.address.with_name(ADAPTER_CONFIG)
    return file.address.name == WEIGHTS and file.store.head(beside.key) is not None


def _object(ref: str | Path) -> Adapter:
    """A single file in a store, or the folder of PEFT's own file there."""
    found = _file_in_store(ref)
    if _of_peft(found):
        return load_adapter(str(found.address.parent))
    parts = str(ref).rpartition("#")[2] if "#" in str(ref) else ""
    return _single_file(found, str(ref), only=tuple(parts.split("+")) if parts else ())


def _single_file(source: Source, ref: str, commit: str | None = None, only: tuple[str, ...] = ()) -> Adapter:
    """A file that is an adapter by itself, whoever wrote it."""
    from adapterkit.adapters.formats.contents import read_contents
    from adapterkit.adapters.formats.keys import is_single
    from adapterkit.adapters.formats.parts import opened

    header = parse_header(source.read, source.size, source.name)
    stored = {key: Stored(key, t.dtype, t.shape, source, t.start) for key, t in header.tensors.items()}
    if not is_single(stored):
        raise AdapterError(f"{ref} has no keys of a single-file adapter", "give the folder with adapter_config.json")
    contents = read_contents(stored, header.metadata, ref)
    bare = Adapter(ref, AdapterConfig({}, ref), {}, source, commit=commit)
    adapter = opened(bare, contents, only)
    return replace(adapter, notes=_told(adapter))


def _mlx(source: Source, config: AdapterConfig, ref: str, commit: str | None = None) -> Adapter:
    """An adapter of mlx-lm or mlx-vlm: a weight file and its config."""
    from adapterkit.adapters.formats import mlx

    read, tensors = mlx.read_mlx(_handles(source), config.raw, config.where)
    return Adapter(ref, read, tensors, source, commit=commit, notes=("read as an MLX adapter",))


def _mlx_beside(path: Path) -> AdapterConfig | None:
    """The config beside a weight file of MLX; its trainers save `0000100_adapters.safetensors` there while they train."""
    from adapterkit.adapters.formats import mlx

    beside = path.with_name(ADAPTER_CONFIG)
    if not path.name.endswith((mlx.WEIGHTS, mlx.OTHER_WEIGHTS)) or not beside.is_file():
        return None
    config = AdapterConfig(locate(path.parent).json(ADAPTER_CONFIG), str(beside))
    return config if mlx.is_mlx_config(config.raw) else None


def _told(adapter: Adapter) -> tuple[str, ...]:
    """How a single file was read."""
    contents = adapter.contents
    assert contents is not None
    parts = contents.parts
    notes = []
    if any(module.flat for module in contents.modules):
        several = f" for {', '.join(part or 'one model' for part in parts)}" if len(parts) > 1 else ""
        notes.append(f"read as a kohya or LyCORIS file{several}")
    else:
        counts = {part: sum(len(module.tensors) for module in contents.of(part)) for part in parts}
        held = ", ".join(f"{counted(count, 'tensor')} of {part or 'one model'}" for part, count in counts.items())
        notes.append(f"read as a {contents.style} file: {held}")
        untold = [
            part
            for part in parts
            if part not in contents.told and all(module.alpha is None for module in contents.of(part))
        ]
        if untold:
            of = f" of {', '.join(untold)}" if len(parts) > 1 else ""
            notes.append(f"the file tells no alpha{of}, so every scale is 1, as diffusers takes it")
    if contents.apart:
        some = counted(len(contents.apart), "embedding in the file is", "embeddings in the file are")
        notes.append(f"{some} kept apart: {', '.join(contents.apart[:3])}")
    return tuple(notes)


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


def _with_whole(weights: Mapping[str, Tensor], more: Mapping[str, Tensor], listing: Listing) -> dict[str, Tensor]:
    """Factors, and the parameters that were trained whole beside them.

    Raises:
        AdapterError: one is in both files, or has an adapter of its own under its name.
    """
    twice = next((key for key in more if key in weights or ".base_layer." in key), None)
    if twice is not None:
        raise AdapterError(
            f"{listing.ref}: '{twice}' of {TRAINED_WHOLE} has an adapter in {WEIGHTS} too",
            "merge both with ms-swift's own export (merge_lora)",
        )
    return {**weights, **more}


def _stored(listing: Listing, name: str) -> tuple[Source, dict[str, Stored]]:
    source = listing.open(name)
    return source, _handles(source)


def _handles(source: Source) -> dict[str, Stored]:
    header = parse_header(source.read, source.size, source.name)
    return {key: Stored(key, t.dtype, t.shape, source, t.start) for key, t in header.tensors.items()}


def _sharded(listing: Listing) -> Exception | None:
    """How to go on with a checkpoint of sharded training; None if the folder is none."""
    from adapterkit.checkpoint.sharded import KINDS, sharded_checkpoint

    found = sharded_checkpoint(Path(listing.ref).expanduser()) if address_of(listing.ref) is None else None
    if found is None:
        return None
    how = f"adapterkit convert {listing.ref} --to peft --allow-pickle -o DIR"
    if found.kind == "mcore":
        how = f"adapterkit convert {listing.ref} --to peft --base BASE --allow-pickle -o DIR"
    return UnsafeError(
        f"{listing.ref} is {KINDS[found.kind]}, whose files are pickles and not yet an adapter",
        f"if you trust it: {how}",
    )


def _no_config(listing: Listing) -> Exception:
    sharded = _sharded(listing)
    if sharded is not None:
        return sharded
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
    sharded = _sharded(listing)
    if sharded is not None:
        return sharded
    return NotFound(f"{listing.ref} has no {WEIGHTS}", "download the missing file")
