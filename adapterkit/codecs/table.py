"""The table of formats, and what a checkpoint's headers say of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapterkit.codecs.bnb4 import BNB4
from adapterkit.codecs.bnb8 import BNB8
from adapterkit.codecs.codec import Codec, Kind, Parts, Weight
from adapterkit.codecs.compressed import COMPRESSED
from adapterkit.codecs.fp8 import FLOAT8, FP8
from adapterkit.codecs.gptq import AWQ, GPTQ
from adapterkit.codecs.hqq import HQQ
from adapterkit.codecs.kinds import others
from adapterkit.codecs.mlx import MLX
from adapterkit.codecs.mxfp4 import MXFP4
from adapterkit.codecs.plain8 import bare_vectors, is_scaled, plain_weights
from adapterkit.codecs.torchao import TORCHAO
from adapterkit.errors import CheckpointError, UsageError

# What a checkpoint says of itself is tried in this order; a codec in a file of its own comes after them.
CODECS: tuple[Codec, ...] = (BNB4, BNB8, FP8, MXFP4, COMPRESSED, GPTQ, AWQ, HQQ, TORCHAO, MLX, *others())

KINDS: dict[str, Kind] = {kind.name: kind for codec in CODECS for kind in codec.kinds if not kind.models}
"""Formats that 16-bit weights are written in, by the word that asks for them; see `kinds_of` for a model."""

KEYS = ("quantization_config", "compression_config", "quantization")
# A multimodal config may keep it in the part that describes the language model.
SECTIONS = ("text_config", "language_config", "llm_config", "thinker_config", "vision_config", "audio_config")
# 16-bit weights never have these dtypes; buffers (position ids, masks) do, under other names.
PACKED_ENDS = (".weight", ".qweight", ".W_q", ".weight_packed", "_blocks", "_qdata")
# Ends of names of scales, beside stacked experts whose own names end in no ".weight".
SCALED = ("_scale", "_scales", "_scale_inv", "_weight_scale", "_weight_scale_inv", "_weight_scale_2", ".scale")
# What belongs to no weight and a 16-bit checkpoint does not have: scales of a quantized key-value cache, ComfyUI's mark.
CACHE = (".k_scale", ".v_scale", ".q_scale", ".prob_scale", "scaled_fp8")


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The ``quantization_config`` of a ``config.json``, if it has one."""
    for part in (config, *(config.get(section) for section in SECTIONS)):
        if isinstance(part, Mapping):
            for key in KEYS:
                found = part.get(key)
                # `quantization` is MLX's word, and a plain word for other things.
                if isinstance(found, Mapping) and found and (key != "quantization" or _is_mlx(found)):
                    return found
    return None


