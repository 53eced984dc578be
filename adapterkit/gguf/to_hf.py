"""From a GGUF file to the Hugging Face folder that it is: tensors, config, tokenizer and card."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from adapterkit.checkpoint.checkpoint import Checkpoint
from adapterkit.checkpoint.tensor import Cast
from adapterkit.dtypes import BF16, F16, F32
from adapterkit.errors import CheckpointError, TargetError, UsageError, counted
from adapterkit.gguf.arch.back import config_of, spec_of_gguf
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.dense_modules import NAMES
from adapterkit.gguf.arch.hyper import full_key
from adapterkit.gguf.arch.mapping import Mapper
from adapterkit.gguf.arch.pooling import MODES, POOLING
from adapterkit.gguf.arch.views import Constant, scattered
from adapterkit.gguf.general import CARD, HUB
from adapterkit.gguf.scales import scales_of
from adapterkit.gguf.tensors import Packed, decoded

if TYPE_CHECKING:
    from adapterkit.checkpoint.tensor import Tensor
    from adapterkit.dtypes import DType
    from adapterkit.gguf.checkpoint import GGUFCheckpoint

WEIGHTS = "model.safetensors"
POOL = "1_Pooling"


def to_hf(base: GGUFCheckpoint, dtype: DType | None = None) -> tuple[Checkpoint, dict[str, bytes], list[str]]:
    """A view of a GGUF model as a Hugging Face checkpoint, the files beside it, and notes.

    Args:
        base: the model.
        dtype: of all weights; by default floats stay as they are, and quantized weights become float16.

    Raises:
        UsageError: this is no model.
        TargetError: an architecture or a tensor that the table does not know.
        CheckpointError: tensors or a tokenizer that are incomplete.
    """
    from adapterkit.gguf.vocab import tokenizer_files

    if base.kind != "model":
        raise UsageError(f"{base.ref} is a GGUF {base.kind}, not a model", "give a model")
    dense = next((f"{name}.weight" for name in NAMES if f"{name}.weight" in base), None)
    if dense is not None:
        raise TargetError(
            f"{base.ref}: '{dense}' is a layer of sentence-transformers, which has a folder of its own beside the model",
            "take the Hugging Face folder that the file was made from",
        )
    spec = spec_of_gguf(base)
    config = config_of(base, spec)
    view, sources = hf_view(base, Mapper(spec, Config(config, base.ref)))
    packed = {name for name, tensor in base.items() if isinstance(tensor, Packed)}
    own = dtype or (F16 if packed else _dtype_of(base))
    tensors = {}
    for name, tensor in view.items():
        # Beside quantized weights stand floats that were never rounded to 16 bits, as biases of experts.
        exact = dtype is None and (len(tensor.shape) < 2 or (packed and packed.isdisjoint(sources[name])))
        wanted = own if tensor.extent is None and not exact else (dtype or tensor.dtype)
        tensors[name] = tensor if tensor.dtype is wanted else Cast(tensor, wanted)
    config["dtype"] = own.torch_name
    side = {"config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
    side |= tokenizer_files(base.header)
    side |= {CARD: card(base)} | generation(base, config) | pooled(base)
    notes = (
        [f"{counted(len(packed), 'quantized tensor was', 'quantized tensors were')} decoded and written as {own}"]
        if packed
        else []
    )
    return Checkpoint(base.ref, tensors, dict.fromkeys(tensors, WEIGHTS), config, sources=base.sources), side, notes


def as_hf(base: GGUFCheckpoint) -> Checkpoint:
    """A GGUF model under the names and with the config of the Hugging Face checkpoint that it came from.

    Raises:
        TargetError, CheckpointError: see `to_hf`.
    """
    spec = spec_of_gguf(base)
    config = config_of(base, spec)
    view, _ = hf_view(base, Mapper(spec, Config(config, base.ref)))
    return Checkpoint(base.ref, view, dict.fromkeys(view, WEIGHTS), config, sources=base.sources)


def hf_view(base: GGUFCheckpoint, mapper: Mapper) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """The tensors of the Hugging Face checkpoint that a GGUF model came from, as handles on its own; and which own each
    is made of."""
    scales = scales_of(base, mapper)
    shapes = mapper.hf_shapes(scales.shapes, base.ref)
    mapped = mapper.to_gguf(shapes, base.ref)
    floats = {name: scales.times(decoded(base[name])) for name in mapped.arrays if name in base}
    found, sources = {}, {}
    for name, shape in shapes.items():
        sources[name] = mapped.sources.get(name, ())
        found[name] = scattered(name, shape, {one: mapped.arrays[one] for one in sources[name]}, floats)
    for one in mapper.spec.scalars:
        values = base.header.get(full_key(base.arch, one.key))
        if not isinstance(values, list) or len(values) != mapper.layers:
            raise CheckpointError(f"{base.ref}: '{one.key}' is not a number for every layer", "convert the base again")
        for layer, value in enumerate(values):
            name = one.hf.replace("{i}", str(layer))
            found[name], sources[name] = Constant(name, [value], one.shape), ()
    return found, sources


def _dtype_of(base: GGUFCheckpoint) -> DType:
    found = (tensor.dtype for tensor in base.values() if len(tensor.shape) > 1 and tensor.dtype in (BF16, F16, F32))
    kinds = list(found)
    return next((kind for kind in kinds if kind is not F32), F32)


def card(base: GGUFCheckpoint) -> bytes:
    """A model card whose front matter says what ``general.*`` says."""
    import yaml

    get = base.header.get
    front: dict[str, Any] = {}
    for key, field in {
        "name": "model_name",
        "organization": "organization",
        "finetune": "finetune",
        "size_label": "size_label",
        "license": "license",
        "license.name": "license_name",
        "license.link": "license_link",
        "tags": "tags",
        "languages": "language",
    }.items():
        value = get(f"general.{key}")
        if value:
            front[field] = value
    for key, field in {"base_model": "base_model", "dataset": "datasets"}.items():
        count = get(f"general.{key}.count", 0)
        refs = []
        for number in range(count if isinstance(count, int) and count < 64 else 0):
            url = str(get(f"general.{key}.{number}.repo_url", ""))
            name = get(f"general.{key}.{number}.name", "")
            refs.append(url.removeprefix(HUB).removeprefix("datasets/") or name)
        if refs:
            front[field] = refs
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n\nMade from a GGUF file by adapterkit.\n".encode()


def pooled(base: GGUFCheckpoint) -> dict[str, bytes]:
    """``modules.json`` and what it names, by which sentence-transformers pools as the file says."""
    words = {number: word for word, number in POOLING.items()}
    mode = words.get(base.number("pooling_type") if f"{base.arch}.pooling_type" in base.header.keys else -1)
    if mode not in MODES.values():
        return {}
    kind = "sentence_transformers.models."
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{kind}Transformer"},
        {"idx": 1, "name": "1", "path": POOL, "type": f"{kind}Pooling"},
    ]
    found = {"word_embedding_dimension": base.number("embedding_length")}
    found |= {key: word == mode for key, word in MODES.items()}
    return {
        "modules.json": (json.dumps(modules, indent=2) + "\n").encode(),
        f"{POOL}/config.json": (json.dumps(found, indent=2) + "\n").encode(),
    }


_SAMPLING = {
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "temp": "temperature",
    "penalty_repeat": "repetition_penalty",
}


def generation(base: GGUFCheckpoint, config: dict[str, Any]) -> dict[str, bytes]:
    """``generation_config.json``, where the file names settings."""
    from adapterkit.gguf.arch.fields import shortest

    found = {
        field: shortest(base.header[f"general.sampling.{key}"])
        for key, field in _SAMPLING.items()
        if f"general.sampling.{key}" in base.header.keys
    }
    if not found:
        return {}
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    return {"generation_config.json": (json.dumps({**tokens, **found}, indent=2) + "\n").encode()}
