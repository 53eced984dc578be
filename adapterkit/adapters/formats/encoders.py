"""What programs call a text encoder in a LoRA file: CLIP, T5 or a language model, by its modules and the model that it is of.

=====================  ==========================  ==============================================  ====================
text encoder           sd-scripts                  ComfyUI (``text_encoders.``)                    diffusers
=====================  ==========================  ==============================================  ====================
CLIP-L, CLIP-G         ``te1``, ``te2``; SD 1, 2   ``clip_l.transformer``, ``clip_g.transformer``  ``text_encoder``,
                       ``te``                                                                      ``text_encoder_2``
T5 of Flux and SD3     ``te3``                     ``t5xxl.transformer``                           ``text_encoder_2``,
                                                                                                   ``text_encoder_3``
Gemma 2 of Lumina 2    ``te``                      ``gemma2_2b.transformer.model``                 ``text_encoder``
Qwen 3 of Anima        ``te``                      ``qwen3_06b.transformer.model``                 ``text_encoder``
=====================  ==========================  ==============================================  ====================

Sources: kohya-ss/sd-scripts (Apache-2.0) ``networks/lora_flux.py``, ``lora_sd3.py``, ``lora_lumina.py``, ``lora_anima.py`` and
``convert_anima_lora_to_comfy.py``; ComfyUI's text encoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from adapterkit.adapters.families.names import FAMILIES, bare
from adapterkit.adapters.families.told import is_said, told_family
from adapterkit.errors import UnsupportedAdapter, option

if TYPE_CHECKING:
    from adapterkit.adapters.formats.plain import PlainFactors
    from adapterkit.adapters.formats.relaid import TrainedOn
    from adapterkit.adapters.names import Names

T5 = ("encoder.block.",)
LANGUAGE = ("layers.", "model.layers.")
# Models with one text encoder, a language model, and what ComfyUI calls it.
ONE_LANGUAGE_MODEL: Mapping[str, str] = {"Lumina 2": "gemma2_2b", "Cosmos-2 and Anima": "qwen3_06b"}
# Which component T5 is in diffusers.
T5_IN_DIFFUSERS: Mapping[str, str] = {
    "SD3": "text_encoder_3.",
    **dict.fromkeys(("Flux.1",), "text_encoder_2."),
    **dict.fromkeys(("Chroma", "LTX-Video", "Mochi"), "text_encoder."),
}


def model_of(parts: Mapping[str, Sequence[PlainFactors]], origin: TrainedOn, names: Names | None) -> str:
    """The family of the model that a file is for, by its denoiser, the base or its own words; empty where nothing tells."""
    own = parts.get("denoiser") or parts.get("transformer_2") or ()
    if names is not None:
        places = [one.path for one in own] or [f"{lead}x" for lead in (*names.components, "") if "encoder" not in lead]
        found = next((family for place in places[:1] if (family := names.families.family_at(place))), None)
        if found is not None:
            return found.name
    if own:
        sizes = {one.path: (one.stored[1].shape[0], one.stored[0].shape[1]) for one in own}
        families, _ = told_family(sizes, "original", origin.said, origin.class_name)
        if len(families) == 1:
            return families[0].name
    said = [family.name for family in FAMILIES if any(is_said(family, text) for text in origin.said)]
    return said[0] if len(said) == 1 else ""


def encoder_lead(kind: str, own: Sequence[PlainFactors], style: str, model: str, ref: str) -> tuple[str, str] | None:
    """What leads the modules of a text encoder that is no CLIP, and the lead of their paths that it takes the place of.

    None for CLIP, which is counted.

    Raises:
        UnsupportedAdapter: the program has no such text encoder, or nothing says which of its text encoders it is.
    """
    path = bare(own[0].path)
    language = next((lead for lead in reversed(LANGUAGE) if path.startswith(lead)), "")
    if path.startswith(T5):
        if style == "diffusers":
            return _t5_in_diffusers(kind, model, ref)
        if model in ("", *T5_IN_DIFFUSERS):
            return {"kohya": "lora_te3_", "comfyui": "text_encoders.t5xxl.transformer."}.get(style, ""), ""
    elif not language or style == "diffusers":
        return None
    elif model in ONE_LANGUAGE_MODEL:
        taken = "model." if path.startswith("model.") else ""
        if style == "comfyui":
            return f"text_encoders.{ONE_LANGUAGE_MODEL[model]}.transformer.model.", taken
        return "lora_te_", taken
    raise UnsupportedAdapter(
        f"{ref}: nothing says what {style} calls the text encoder with '{path}'" + (f", of {model}" if model else ""),
        f"add {option('base', 'BASE')}, or write {option('to', 'diffusers')}",
    )


def _t5_in_diffusers(kind: str, model: str, ref: str) -> tuple[str, str]:
    said = {"te1": "text_encoder.", "te2": "text_encoder_2."}.get(kind) or T5_IN_DIFFUSERS.get(model)
    if said is None:
        raise UnsupportedAdapter(
            f"{ref}: T5 is text_encoder_2 of Flux and text_encoder_3 of SD3, and nothing says which of them it is",
            f"add {option('base', 'BASE')}",
        )
    return said, ""
