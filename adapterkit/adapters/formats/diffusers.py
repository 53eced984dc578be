"""Single files as diffusers saves and loads them: LoRA of the parts of a pipeline, under dotted module paths.

A key is ``transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight``: a part of the pipeline (none where a model saved
itself), the module path, the tensor. Older files call the factors ``lora.down``, ``lora_linear_layer.down`` or
``processor.to_q_lora.down``, other trainers ``lora_down``. Newer ones carry PEFT's config of each part in their metadata;
without it and without ``alpha`` tensors every scale is 1, as diffusers takes it. One part is merged at a time: the one
that the base is (`adapterkit.adapters.formats.parts`).

Source: huggingface/diffusers (Apache-2.0) ``loaders/peft.py``, ``loaders/lora_base.py``, ``utils/state_dict_utils.py``, read
for the formats only; held against diffusers itself by the tests.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.config import PARTS, AdapterConfig
from adapterkit.checkpoint.tensor import Renamed
from adapterkit.errors import AdapterError, UnsupportedAdapter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from adapterkit.checkpoint.tensor import Stored, Tensor

METADATA = "lora_adapter_metadata"
MAX_METADATA = 1 << 20  # characters

A, B = "lora_A.weight", "lora_B.weight"
# How the end of a key reads, and what it is in PEFT's terms: what to add to the module path, and the tensor.
_ENDS: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern + r"\Z"), module, leaf)
    for pattern, module, leaf in (
        (r"(?:\.processor)?\.to_([qkv])_lora\.down\.weight", r".to_{}", A),
        (r"(?:\.processor)?\.to_([qkv])_lora\.up\.weight", r".to_{}", B),
        (r"(?:\.processor)?\.to_out_lora\.down\.weight", ".to_out.0", A),
        (r"(?:\.processor)?\.to_out_lora\.up\.weight", ".to_out.0", B),
        (r"\.lora_A(?:\.\w+)?\.weight|\.lora(?:_linear_layer)?\.down\.weight|\.lora_down\.weight", "", A),
        (r"\.lora_B(?:\.\w+)?\.weight|\.lora(?:_linear_layer)?\.up\.weight|\.lora_up\.weight", "", B),
        (r"\.lora_B(?:\.\w+)?\.bias", "", "lora_B.bias"),
        (r"\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?|\.dora_scale", "", "lora_magnitude_vector"),
        (r"\.alpha", "", "alpha"),
    )
)
# Text encoders once had the same names for their attention as a UNet.
_TEXT = {".to_q": ".q_proj", ".to_k": ".k_proj", ".to_v": ".v_proj", ".to_out.0": ".out_proj"}
_PART = re.compile(
    r"(unet|transformer(?:_\d)?|text_encoder(?:_\d)?|prior|controlnet|(?:model\.)?diffusion_model|text_encoders\.\w+)\."
)


def is_diffusers(keys: Iterable[str]) -> bool:
    """Whether these are the keys of such a file; those of PEFT's own, which needs its config beside it, are not."""
    names = list(keys)
    factor = any(leaf in (A, B) and pattern.search(key) for key in names for pattern, _, leaf in _ENDS)
    return factor and not any(key.startswith("base_model.") or ".base_layer." in key for key in names)


def read_diffusers(
    stored: Mapping[str, Stored], metadata: Mapping[str, str], where: str
) -> tuple[AdapterConfig, dict[str, Tensor], tuple[str, ...]]:
    """The config, the tensors by key with the part still in front, and what to tell the user.

    Raises:
        UnsupportedAdapter: tensors of something else than LoRA.
        AdapterError: two tensors of one name, or metadata that is no config.
    """
    from adapterkit.adapters.formats.kohya import number

    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    counts: Counter[str] = Counter()
    for key, tensor in stored.items():
        path, leaf = _split(key, where)
        if leaf == "alpha":
            alphas[path] = number(tensor, where)
            continue
        name = f"{path}.{leaf}"
        if name in tensors:
            raise AdapterError(f"{where} holds two tensors for '{name}'", "save the adapter again")
        tensors[name] = Renamed(name, tensor)
        counts[_part(path)] += 1
    said = _said(metadata, where)
    parts = {part: _told(part, said) or _fields(part, tensors, alphas, where) for part in counts}
    held = ", ".join(f"{count} tensors of {part or 'one model'}" for part, count in counts.items())
    notes = [f"read as a diffusers file: {held}"]
    untold = [part for part in counts if not _told(part, said) and not any(_part(path) == part for path in alphas)]
    if untold:
        of = f" of {', '.join(untold)}" if len(counts) > 1 else ""
        notes.append(f"the file tells no alpha{of}, so every scale is 1, as diffusers takes it")
    return AdapterConfig({"peft_type": "LORA", PARTS: parts}, where), tensors, tuple(notes)


def _split(key: str, where: str) -> tuple[str, str]:
    """The module path and PEFT's name of a tensor."""
    for pattern, module, leaf in _ENDS:
        match = pattern.search(key)
        if match is None:
            continue
        path = key[: match.start()]
        added = module.format(*match.groups())
        return path + (_TEXT.get(added, added) if path.startswith("text_encoder") else added), leaf
    raise UnsupportedAdapter(
        f"{where}: '{key}' is no tensor of a LoRA, which is what such files are read for",
        "load it with the tool that trained it and save a LoRA alone",
    )


def _part(path: str) -> str:
    match = _PART.match(path + ".")
    return match.group(1) if match is not None else ""


def _said(metadata: Mapping[str, str], where: str) -> Mapping[str, Any]:
    """The configs in the file's metadata: fields by part and name, as ``transformer.r``."""
    text = metadata.get(METADATA)
    if text is None:
        return {}
    try:
        found = json.loads(text) if len(text) <= MAX_METADATA else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise AdapterError(f"{where}: its {METADATA} is no config", "save the adapter again")
    return found


def _told(part: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a part in the metadata; empty where it tells none."""
    lead = part + "." if part else ""
    own = {key.removeprefix(lead): value for key, value in said.items() if key.startswith(lead)}
    return {"peft_type": "LORA", **own} if "r" in own else {}


def _fields(part: str, tensors: Mapping[str, Tensor], alphas: Mapping[str, float], where: str) -> dict[str, Any]:
    """The fields of a ``LoraConfig`` for a part, as the tensors tell them; its module paths without the part."""
    lead = part + "." if part else ""
    own = {name.removeprefix(lead): tensor for name, tensor in tensors.items() if _part(name) == part}
    ranks: dict[str, int] = {}
    for name, tensor in own.items():
        if name.endswith(A):
            if len(tensor.shape) < 2:
                raise AdapterError(
                    f"{where}: '{lead}{name}' is {list(tensor.shape)}, no factor", "save the adapter again"
                )
            ranks[name.removesuffix("." + A)] = tensor.shape[0]
    strengths = {path: alphas.get(lead + path, rank) for path, rank in ranks.items()}
    found: dict[str, Any] = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": list(ranks)}
    for field, leaf in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        if any(name.endswith(leaf) for name in own):
            found[field] = True
    for field, pattern, values in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", strengths)):
        if len(set(values.values())) == 1:
            found[field] = next(iter(values.values()))
        else:
            # A pattern fits whatever ends with it, and the first one that fits is taken.
            found[pattern] = {path: values[path] for path in sorted(values, key=len, reverse=True)}
    return found
