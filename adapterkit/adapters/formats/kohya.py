"""Single files of kohya's sd-scripts and of LyCORIS: every algorithm they write, under flattened module names.

A key is ``lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight``: a part of the pipeline, the module path with
``_`` for every dot, and the tensor. Which underscores were dots is known only beside a base, so the path stays flat until
the adapter meets one (`unflattened`). ``alpha`` is a tensor of its own per module; without one, with 0, and where LoKr
stores both factors whole, the scale is 1. OFT keeps its constraint there.

A file that is LoRA, DoRA, LoHa or LoKr in every module becomes an adapter of that PEFT type. Any other (Tucker cores,
norms of inputs, DoRA of LoHa and LoKr, full differences, norms, OFT, BOFT, (IA)^3, GLoRA, or several of all these) is of type
``LYCORIS``, a method of ours (`adapterkit.adapters.methods.single`).

Sources: kohya-ss/sd-scripts ``networks/lora.py``, ``networks/oft.py`` and LyCORIS 4.1.3 ``modules/`` (both Apache-2.0), read
for the formats only.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.config import FLAT, PARTS, AdapterConfig
from adapterkit.adapters.formats.ldm import diffusers_name
from adapterkit.adapters.formats.parts import check_parts
from adapterkit.adapters.formats.pipelines import aliases, in_diffusers, is_prefixed, split
from adapterkit.checkpoint.tensor import Renamed
from adapterkit.errors import AdapterError, TargetError, UnsupportedAdapter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.names import Names
    from adapterkit.checkpoint.tensor import Stored, Tensor

# PEFT's method -> what the tensors are called in the file and in PEFT
_PEFT: dict[str, dict[str, str]] = {
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
# The same for the method of ours; names that could be a parameter's own get a word before them.
_OTHER = {
    **{name: name for name in ("lora_down.weight", "lora_up.weight", "lora_mid.weight", "dora_scale")},
    **_PEFT["LOHA"],
    **_PEFT["LOKR"],
    **{
        name: f"lycoris_{name}"
        for name in (
            *("diff", "diff_b", "w_norm", "b_norm", "oft_blocks", "rescale"),
            *("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"),
            *("bias_indices", "bias_values", "bias_size"),
        )
    },
}
_IA3 = "lycoris_ia3.weight"  # `weight` in the file, beside `on_input`
_REFUSED = {
    **dict.fromkeys(
        ("lambda_layer", "q_layer.weight", "p_layer.weight"),
        (
            "belongs to T-LoRA, whose rank depends on the timestep, so that no one weight stands for it",
            "load it with LyCORIS beside the base",
        ),
    ),
    "scalar": (
        "is a scale that LyCORIS folds into its factors when it saves",
        "save the file with the trainer that made it",
    ),
}
_NUMBERS = {
    "F16": "<e",
    "F32": "<f",
    "F64": "<d",
    "BOOL": "<?",
    "I8": "<b",
    "U8": "<B",
    "I16": "<h",
    "I32": "<i",
    "I64": "<q",
}
# The factor whose first dimension is the rank.
_RANKED = ("lora_A.weight", "lora_down.weight", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")


def is_kohya(keys: Mapping[str, Any]) -> bool:
    """Whether these are the keys of such a file."""
    return any(key.partition(".")[2] == "lora_down.weight" or is_prefixed(key) for key in keys)


def read_kohya(
    stored: Mapping[str, Stored], where: str, only: Sequence[str] = ()
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The config and tensors in PEFT's terms or those of our own method, module paths still flat; of each part of a pipeline
    that the file has adapters for, if there are several.

    Args:
        only: parts to read, as if they were one.

    Raises:
        UnsupportedAdapter: tensors of an algorithm that is not read.
        AdapterError: a factor is no matrix, a path is named twice, or there is no such part.
    """
    parts: dict[str, dict[str, Stored]] = {}
    for key, tensor in stored.items():
        parts.setdefault(split(key)[0], {})[key] = tensor
    if only:
        check_parts(only, parts, where)
        return _read_part({key: tensor for part in only for key, tensor in parts[part].items()}, where)
    if len(parts) == 1:
        return _read_part(stored, where)
    configs: dict[str, Mapping[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for part, own in parts.items():
        config, found = _read_part(own, where)
        configs[part] = config.raw
        tensors |= {name: Renamed(name, t) for name, t in ((f"{part}.{n}" if part else n, t) for n, t in found.items())}
    return AdapterConfig({"peft_type": next(iter(configs.values()))["peft_type"], PARTS: configs}, where), tensors


def _read_part(stored: Mapping[str, Stored], where: str) -> tuple[AdapterConfig, dict[str, Tensor]]:
    modules: dict[str, dict[str, Stored]] = {}
    for key, tensor in stored.items():
        module, _, leaf = key.partition(".")
        path = split(module)[1]
        if leaf in modules.setdefault(path, {}):
            raise AdapterError(f"{where} holds two modules called '{path}'", "name one part of the file, as FILE#te1")
        modules[path][leaf] = tensor
    numbers = {
        name: {path: number(found.pop(name), where) for path, found in modules.items() if name in found}
        for name in ("alpha", "on_input")
    }
    lost = next((path for path, found in modules.items() if not found), None)
    if lost is not None:
        raise AdapterError(f"{where}: '{lost}' has an alpha and nothing else", "save the adapter again")
    kind = next((kind for kind in _PEFT if all(_is_peft(kind, found) for found in modules.values())), "LYCORIS")
    tensors: dict[str, Tensor] = {}
    for path, found in modules.items():
        for leaf, tensor in found.items():
            name = f"{path}.{_name(kind, leaf, path in numbers['on_input'], tensor, where)}"
            tensors[name] = Renamed(name, tensor)
    ranks = _ranks(tensors, where)
    alphas = numbers["alpha"]
    one = max(ranks.values(), default=1) or 1
    raw = {
        "peft_type": kind,
        "r": one,
        "use_dora": any(name.endswith("lora_magnitude_vector") for name in tensors) or None,
        "lora_alpha" if kind == "LORA" else "alpha": one,
        "rank_pattern": {path: rank or 1 for path, rank in ranks.items()},
        # What has no rank of its own keeps its alpha: GLoRA a scale, OFT a constraint.
        "alpha_pattern": {path: alphas.get(path) or rank if rank else 1 for path, rank in ranks.items()}
        | {path: alpha for path, alpha in alphas.items() if path not in ranks},
        "on_input": {path: bool(value) for path, value in numbers["on_input"].items()} or None,
        FLAT: True,
    }
    return AdapterConfig({name: value for name, value in raw.items() if value is not None}, where), tensors


def _is_peft(kind: str, found: Mapping[str, Stored]) -> bool:
    """Whether PEFT has a form for a module: DoRA's norms are of outputs, LoKr is of no one-dimensional convolution,
    which PEFT lays out differently."""
    if not found.keys() <= _PEFT[kind].keys():
        return False
    norms, whole = found.get("dora_scale"), found.get("lokr_w2")
    over_outputs = norms is None or norms.shape[:1] == (norms.numel,)
    return over_outputs and (whole is None or len(whole.shape) != 3)


def _name(kind: str, leaf: str, scales: bool, tensor: Stored, where: str) -> str:
    """What a tensor is called once it is read."""
    names = _PEFT.get(kind, _OTHER)
    if leaf == "weight" and scales:
        return _IA3
    if leaf not in names:
        why, instead = _REFUSED.get(
            leaf, ("belongs to an algorithm that is not read from such files", "merge it with the tool that trained it")
        )
        raise UnsupportedAdapter(f"{where}: '{tensor.name}' {why}", instead)
    return names[leaf]


def _ranks(tensors: Mapping[str, Tensor], where: str) -> dict[str, int]:
    """The rank of every module of LoRA, LoHa and LoKr; 0 where both factors of a LoKr are whole, so that nothing is scaled."""
    ranks: dict[str, int] = {}
    for name, tensor in tensors.items():
        path, _, leaf = name.partition(".")
        if not leaf.startswith(("lora_", "hada_", "lokr_")):
            continue
        ranks.setdefault(path, 0)
        if len(tensor.shape) < 2 and leaf != "lora_magnitude_vector":
            raise AdapterError(f"{where}: '{name}' is {list(tensor.shape)}, no factor", "save the adapter again")
        if leaf in _RANKED:
            ranks[path] = tensor.shape[0]
    return ranks


def number(tensor: Stored, where: str) -> float:
    """A scalar, read without torch."""
    data = tensor.source.read(tensor.offset, tensor.nbytes)
    if tensor.numel != 1 or (tensor.dtype.code not in _NUMBERS and tensor.dtype.code != "BF16"):
        raise AdapterError(f"{where}: '{tensor.name}' is no number", "save the adapter again")
    if tensor.dtype.code == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    return float(struct.unpack(_NUMBERS[tensor.dtype.code], data)[0])


def unflattened(adapter: Adapter, names: Names) -> Adapter:
    """The adapter with its flat module names resolved against a base.

    Raises:
        TargetError: a name stands for no module of the base, or for several.
    """
    known: dict[str, set[str]] = {}
    for parameter in names.parameters():
        module = parameter.rpartition(".")[0]
        flat_name = module.replace(".", "_")
        for name in (flat_name, in_diffusers(flat_name)):
            if name is not None:
                known.setdefault(name, set()).add(module)
    flat = dict.fromkeys(key.partition(".")[0] for key in adapter.tensors)
    paths = {name: _module(name, known, adapter) for name in flat}
    tensors = {}
    for key, tensor in adapter.tensors.items():
        name, _, leaf = key.partition(".")
        new = f"{paths[name]}.{leaf}"
        tensors[new] = Renamed(new, tensor)
    raw = {key: value for key, value in adapter.config.raw.items() if key != FLAT}
    for pattern in ("rank_pattern", "alpha_pattern", "on_input"):
        if pattern in raw:
            # The first pattern that matches the end of a path counts, so a path stands before those that end it.
            longest = sorted(raw[pattern], key=lambda name: -len(paths[name]))
            raw[pattern] = {paths[name]: raw[pattern][name] for name in longest}
    return replace(adapter, config=AdapterConfig(raw, adapter.config.where), tensors=tensors)


def _module(name: str, known: Mapping[str, set[str]], adapter: Adapter) -> str:
    found = (
        known.get(name)
        or known.get(diffusers_name(name) or "")
        or {module for other in aliases(name) for module in known.get(other, ())}
    )
    if len(found) != 1:
        words = "several modules" if found else "no module"
        raise TargetError(
            f"{adapter.source.name}: '{name}' stands for {words} of the base",
            "check that this is the model it was trained on, and that the file holds no other part of a pipeline",
        )
    return next(iter(found))