def _is_mlx(config: Mapping[str, Any]) -> bool:
    return "quant_method" not in config and {"group_size", "bits"} <= set(config)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` that no longer says that the weights are quantized."""
    return {
        key: without_quantization(value) if key in SECTIONS and isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in KEYS or (key == "quantization" and not (isinstance(value, Mapping) and _is_mlx(value)))
    }


def method_of(config: Mapping[str, Any]) -> str:
    """``quant_method`` of a ``quantization_config``, also where older files leave it out."""
    method = config.get("quant_method")
    if isinstance(method, str):
        return method
    if _is_mlx(config):
        return "mlx"
    return "bitsandbytes" if config.get("load_in_4bit") or config.get("load_in_8bit") else "unnamed"


def kinds_of(config: Mapping[str, Any]) -> dict[str, Kind]:
    """`KINDS` for a model with this ``config.json``: where its weights are published in a layout of its own, in that."""
    own = (kind for codec in CODECS for kind in codec.kinds if config.get("model_type") in kind.models)
    return KINDS | {kind.name: kind for kind in own}


def find_kind(name: str) -> Kind:
    """A format that 16-bit weights are written in.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in KINDS:
        raise UsageError(f"'{name}' is no format that adapterkit writes here", f"use {', '.join(KINDS)}")
    return KINDS[name]


def has_layout(config: Mapping[str, Any], kind: Kind) -> bool:
    """Whether quantized weights under this ``config.json`` have the tensors and the config of ``kind``.

    The same numbers may be stored in other layouts: FP8 blocks in that of transformers and in that of compressed-tensors.
    """
    codec = next(codec for codec in CODECS if kind in codec.kinds)
    quantized = quantization(config)
    if quantized is None:
        return codec.alone
    return method_of(quantized) in codec.methods and (kind.said is None or kind.said(quantized))


def known_methods() -> list[str]:
    return sorted({method for codec in CODECS for method in codec.methods})


def find_weights(parts: Parts, config: Mapping[str, Any], where: str) -> list[Weight]:
    """The quantized weights of a checkpoint, none for a plain one.

    Args:
        parts: its tensors by name.
        config: its ``config.json``.
        where: what to call it in an error.

    Raises:
        CheckpointError: a format that is not in the table, or one whose tensors or config are missing or do not fit.
    """
    quantized = quantization(config)
    if quantized is not None:
        method = method_of(quantized)
        rows = [codec for codec in CODECS if method in codec.methods]
        if not rows:
            raise CheckpointError(
                f"{where} is quantized by '{method}', which adapterkit does not read",
                f"it reads {', '.join(known_methods())}; give the 16-bit base",
            )
    else:
        rows = [codec for codec in CODECS if any(name.endswith(codec.marks) for name in parts)]
        lost = next((codec for codec in rows if not codec.alone), None)
        if lost is not None:
            name = next(name for name in parts if name.endswith(lost.marks))
            raise CheckpointError(
                f"{where} holds '{name}', a part of {lost.name} weights, and no quantization_config",
                "restore the config.json that was saved with these weights",
            )
        quantized = {}
        if not rows and is_scaled(parts):
            rows = [FP8]
        if not rows:
            return list(plain_weights(parts, where))
    found = [weight for codec in rows for weight in codec.find(parts, quantized)]
    found += bare_vectors(parts, found)
    if rows:
        _check(parts, found, rows, where)
        _check_inputs(parts, found, quantized, where)
    absent, named = absent_modules(parts, config)
    if absent and len(absent) == named:
        raise CheckpointError(
            f"config.json of {where} leaves '{absent[0]}' in 16 bits, and the checkpoint has no module that it names there",
            "restore the config.json that was saved with these weights",
        )
    return found


LISTS = (
    "modules_to_not_convert",
    "ignore",
    "ignored_layers",
    "llm_int8_skip_modules",
    "exclude_modules",
    "skip_modules",
)
_IN_LAYER = re.compile(r"(?:^|\.)([A-Za-z_]\w*\.\d+\.[\w.]+)$")
# Names that servers give to fused modules, and layers that predict further tokens, which are often left out.
_ELSEWHERE = re.compile(r"(?:.*\.)?(?:(?:fused_)?qkv\w*|gate_up_proj|w13|in_proj_(?:qkvz|ba))$|(?:.*\.)?mtp\b.*")


def absent_modules(parts: Parts, config: Mapping[str, Any]) -> tuple[list[str], int]:
    """Modules of a layer that a ``quantization_config`` names as not quantized and that are not there; and how many it names.

    Only whole names are looked at, from the number of the layer on: patterns and names of a kind of layer fit or do not.
    """
    said = quantization(config) or {}
    inner = said.get("quantization")
    lists = [part.get(key) for part in (said, inner) if isinstance(part, Mapping) for key in LISTS]
    named = [name for one in lists if isinstance(one, list) for name in one if isinstance(name, str)]
    first, more = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    last = range(first, first + more) if isinstance(first, int) and isinstance(more, int) else range(0)
    asked = {}
    for name in named:
        found = _IN_LAYER.search(name)
        if found and not _ELSEWHERE.fullmatch(name) and int(found[1].split(".")[1]) not in last:
            asked[name] = found[1]
    if not asked:
        return [], 0
    there: set[str] = set()
    for name in parts:
        found = _IN_LAYER.search(name)
        if found:
            words = found[1].split(".")
            there.update(".".join(words[:count]) for count in range(3, len(words) + 1))
    return [name for name, key in asked.items() if key not in there], len(asked)


# Beside a quantized weight, what the server does to its inputs or adds to its outputs: the weight alone is not the layer's.
ON_INPUTS = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b", "act_pre_scale", "smooth", "smooth_factor")
ROTATED = ("transform_config", "rotation_config")


def _check_inputs(parts: Parts, found: list[Weight], quantized: Mapping[str, Any], where: str) -> None:
    """Weights stand for themselves: nothing is done to what goes into them.

    Raises:
        CheckpointError: a quantizer smoothed or rotated them, and inputs are scaled or turned for that while the model runs.
    """
    said = next((key for key in ROTATED if quantized.get(key)), None)
    if said is not None:
        raise CheckpointError(
            f"the quantized weights of {where} are rotated ('{said}' in the quantization_config), and inputs are turned for "
            "that while the model runs",
            "give the 16-bit base",
        )
    for weight in found:
        module = weight.name.rpartition(".")[0]
        beside = next((name for leaf in ON_INPUTS if (name := f"{module}.{leaf}") in parts), None)
        if beside is not None:
            raise CheckpointError(
                f"'{beside}' is applied beside '{weight.name}' while the model runs, which is stored for that",
                "give the 16-bit base",
            )


def _check(parts: Parts, found: list[Weight], rows: list[Codec], where: str) -> None:
    """Nothing of a format may be left over."""
    what = " or ".join(codec.name for codec in rows)
    used = {part.name for weight in found for part in weight.parts}
    twice = next((w for w in found if w.name in parts and w.name not in {part.name for part in w.parts}), None)
    if twice is not None:
        raise CheckpointError(
            f"{where} holds '{twice.name}' twice: as it is, and in {twice.how} ('{twice.parts[0].name}')",
            "leave one of them out",
        )
    marks = tuple(mark for codec in rows for mark in codec.marks)
    for name, part in parts.items():
        if name in used:
            continue
        narrow = not part.dtype.is_float or part.dtype.bits <= 8
        scaled = narrow and len(part.shape) > 1 and any(f"{name}{end}" in parts for end in SCALED)
        # No buffer is a matrix of 8-bit floats or signed integers, and experts have no buffers; scales go with their codes.
        bare = not name.endswith(SCALED) and len(part.shape) > 1
        codes = bare and (part.dtype.code in ("I8", *FLOAT8) or (narrow and ".experts." in name))
        packed = narrow and name.endswith(PACKED_ENDS)
        if name.endswith(marks) or packed or scaled or codes:
            raise CheckpointError(
                f"{where} is only partly {what}: '{name}' ({part.dtype}) belongs to no weight that is complete",
                "download or save it again",
            )
    if not found:
        raise CheckpointError(
            f"config.json of {where} says {what}, and no tensor is stored so",
            "if the weights are 16-bit, remove quantization_config from config.json",
        )
