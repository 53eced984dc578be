"""Hugging Face folders: one safetensors file, or an index with shards, beside a config and a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.checkpoint import Checkpoint, SideFile
from adapterkit.checkpoint.header import Header, check_name, parse_header
from adapterkit.checkpoint.listing import Listing, check_plain
from adapterkit.checkpoint.slices import current
from adapterkit.checkpoint.tensor import Stored, Tensor
from adapterkit.errors import CheckpointError, NotFound, UnsafeError, counted

if TYPE_CHECKING:
    from adapterkit.checkpoint.files import Source

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PIPELINE = "diffusion_pytorch_"  # before both, in the parts of a diffusers pipeline
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_INDEX = "adapter_model.safetensors.index.json"
PIPELINE_WEIGHTS = "pytorch_lora_weights.safetensors"  # an adapter as diffusers saves it, without a config beside
# Beside an adapter's weights: parameters that ms-swift trained whole (the vision tower and the aligner), under the keys that
# PEFT's wrapper has; swift/tuner_plugin/lora_llm.py (ms-swift 4.6).
TRAINED_WHOLE = "vit.safetensors"
# Pickles of such parameters: what they hold, and what merges both.
# haotian-liu/LLaVA, llava/train/train.py and llava/model/builder.py
PICKLED_WHOLE = {
    "non_lora_trainables.bin": (
        "the projector and what else LLaVA trained whole",
        "merge both with LLaVA's scripts/merge_lora_weights.py",
    ),
}
# The value head that LLaMA-Factory trains for rewards; its own export copies the file.
VALUE_HEAD = "value_head.safetensors"
MORE_TEMPLATES = "additional_chat_templates/"  # transformers' folder of a tokenizer's other templates
MODULES = "modules.json"  # what sentence-transformers saves beside a transformer names the folders of `is_module`
_MODULE = re.compile(r"\d+_\w+/")
RECORD = "adapterkit.json"  # beside every output
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# What never travels with merged weights: other copies of the weights, training state, the base's own card.
_LEFT_BEHIND = (*PICKLES, ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".npz", ".tflite", ".index.json")
_LEFT_BEHIND_NAMES = frozenset(
    {
        "README.md",
        RECORD,
        "adapterkit.intoto.json",
        "adapterkit.intoto.jsonl",
        "model.sig",
        ADAPTER_CONFIG,
        "training_args.bin",
    }
)
# One of several files that are numbered: what stands before its number, and how many there are.
_NUMBERED = re.compile(r"(.{0,200}?)\d{5}-of-(\d{5})\.safetensors")
_LEFT_BEHIND_FOLDERS = frozenset({"original", "onnx", "openvino", "coreml"})


def read_folder(listing: Listing) -> Checkpoint:
    """Open a Hugging Face folder from its headers alone.

    Raises:
        NotFound: no weights, or a shard that the index names is missing.
        CheckpointError: a damaged header or index.
        UnsafeError: pickled weights only, or names that lead out of the folder.
    """
    notes: list[str] = []
    weight_map: dict[str, str] | None = None
    single, index = weight_names(listing.names)
    some = current()
    if single in listing.names:
        files = [single]
    elif index in listing.names and some is not None:
        files = [name for name in listing.names if f"{listing.ref.rstrip('/')}/{name}" in some.inputs]
    elif index in listing.names:
        weight_map = read_index(listing, index)
        _check_none_left(listing, weight_map.values(), index)
        files = list(dict.fromkeys(weight_map.values()))
    else:
        files = [_only_weights(listing)]
    read = [file for file in files if some is None or f"{listing.ref.rstrip('/')}/{file}" in some.wanted]
    listing.prefetch(read)
    tensors: dict[str, Tensor] = {}
    shards: dict[str, str] = {}
    metadata: dict[str, str] = {}
    sources = []
    for file in sorted(files):
        source = listing.open(file)
        if some is not None and source.name not in some.wanted:
            sources.append(source)
            continue
        header = parse_header(source.read, source.size, source.name)
        metadata = metadata or dict(header.metadata)
        sources.append(source)
        _add(source, file, header, weight_map, tensors, shards)
    if weight_map is not None:
        _check_complete(listing.ref, weight_map, shards)
    config = listing.json("config.json") if "config.json" in listing.names else {}
    check_names(config, listing.ref)
    if "auto_map" in config:
        notes.append("config.json names custom code (auto_map); adapterkit carries it over and never runs it")
    side_files = tuple(SideFile(name, listing.open(name)) for name in side_names(listing.names, set(files)))
    return Checkpoint(
        listing.ref,
        tensors,
        shards,
        config,
        side_files,
        metadata,
        listing.commit,
        tuple(sources),
        tuple(notes),
        SideFile(index, listing.open(index)) if index in listing.names and single not in listing.names else None,
    )


def check_names(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config whose words for the model's class are of another type than everything that reads them expects.

    Raises:
        CheckpointError: ``architectures`` is no list of names, or ``model_type`` or ``_class_name`` no name.
    """
    own = config.get("_class_name")
    if own is not None and not isinstance(own, str):
        raise CheckpointError(f"{where}: _class_name in its config is {repr(own)[:60]}", "it is a name")
    named, kind = config.get("architectures"), config.get("model_type")
    if named is not None and not (isinstance(named, list) and all(isinstance(one, str) for one in named)):
        shown = repr(named)[:60]
        raise CheckpointError(f"{where}: architectures in config.json is {shown}", "it is a list of class names")
    if kind is not None and not isinstance(kind, str):
        raise CheckpointError(f"{where}: model_type in config.json is {repr(kind)[:60]}", "it is a name")


