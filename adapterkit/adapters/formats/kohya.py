"""Single files of kohya's sd-scripts and of LyCORIS: LoRA, DoRA, LoHa and LoKr under flattened module names.

A key is ``lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight``: a part of the pipeline, the module path with
``_`` for every dot, and the tensor. Which underscores were dots is known only beside a base, so the path stays flat until
the adapter meets one (`unflattened`). ``alpha`` is a tensor of its own per module; without one, and where LoKr stores
both factors whole, the scale is 1. DoRA's ``dora_scale`` is ``[out, 1, ...]``, norms of rows as in PEFT, or with
``wd_on_out=False`` ``[1, in, ...]``, norms of columns, which is not read.

Sources: kohya-ss/sd-scripts ``networks/lora.py`` and LyCORIS ``modules/`` (both Apache-2.0), read for the formats only.
"""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.config import FLAT, AdapterConfig
from adapterkit.checkpoint.tensor import Renamed
from adapterkit.errors import AdapterError, TargetError, UnsupportedAdapter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.names import Names
    from adapterkit.checkpoint.tensor import Stored, Tensor

_PART = re.compile(r"^(?:lora|lycoris)_(?:te\d*_|unet_|transformer_|llm_)?")
# Leads that a text encoder's modules have in one version of its classes and not in another.
_LEADS = ("text_model_", "model_", "transformer_", "model_language_model_", "language_model_", "encoder_")

# method -> what the tensors are called in the file and in PEFT
_LEAVES: dict[str, dict[str, str]] = {
    "LORA": {
        "lora_down.weight": "lora_A.weight",
        "lora_up.weight": "lora_B.weight",
        "dora_scale": "lora_magnitude_vector",
    },
    "LOHA": {name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    "LOKR": {
        name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    },
}
_FLOATS = {"F16": "<e", "F32": "<f", "F64": "<d"}


def is_kohya(keys: Mapping[str, Any]) -> bool:
    """Whether these are the keys of such a file."""
    return any(key.partition(".")[2] == "lora_down.weight" or _PART.match(key) is not None for key in keys)


def read_kohya(stored: Mapping[str, Stored], where: str) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The config and tensors in PEFT's terms, module paths still flat.

    Raises:
        UnsupportedAdapter: tensors of an algorithm that is not read, or of several.
        AdapterError: a module has no rank, or a path is named twice.
    """
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    kinds: dict[str, str] = {}
    for key, tensor in stored.items():
        module, _, leaf = key.partition(".")
        path = _PART.sub("", module)
        if leaf == "alpha":
            alphas[path] = number(tensor, where)
            continue
        kind = next((kind for kind, leaves in _LEAVES.items() if leaf in leaves), None)
        if kind is None:
            raise UnsupportedAdapter(
                f"{where}: '{key}' belongs to an algorithm that is not read from such files",
                "LoRA, DoRA, LoHa and LoKr are; convert it with the tool that trained it",
            )
        if leaf == "dora_scale" and tensor.numel != tensor.shape[0]:
            raise UnsupportedAdapter(
                f"{where}: '{key}' {list(tensor.shape)} holds norms of inputs, where DoRA has those of outputs",
                "merge it with LyCORIS, which trained it with wd_on_out=False",
            )
        kinds.setdefault(kind, key)
        name = f"{path}.{_LEAVES[kind][leaf]}"
        if name in tensors:
            raise AdapterError(f"{where} holds two modules called '{path}'", "split the file by model")
        tensors[name] = Renamed(name, tensor)
    if len(kinds) > 1:
        first, second = list(kinds.values())[:2]
        raise UnsupportedAdapter(
            f"{where} mixes algorithms: '{first}' and '{second}'", "split it into one file for each"
        )
    kind = next(iter(kinds), "LORA")
    ranks = _ranks(kind, tensors, where)
    lost = next((path for path in alphas if path not in ranks), None)
    if lost is not None:
        raise AdapterError(f"{where}: '{lost}' has an alpha and nothing else", "save the adapter again")
    field = "lora_alpha" if kind == "LORA" else "alpha"
    one = max(ranks.values(), default=1)
    raw = {
        "peft_type": kind,
        "r": one,
        "use_dora": any(name.endswith("lora_magnitude_vector") for name in tensors) or None,
        field: one,
        "rank_pattern": {path: rank or 1 for path, rank in ranks.items()},
        "alpha_pattern": {path: (alphas.get(path, rank) if rank else 1) for path, rank in ranks.items()},
        FLAT: True,
    }
    return AdapterConfig({name: value for name, value in raw.items() if value is not None}, where), tensors


def _ranks(kind: str, tensors: Mapping[str, Tensor], where: str) -> dict[str, int]:
    """The rank of every module; 0 where both factors of a LoKr are whole, so that nothing is scaled."""
    ranks: dict[str, int] = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.partition(".")
        ranks.setdefault(path, 0)
        if len(tensor.shape) < 2:
            raise AdapterError(f"{where}: '{name}' is {list(tensor.shape)}, no factor", "save the adapter again")
        if leaf in ("lora_A.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
            ranks[path] = tensor.shape[0]
        if leaf == "lokr_w2" and len(tensor.shape) == 3:
            raise UnsupportedAdapter(
                f"{where}: '{name}' is of a one-dimensional convolution, which PEFT and LyCORIS lay out differently",
                "merge it with LyCORIS",
            )
    return ranks


def number(tensor: Stored, where: str) -> float:
    """A scalar, read without torch."""
    data = tensor.source.read(tensor.offset, tensor.nbytes)
    if tensor.numel != 1 or (tensor.dtype.code not in _FLOATS and tensor.dtype.code != "BF16"):
        raise AdapterError(f"{where}: '{tensor.name}' is no number", "save the adapter again")
    if tensor.dtype.code == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    return float(struct.unpack(_FLOATS[tensor.dtype.code], data)[0])


def unflattened(adapter: Adapter, names: Names) -> Adapter:
    """The adapter with its flat module names resolved against a base.

    Raises:
        TargetError: a name stands for no module of the base, or for several.
    """
    known: dict[str, set[str]] = {}
    for parameter in names.parameters():
        module = parameter.rpartition(".")[0]
        known.setdefault(module.replace(".", "_"), set()).add(module)
    flat = dict.fromkeys(key.partition(".")[0] for key in adapter.tensors)
    paths = {name: _module(name, known, adapter) for name in flat}
    tensors = {}
    for key, tensor in adapter.tensors.items():
        name, _, leaf = key.partition(".")
        new = f"{paths[name]}.{leaf}"
        tensors[new] = Renamed(new, tensor)
    raw = {key: value for key, value in adapter.config.raw.items() if key != FLAT}
    for pattern in ("rank_pattern", "alpha_pattern"):
        raw[pattern] = {paths[name]: value for name, value in raw[pattern].items()}
    return replace(adapter, config=AdapterConfig(raw, adapter.config.where), tensors=tensors)


def _module(name: str, known: Mapping[str, set[str]], adapter: Adapter) -> str:
    shorter = [name.removeprefix(lead) for lead in _LEADS if name.startswith(lead)]
    found = known.get(name) or {
        module for other in (*shorter, *(lead + name for lead in _LEADS)) for module in known.get(other, ())
    }
    if len(found) != 1:
        words = "several modules" if found else "no module"
        raise TargetError(
            f"{adapter.source.name}: '{name}' stands for {words} of the base",
            "check that this is the model it was trained on, and that the file holds no other part of a pipeline",
        )
    return next(iter(found))
