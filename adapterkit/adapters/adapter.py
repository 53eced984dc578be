"""An adapter: a config and named tensors, read from a PEFT folder, lazily."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.adapters.config import AdapterConfig
from adapterkit.adapters.experts import order_notes
from adapterkit.adapters.formats import mlx
from adapterkit.checkpoint.checkpoint import SideFile
from adapterkit.checkpoint.files import LocalFile
from adapterkit.checkpoint.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLES, PIPELINE_WEIGHTS, side_names
from adapterkit.checkpoint.header import parse_header
from adapterkit.checkpoint.open import locate
from adapterkit.checkpoint.tensor import Stored
from adapterkit.errors import AdapterError, NotFound, UnsafeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.adapters.formats.contents import Contents
    from adapterkit.checkpoint.files import Source
    from adapterkit.checkpoint.listing import Listing
    from adapterkit.checkpoint.tensor import Tensor

WEIGHTS = ADAPTER_WEIGHTS
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """One adapter.

    Attributes:
        ref: what the user called it.
        config: its ``adapter_config.json``.
        tensors: handles by key, without the ``base_model.model.`` prefix.
        source: the weight file.
        side_files: tokenizer and chat template, if it brings its own.
        commit: the Hub commit it was read from.
        notes: what a user should know about how it was read.
        contents: of a single file, its modules before a base is known.
        only: parts of a pipeline that were asked for by name.
        left: what of it was left out, and why.
    """

    ref: str
    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    source: Source
    side_files: tuple[SideFile, ...] = ()
    commit: str | None = None
    notes: tuple[str, ...] = field(default=())
    contents: Contents | None = field(default=None, repr=False, compare=False)
    only: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Elements of all its tensors."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def folder(self) -> Path | None:
        """The folder that is the adapter; None for a loose file, and for one that is read from the Hub by range."""
        return None if self.source.path is None or self.source.loose else self.source.path.parent

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


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
    if path.name == WEIGHTS and path.with_name(ADAPTER_CONFIG).is_file():
        return load_adapter(path.parent)  # PEFT's own file, whose config lies beside it
    if path.is_file() and path.suffix == ".safetensors":
        return _single_file(LocalFile(path, str(ref), loose=True), str(ref), only=parts)
    if path.is_file() and path.suffix == ".gguf":
        road = f"make a PEFT adapter of it: adapterkit convert {path.name} --to peft --base BASE -o DIR"
        raise AdapterError(f"{ref} is a GGUF file, which is not read as an adapter", road)
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
    if WEIGHTS not in listing.names:
        raise _no_weights(listing)
    source, stored = _stored(listing, WEIGHTS)
    tensors, notes = _plain_keys(stored, source.name)
    side_files = tuple(
        SideFile(name, listing.open(name)) for name in side_names(listing.names, {WEIGHTS}) if is_brought(name)
    )
    return Adapter(listing.ref, config, tensors, source, side_files, listing.commit, (*notes, *order_notes(config)))


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
    from adapterkit.adapters.formats.keys import is_single

    path, _ = file_and_parts(ref)
    if path.is_file():
        if path.suffix != ".safetensors":
            return False
        source = LocalFile(path, str(ref), loose=True)
        return is_single(parse_header(source.read, source.size, source.name).tensors)
    return bool({ADAPTER_CONFIG, PIPELINE_WEIGHTS} & locate(ref, headers_only=True).names)


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
        held = ", ".join(f"{count} tensors of {part or 'one model'}" for part, count in counts.items())
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
        notes.append(f"{len(contents.apart)} embeddings in the file are kept apart: {', '.join(contents.apart[:3])}")
    return tuple(notes)


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


def _plain_keys(stored: Mapping[str, Stored], where: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Keys without ``base_model.model.`` and without an adapter's name left in them."""
    tensors: dict[str, Tensor] = {}
    bare, named = 0, 0
    for name, tensor in stored.items():
        key = name
        if key.startswith(PREFIX):
            key = key.removeprefix(PREFIX)
        elif key.startswith("base_model."):
            key = key.removeprefix("base_model.")  # tensors shared by all modules lie one level higher
        else:
            bare += 1
        plain = _without_adapter_name(key)
        named += plain != key
        if plain in tensors:
            raise AdapterError(f"{where} holds two tensors for '{plain}'", "it mixes several adapters; save one alone")
        tensors[plain] = tensor
    notes = []
    if bare:
        notes.append(f"{bare} keys lack the prefix base_model.model.; read as module paths")
    if named:
        notes.append(f"{named} keys carry an adapter's name, as in lora_A.default.weight; it was dropped")
    return tensors, tuple(notes)


_INFIXED = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "modules_to_save")


def _without_adapter_name(key: str) -> str:
    parts = key.split(".")
    for at, part in enumerate(parts):
        if part not in _INFIXED:
            continue
        rest = parts[at + 1 :]
        if part == "modules_to_save":
            return ".".join([*parts[:at], *rest[1:]]) if len(rest) > 1 else key
        if part == "lora_magnitude_vector" and rest in ([], ["weight"]):
            return ".".join(parts[: at + 1])
        if len(rest) == 2 and rest[1] in ("weight", "bias"):
            return ".".join([*parts[: at + 1], rest[1]])
        if part.startswith("lora_embedding") and len(rest) == 1:
            return ".".join(parts[: at + 1])
    return key


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