def weight_names(names: frozenset[str]) -> tuple[str, str]:
    """What a folder with these files calls its weights, where they are one file, and the index, where they are several."""
    pipeline = not {SINGLE, INDEX} & names and {PIPELINE + SINGLE, PIPELINE + INDEX} & names
    return (PIPELINE + SINGLE, PIPELINE + INDEX) if pipeline else (SINGLE, INDEX)


def read_file(source: Source, config: dict[str, Any]) -> Checkpoint:
    """Open a single safetensors file as a checkpoint."""
    header = parse_header(source.read, source.size, source.name)
    tensors: dict[str, Tensor] = {}
    shards: dict[str, str] = {}
    _add(source, source.path.name if source.path else SINGLE, header, None, tensors, shards)
    return Checkpoint(source.name, tensors, shards, config, (), dict(header.metadata), None, (source,))


def read_index(listing: Listing, name: str) -> dict[str, str]:
    """The weight map of an index, every file name plain and every tensor name checked."""
    where = f"{listing.ref.rstrip('/')}/{name}"
    found = listing.json(name).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{where} has no weight_map", "download or save it again")
    # Some writers put the folder itself in front, as in ./model-00001-of-00002.safetensors.
    known: dict[str, str] = {}  # a large model names each of its files a thousand times
    weight_map = {check_name(tensor, where): _plain(file, where, known) for tensor, file in found.items()}
    for file in dict.fromkeys(weight_map.values()):
        if not file.endswith(".safetensors"):
            raise UnsafeError(f"{where} points to {file!r}, not a safetensors file", "convert it to safetensors first")
    return weight_map


def read_shards(listing: Listing, index: str) -> tuple[tuple[Source, ...], dict[str, Tensor]]:
    """The files that an index names, in order, and their tensors by name.

    Raises:
        NotFound: one of the files is missing.
        CheckpointError: a file lacks what the index says, or two hold the same tensor.
        UnsafeError: a name leads out of the folder.
    """
    weight_map = read_index(listing, index)
    _check_none_left(listing, weight_map.values(), index)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if file not in listing.names]
    if missing:
        raise NotFound(
            f"{listing.ref} lacks {missing[0]}, one of the {len(files)} files that {index} names", "download it too"
        )
    listing.prefetch(files)
    tensors: dict[str, Tensor] = {}
    shards: dict[str, str] = {}
    sources = []
    for file in files:
        source = listing.open(file)
        sources.append(source)
        _add(source, file, parse_header(source.read, source.size, source.name), weight_map, tensors, shards)
    if current() is None:
        _check_complete(listing.ref, weight_map, shards)
    return tuple(sources), tensors


