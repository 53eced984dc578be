"""How single files name the modules of a pipeline: which part a key belongs to, and what a base calls its modules.

Trainers of image models put the text encoders and the denoiser into one file, told apart by the start of a key. A base is
one of those parts, or a whole checkpoint of one file, in which every part has a lead of its own and the UNet of Stable
Diffusion 1 and 2 has other names than those it was trained under (`adapterkit.adapters.formats.ldm`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from adapterkit.adapters.formats.ldm import diffusers_name

if TYPE_CHECKING:
    from collections.abc import Iterator

_PART = re.compile(r"^(?:lora|lycoris|oft)_(?:(te\d*|unet|transformer|llm)_)?")

# Leads that modules have in one version of their classes, or in a checkpoint of a whole pipeline, and not in another.
_DENOISER = ("model_diffusion_model_", "diffusion_model_")
LEADS = (
    *("text_model_", "model_", "transformer_", "model_language_model_", "language_model_", "encoder_"),
    *_DENOISER,
    *("cond_stage_model_transformer_", "conditioner_embedders_0_transformer_"),
)


def split(key: str) -> tuple[str, str]:
    """The part of a pipeline that a module of a file belongs to (empty where its name says none), and its path."""
    found = _PART.match(key)
    return ("", key) if found is None else (found.group(1) or "", key[found.end() :])


def is_prefixed(key: str) -> bool:
    """Whether a key starts as such files name modules."""
    return _PART.match(key) is not None


def aliases(name: str) -> Iterator[str]:
    """What a base may call a module of this flat name, the name itself aside."""
    yield from (name.removeprefix(lead) for lead in LEADS if name.startswith(lead))
    yield from (lead + name for lead in LEADS)


def in_diffusers(name: str) -> str | None:
    """The name in diffusers of a UNet's module in a checkpoint that has the older names; None for any other."""
    lead = next((lead for lead in _DENOISER if name.startswith(lead)), "")
    return diffusers_name(name.removeprefix(lead))
