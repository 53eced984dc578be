"""Keys of adapters that are a single file, by tables: the part of a pipeline, the module, and what the tensor is.

A key has a lead (the part of a pipeline that it is of), the path of a module (dotted, or flattened with ``_`` for every dot),
and an end (which factor of which algorithm). Every trainer chose each of the three for itself, so each is a table here, and
one function reads them all.

==============================  ===================================================================
flat, ``lora_unet_``            kohya's sd-scripts, musubi-tuner, OneTrainer (``lora_transformer_``)
flat, ``lycoris_``              LyCORIS' wrapper and SimpleTuner: the whole path, and no part
dotted, ``transformer.``        diffusers, SimpleTuner, fal
dotted, ``diffusion_model.``    ComfyUI, ai-toolkit, diffusion-pipe, lightx2v
dotted, no lead                 DiffSynth-Studio, Black Forest Labs, XLabs
``base_model.model.``           PEFT without its config: fal, ACE-Step
==============================  ===================================================================

Sources: kohya-ss/sd-scripts and musubi-tuner, LyCORIS 4.1.3 (Apache-2.0), huggingface/diffusers (Apache-2.0)
``loaders/``, ComfyUI's loader rules; read for the formats only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

UP, DOWN, MID, BIAS = "lora_up.weight", "lora_down.weight", "lora_mid.weight", "lora_B.bias"
WHOLE = "whole"  # a parameter that takes the place of the base's

# Flat leads. What follows `lycoris_` is a module's whole path, whatever it begins with.
_FLAT = re.compile(r"^(?:(?:lora|oft)_(?:(te\d*|unet|transformer|llm|prior_unet)_)?|lycoris_)")
# Dotted leads, and the part that each is. Those of one list may stand one behind the other.
_PEFT = "base_model.model."
_DOTTED = re.compile(
    r"(unet|transformer(?:_\d)?|text_encoder(?:_\d)?|prior|controlnet|conditional_transformer|connectors|text_conditioner|"
    r"(?:model\.)?diffusion_model|text_encoders\.\w+)\."
)
_COUNTED = re.compile(r"_\d+_")
EMBEDDINGS = ("bundle_emb.",)  # textual inversions that OneTrainer packs beside a LoRA

# How the end of a key reads: what to add to the module's path, and the tensor in LyCORIS' terms.
_ENDS: tuple[tuple[re.Pattern[str], str, str], ...] = tuple(
    (re.compile(pattern + r"\Z"), module, leaf)
    for pattern, module, leaf in (
        (r"(?:\.processor)?\.to_([qkv])_lora\.down\.weight", r".to_{}", DOWN),
        (r"(?:\.processor)?\.to_([qkv])_lora\.up\.weight", r".to_{}", UP),
        (r"(?:\.processor)?\.to_out_lora\.down\.weight", ".to_out.0", DOWN),
        (r"(?:\.processor)?\.to_out_lora\.up\.weight", ".to_out.0", UP),
        (r"(?<=_lora)(\d?)\.down\.weight", "{}", DOWN),
        (r"(?<=_lora)(\d?)\.up\.weight", "{}", UP),
        (r"\.lora_A(?:\.\w+)?\.weight|\.lora(?:_linear_layer)?\.down\.weight|\.lora_down(?:\.\w+)?\.weight", "", DOWN),
        (r"\.lora_B(?:\.\w+)?\.weight|\.lora(?:_linear_layer)?\.up\.weight|\.lora_up(?:\.\w+)?\.weight", "", UP),
        (r"\.lora_mid\.weight|\.lora\.mid\.weight", "", MID),
        (r"\.lora_B(?:\.\w+)?\.bias", "", BIAS),
        (r"\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?|\.dora_scale", "", "dora_scale"),
        (r"\.alpha", "", "alpha"),
        (r"\.diff_m", ".modulation", "diff"),
        (r"\.(diff|diff_b|w_norm|b_norm|oft_blocks|rescale|on_input|bias_(?:indices|values|size))", "", "{}"),
        (r"\.(hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)", "", "{}"),
        (r"\.([ab][12]|bm)\.weight", "", "{}.weight"),
        (r"\.set_weight", ".weight", WHOLE),
    )
)
# Text encoders once had the same names for their attention as a UNet.
_TEXT = {".to_q": ".q_proj", ".to_k": ".k_proj", ".to_v": ".v_proj", ".to_out.0": ".out_proj"}
_OF_WHOLE = (".weight", ".bias", ".scale")
_FACTORS = frozenset({UP, DOWN, MID, "oft_blocks", "diff", "diff_b"})


@dataclass(frozen=True)
class SingleFileKey:
    """What a key says.

    Attributes:
        part: of a pipeline; empty where it names none.
        path: of the module; of a whole parameter, its name.
        leaf: the tensor in LyCORIS' terms; empty where the end is of no algorithm that is known.
        style: whose way of writing it is.
        flat: the path has ``_`` for every dot.
    """

    part: str
    path: str
    leaf: str
    style: str
    flat: bool


@lru_cache(maxsize=65536)
def read_key(key: str) -> SingleFileKey:
    """Take a key apart."""
    flat = _FLAT.match(key)
    if flat is not None and "." not in key[: flat.end()]:
        module, dot, end = key.partition(".")
        path, leaf = _ended(module[flat.end() :], dot + end)
        style = "LyCORIS" if key.startswith("lycoris_") else "kohya"
        return SingleFileKey(flat.group(1) or "", path, leaf or end, style, True)
    rest, style = key, ""
    if rest.startswith(_PEFT):
        rest, style = rest.removeprefix(_PEFT), "PEFT"
    lead = _DOTTED.match(rest)
    part = lead.group(1) if lead is not None else ""
    rest = rest[lead.end() :] if lead is not None else rest
    if part.startswith("text_encoders."):
        rest = rest.removeprefix("transformer.")
    path, leaf = _ended(rest, "", part.startswith("text_encoder"))
    if not leaf and rest.endswith(_OF_WHOLE):
        path, leaf = rest, WHOLE
    if not style:
        xlabs = ".processor." in path and "_lora" in path
        comfy = part.endswith("diffusion_model") or part.startswith("text_encoders.")
        style = "XLabs" if xlabs else "ComfyUI" if comfy else "diffusers"
    # Without a lead, only what counts its blocks between underscores is told from a module at the top.
    flat_path = not part and "." not in path and _COUNTED.search(path) is not None and leaf not in ("", WHOLE)
    return SingleFileKey(part, path, leaf, style, flat_path)


def _ended(path: str, end: str, text: bool = False) -> tuple[str, str]:
    """A path without its end, and the tensor; empty where no end is known."""
    whole = path + end
    for pattern, module, leaf in _ENDS:
        match = pattern.search(whole)
        if match is None or match.start() < len(path) * bool(end):
            continue
        words = match.groups()
        added = module.format(*words)
        own = whole[: match.start()] + (_TEXT.get(added, added) if text else added)
        return own, leaf.format(*words)
    return (path, "") if end else (whole, "")


def is_factor(leaf: str) -> bool:
    """Whether a tensor is one that only an adapter has."""
    return leaf in _FACTORS or leaf.startswith(("hada_", "lokr_"))


def is_prefixed(key: str) -> bool:
    """Whether a key has one of the flat leads."""
    flat = _FLAT.match(key)
    return flat is not None and "." not in key[: flat.end()]


def is_single(keys: object) -> bool:
    """Whether these are the keys of an adapter that is a single file."""
    names = [str(key) for key in keys]  # type: ignore[attr-defined]
    if any(".base_layer." in key for key in names):
        return False  # a model with an adapter still in it
    return any(is_prefixed(key) or is_factor(read_key(key).leaf) for key in names)