def _plain(file: Any, where: str, known: dict[str, str]) -> str:
    if not isinstance(file, str) or file not in known:
        checked = check_plain(_beside(file), where)
        known[file] = checked
    return known[file]


def _beside(file: Any) -> Any:
    while isinstance(file, str) and file.startswith("./"):
        file = file[2:].lstrip("/")
    return file


def _check_none_left(listing: Listing, files: Iterable[str], index: str) -> None:
    """Whether every file that is numbered like those of an index is in it.

    Raises:
        CheckpointError: one is not, so its tensors would be lost.
    """
    leads = {match[1]: match[2] for file in files if (match := _NUMBERED.fullmatch(file))}
    named = set(files)
    for name in sorted(listing.names):
        match = _NUMBERED.fullmatch(name)
        if match is not None and leads.get(match[1]) == match[2] and name not in named:
            raise CheckpointError(
                f"{listing.ref.rstrip('/')}/{index} does not name {name}, which is numbered like the files that it names",
                "download the index again; if that file is no part of the model, move it away",
            )


def _only_weights(listing: Listing) -> str:
    candidates = sorted(n for n in listing.names if n.endswith(".safetensors") and "/" not in n and "adapter" not in n)
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise CheckpointError(
            f"{listing.ref} has {len(candidates)} safetensors files and no {INDEX}",
            "add the index, or name one of the files",
        )
    if ADAPTER_CONFIG in listing.names:
        raise NotFound(f"{listing.ref} is an adapter, not a checkpoint", "give the base model first, then the adapter")
    pickled = sorted(name for name in listing.names if name.endswith(PICKLES))
    if pickled:
        raise UnsafeError(
            f"{listing.ref} holds its weights only as a pickle ({pickled[0]}), which can run code when loaded",
            "save it again with safe_serialization=True",
        )
    raise NotFound(f"{listing.ref} holds no safetensors weights", "give a Hugging Face model folder")


def _add(
    source: Source,
    file: str,
    header: Header,
    weight_map: dict[str, str] | None,
    tensors: dict[str, Tensor],
    shards: dict[str, str],
) -> None:
    for info in header.tensors.values():
        if weight_map is not None and weight_map.get(info.name, file) != file:
            continue  # the index says that another shard holds this one
        if info.name in tensors:
            raise CheckpointError(f"{source.name} holds tensor '{info.name}' a second time", "save the base again")
        tensors[info.name] = Stored(info.name, info.dtype, info.shape, source, info.start)
        shards[info.name] = file


def _check_complete(ref: str, weight_map: dict[str, str], shards: dict[str, str]) -> None:
    missing = [name for name in weight_map if name not in shards]
    if missing:
        raise CheckpointError(
            f"{ref}: {weight_map[missing[0]]} does not hold '{missing[0]}' as the index says "
            f"({counted(len(missing), 'tensor')} missing)",
            "download that file again",
        )


def is_module(name: str, names: Collection[str]) -> bool:
    """Whether a file belongs to a module of sentence-transformers (pooling, a dense layer), each in a folder of its own."""
    return MODULES in names and _MODULE.match(name) is not None


def is_beside(name: str, names: Collection[str]) -> bool:
    """Whether a file lies beside the weights, or in a folder that is read with them; others are checkpoints of the training."""
    return "/" not in name or name.startswith(MORE_TEMPLATES) or is_module(name, names)


def adapter_names(names: frozenset[str], weights: set[str]) -> list[str]:
    """The files of a listing that are read with the weights of an adapter, sorted."""
    side = {name for name in side_names(names, weights) if is_beside(name, names)}
    return sorted(side | ({TRAINED_WHOLE, VALUE_HEAD, *PICKLED_WHOLE} & names))


def side_names(names: frozenset[str], weights: set[str]) -> list[str]:
    """The files of a listing that travel with its weights, sorted."""

    def carried(name: str) -> bool:
        top, _, rest = name.partition("/")
        if name in weights or name in _LEFT_BEHIND_NAMES or name.endswith(_LEFT_BEHIND):
            return False
        # A Sentence-Transformers module keeps its own weights in a sub-folder; at the top they are other copies.
        return top not in _LEFT_BEHIND_FOLDERS if rest else not name.endswith(".safetensors")

    return sorted(filter(carried, names))
