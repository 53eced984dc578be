"""Which Stable Diffusion a LoRA is of: sd-scripts names the modules of SDXL otherwise than those of SD 1 and 2.

===================  ===================================  ==============================
of                   the UNet                             the first text encoder
===================  ===================================  ==============================
SD 1, SD 2           diffusers' names                     ``lora_te_``
SDXL                 the original names                   ``lora_te1_``
Flux, SD3, others    (no UNet)                            ``lora_te1_``
===================  ===================================  ==============================

Its loaders look for these names alone, and leave out what is called otherwise. Source: kohya-ss/sd-scripts (Apache-2.0),
``networks/lora.py``, ``lora_flux.py`` and ``lora_sd3.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from adapterkit.adapters.families.names import ENCODERS, bare, family_of

if TYPE_CHECKING:
    from adapterkit.adapters.formats.contents import Contents
    from adapterkit.adapters.formats.plain import PlainFactors
    from adapterkit.adapters.names import Names

UNET = "Stable Diffusion UNet"
_FIRST = frozenset({768, 1024})  # how wide the text is that the UNet of SD 1 or SD 2 looks at
_SECOND = 2048  # of SDXL
_DEEPER = re.compile(r"transformer_blocks\.[1-9]")  # SD 1 and 2 have one block in every attention
_ORIGINAL = ("input_blocks_", "middle_block_", "output_blocks_")
_LATER = ("te1", "te2", "te3")


def is_unet(own: Sequence[PlainFactors]) -> bool:
    """Whether these are modules of Stable Diffusion's UNet."""
    told = family_of([bare(one.path) for one in own])
    return told is not None and told[0].name == UNET


def is_sdxl(unet: Sequence[PlainFactors], contents: Contents | None, names: Names | None) -> bool:
    """Whether the UNet is that of SDXL, by its own shapes, the base, or the file that the adapter came in."""
    looked = {one.stored[0].shape[1] for one in unet if one.path.endswith(("attn2.to_k", "attn2.to_v"))}
    if looked & _FIRST:
        return False
    deeper = any(_DEEPER.search(one.path) for one in unet)
    return _SECOND in looked or deeper or _has_second_encoder(names) or _comes_from_sdxl(contents)


def counts_encoders(
    parts: Mapping[str, Sequence[PlainFactors]], contents: Contents | None, names: Names | None
) -> bool:
    """Whether sd-scripts counts the text encoders of the model: ``te1``, not ``te``."""
    if "te2" in parts or "te3" in parts:
        return True
    unet = parts.get("denoiser", ())
    return (bool(unet) and not is_unet(unet)) or is_sdxl(unet, contents, names)


def _has_second_encoder(names: Names | None) -> bool:
    if names is None:
        return False
    leads = names.families.leads
    inside = any(lead in leads for kind in ("te2", "te3") for lead in ENCODERS[kind])
    return inside or "text_encoder_2" in names.components or names.find("add_embedding.linear_1.weight") is not None


def _comes_from_sdxl(contents: Contents | None) -> bool:
    """The names and the metadata of the file, as sd-scripts writes them; whether it has several text encoders too."""
    if contents is None:
        return False
    if contents.metadata.get("ss_base_model_version", "").startswith(("sdxl", "flux", "sd3")):
        return True
    return any(
        module.part in _LATER or (module.flat and module.part == "unet" and module.path.startswith(_ORIGINAL))
        for module in contents.modules
    )
