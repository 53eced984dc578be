"""A pipeline of diffusers as one checkpoint: a ``model_index.json``, and a folder for each of its components.

The names of a component's tensors are led by its folder and a dot: ``unet.conv_in.weight``, ``text_encoder_2.…``. A file in a
folder holds them without that lead, in an output too (`lead_of`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.checkpoint import Checkpoint, SideFile
from adapterkit.checkpoint.listing import Listing, check_plain
from adapterkit.checkpoint.tensor import Stored
from adapterkit.errors import CheckpointError, NotFound, UnsafeError

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.checkpoint.files import Source

MODEL_INDEX = "model_index.json"
COMPONENTS = "pipeline_components"  # a field of our own: a tuple of folders and their configs; no JSON is a tuple
# Other copies of weights that do not travel: they are not merged into.
_COPIES = (".safetensors", ".bin", ".pt", ".ckpt", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".h5")
_PICKLED = (".bin", ".pt", ".ckpt", ".msgpack")


def components(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The components of a pipeline that was opened by `read_pipeline`; empty where a config is a model's."""
    return tuple(component_configs(config))


def component_configs(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The parsed ``config.json`` of each component of a pipeline; empty where a config is a model's."""
    found = config.get(COMPONENTS)
    return dict(found) if isinstance(found, tuple) else {}


def with_component(config: Mapping[str, Any], name: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a pipeline in which the component ``name`` says something else."""
    return {**config, COMPONENTS: tuple({**component_configs(config), name: said}.items())}


def _named(config: Mapping[str, Any]) -> Iterable[str]:
    """The components that a ``model_index.json`` names: a library and a class for each."""
    for name, value in config.items():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) for one in value):
            yield check_plain(name, MODEL_INDEX)


def lead_of(file: str) -> str:
    """What stands before the names of a file's tensors in a plan and not in the file."""
    folder, slash, _ = file.rpartition("/")
    return f"{folder}." if slash else ""


def folder_of(checkpoint: Checkpoint) -> Path | None:
    """The folder on this disk in which a checkpoint's files stand, of a pipeline the one with its ``model_index.json``."""
    path = checkpoint.sources[0].path if checkpoint.sources else None
    if path is None:
        return None
    return path.parent.parent if components(checkpoint.config) else path.parent


class Component(Listing):
    """One folder of a pipeline."""

    def __init__(self, whole: Listing, folder: str) -> None:
        self._whole, self._lead = whole, f"{folder}/"
        self.ref, self.commit = f"{whole.ref.rstrip('/')}/{folder}", whole.commit

    @property
    def names(self) -> frozenset[str]:
        return frozenset(n.removeprefix(self._lead) for n in self._whole.names if n.startswith(self._lead))

    def open(self, name: str) -> Source:
        return self._whole.open(self._lead + name)

    def prefetch(self, names: Iterable[str]) -> None:
        self._whole.prefetch([self._lead + name for name in names])


def is_pipeline(names: frozenset[str]) -> bool:
    """Whether a folder with these files is a pipeline."""
    return MODEL_INDEX in names and any(name.endswith(".safetensors") and "/" in name for name in names)


def read_listed(listing: Listing) -> Checkpoint:
    """Open a folder from its headers, a model's or a pipeline's.

    Raises:
        NotFound, CheckpointError, UnsafeError: see `read_pipeline` and `adapterkit.checkpoint.folder.read_folder`.
    """
    from adapterkit.checkpoint.folder import read_folder

    return read_pipeline(listing) if is_pipeline(listing.names) else read_folder(listing)


def read_pipeline(listing: Listing) -> Checkpoint:
    """Open a pipeline from the headers of its components.

    Raises:
        NotFound, CheckpointError, UnsafeError: see `adapterkit.checkpoint.folder.read_folder`; a component is quantized, or
            has its weights only as pickles.
    """
    from adapterkit.checkpoint.folder import check_names, read_folder, side_names

    config = listing.json(MODEL_INDEX)
    check_names(config, listing.ref)
    tensors: dict[str, Any] = {}
    shards: dict[str, str] = {}
    sources: list[Source] = []
    side: dict[str, SideFile] = {}
    notes: list[str] = []
    held: dict[str, Mapping[str, Any]] = {}
    for name in _named(config):
        one = Component(listing, name)
        if not any(file.endswith(".safetensors") for file in one.names):
            _check_weightless(one, name)
            continue
        opened = read_folder(one)
        if any(key in opened.config for key in ("quantization_config", "compression_config")):
            raise CheckpointError(
                f"{one.ref} is quantized, and a pipeline is merged in floats",
                f"merge into that folder alone: {one.ref}",
            )
        held[name] = opened.config
        for key, tensor in opened.tensors.items():
            assert isinstance(tensor, Stored)
            tensors[f"{name}.{key}"] = Stored(f"{name}.{key}", tensor.dtype, tensor.shape, tensor.source, tensor.offset)
            shards[f"{name}.{key}"] = f"{name}/{opened.shards[key]}"
        for file in (*opened.side_files, *(() if opened.index is None else (opened.index,))):
            side[f"{name}/{file.name}"] = SideFile(f"{name}/{file.name}", file.source)
        sources += opened.sources
        notes += [note for note in opened.notes if note not in notes]
    if not held:
        there = sorted(
            {name.partition("/")[0] for name in listing.names if name.endswith(".safetensors") and "/" in name}
        )
        raise NotFound(
            f"{listing.ref}/{MODEL_INDEX} names no component that has weights",
            f"name one of its folders as the base ({', '.join(there)})",
        )
    config = {**config, COMPONENTS: tuple(held.items())}
    weights = set(shards.values())
    rest = [name for name in listing.names if not name.startswith(tuple(f"{one}/" for one in held))]
    left = [name for name in listing.names if name.endswith(_COPIES) and name not in weights]
    for name in side_names(frozenset(rest), weights):
        if name not in left:
            side[name] = SideFile(name, listing.open(name))
    side = {name: file for name, file in side.items() if name not in left}
    if left:
        notes.append(f"{len(left)} other weight files of the pipeline are left out, as {min(left)}")
    ordered = tuple(side[name] for name in sorted(side))
    found = Checkpoint(listing.ref, tensors, shards, config, ordered, {}, listing.commit, tuple(sources), tuple(notes))
    return replace(found, notes=(*found.notes, f"a pipeline of {', '.join(held)}"))


def _check_weightless(one: Component, name: str) -> None:
    pickled = sorted(file for file in one.names if file.endswith(_PICKLED))
    if pickled:
        raise UnsafeError(
            f"{one.ref} holds its weights only as {pickled[0]}, which is no safetensors file",
            f"save the pipeline again with safe_serialization=True, or merge into another of its folders than {name}",
        )
