"""An adapter as a single file, as the programs that people came from load it: diffusers, kohya's scripts, ComfyUI, LyCORIS.

==============  ==========================================================================================
``diffusers``   ``transformer.`` or ``unet.`` and diffusers' paths, ``lora_A`` and ``lora_B``, scales folded into B
``kohya``       ``lora_unet_`` and the original layout's names without dots, ``lora_down``, ``lora_up``, ``alpha``
``comfyui``     ``diffusion_model.`` and the original layout's paths, ``lora_down``, ``lora_up``, ``alpha``
``lycoris``     ``lycoris_`` and diffusers' paths without dots, as LyCORIS' wrapper names them
==============  ==========================================================================================
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.adapters.families.names import ENCODERS, FAMILIES, bare
from adapterkit.adapters.families.told import SAID
from adapterkit.adapters.formats.contents import METADATA
from adapterkit.adapters.formats.encoders import encoder_lead, model_of
from adapterkit.adapters.formats.generation import counts_encoders, is_sdxl, is_unet
from adapterkit.adapters.formats.parts import KINDS
from adapterkit.adapters.formats.relaid import TrainedOn, family_for, relaid
from adapterkit.adapters.formats.views import FunctionTensor
from adapterkit.adapters.formats.write import AdapterFiles
from adapterkit.checkpoint.tensor import Renamed
from adapterkit.dtypes import BF16, F32
from adapterkit.errors import UnsupportedAdapter, option

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.formats.plain import PlainFactors
    from adapterkit.adapters.formats.relaid import Rows
    from adapterkit.adapters.names import Names
    from adapterkit.checkpoint.tensor import Tensor

ENCODER = next(family for family in FAMILIES if family.name == "OpenCLIP text encoder")


@dataclass(frozen=True)
class Style:
    """A way of writing an adapter's file.

    Attributes:
        name: the word for ``--to``.
        layout: whose names its modules have.
        leads: by the part of a pipeline.
        flat: paths have ``_`` for every dot.
        factors: what A and B are called.
        alpha: whether a scale stands beside a module; else it is folded into B.
        weights: the file's name in a folder.
    """

    name: str
    layout: str
    leads: Mapping[str, str]
    flat: bool
    factors: tuple[str, str]
    alpha: bool
    weights: str


_DOWN = ("lora_down.weight", "lora_up.weight")
STYLES = {
    style.name: style
    for style in (
        Style(
            "diffusers",
            "diffusers",
            {
                "denoiser": "transformer.",
                "te1": "text_encoder.",
                "te2": "text_encoder_2.",
                "te3": "text_encoder_3.",
                "transformer_2": "transformer_2.",
            },
            False,
            ("lora_A.weight", "lora_B.weight"),
            False,
            "pytorch_lora_weights.safetensors",
        ),
        Style(
            "kohya",
            "original",
            {"denoiser": "lora_unet_", "te1": "lora_te1_", "te2": "lora_te2_", "te3": "lora_te3_"},
            True,
            _DOWN,
            True,
            "lora.safetensors",
        ),
        Style(
            "comfyui",
            "original",
            {
                "denoiser": "diffusion_model.",
                "te1": "text_encoders.clip_l.transformer.",
                "te2": "text_encoders.clip_g.transformer.",
                "te3": "text_encoders.t5xxl.transformer.",
            },
            False,
            _DOWN,
            True,
            "lora.safetensors",
        ),
        Style("lycoris", "diffusers", {"denoiser": "lycoris_"}, True, _DOWN, True, "lycoris.safetensors"),
    )
}


def style_of(adapter: Adapter) -> str:
    """The style that the file of an adapter has; diffusers' where it is none of these."""
    written = {"kohya": "kohya", "ComfyUI": "comfyui", "LyCORIS": "lycoris"}
    return "diffusers" if adapter.contents is None else written.get(adapter.contents.style, "diffusers")


def as_single(
    adapter: Adapter,
    factors: Sequence[PlainFactors],
    whole: Mapping[str, Tensor],
    style: Style,
    names: Names | None = None,
) -> AdapterFiles:
    """What `scaled_factors` gave, as a file of this style.

    Args:
        names: those of the base, where one is given.

    Raises:
        UnsupportedAdapter: it brings whole parameters, is for parts that the style cannot tell apart, or cannot be laid
            out so.
    """
    if whole:
        raise UnsupportedAdapter(
            f"{adapter.ref} brings whole parameters ({next(iter(whole))}), which a LoRA file has no place for",
            "merge it and convert the model",
        )
    parts: dict[str, list[PlainFactors]] = {}
    for one in factors:
        if one.embedding or one.turned:
            raise UnsupportedAdapter(f"{one.path} is no layer that such files have", f"write {option('to', 'peft')}")
        kind, path = _place(one.path, adapter)
        parts.setdefault(kind, []).append(replace(one, path=path))
    if len(parts) > 1 and style.name == "lycoris":
        raise UnsupportedAdapter(
            f"{adapter.ref} is for {len(parts)} models ({', '.join(sorted(parts))}), and such a file is of one",
            f"name one part: {option('only', 'PART')}",
        )
    tensors: dict[str, Tensor] = {}
    counted = counts_encoders(parts, adapter.contents, names)
    encoders = any(kind.startswith("te") for kind in parts)
    model = model_of(parts, _origin(adapter), names) if encoders else ""
    notes: list[str] = []
    for kind, own in parts.items():
        laid = _laid(own, kind, style, adapter, names, notes)
        lead, taken = _lead(kind, own, style, counted), ""
        if kind.startswith("te") and style.name != "lycoris":
            lead, taken = encoder_lead(kind, own, style.name, model, adapter.ref) or (lead, "")
        for one in laid:
            path = one.path.removeprefix(taken)
            path = path.replace(".", "_") if style.flat else path
            tensors |= _named(one, lead + path, style)
    # In safetensors' own order, so that a hash of these tensors is the same whoever saves them.
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.bits, item[1].dtype is not BF16, item[0])))
    return AdapterFiles(style.weights, ordered, {}, tuple(notes), _metadata(adapter, factors))


# How the components of a pipeline lead their modules, where those are more than a denoiser.
_COMPONENTS = {
    "text_encoder.": "te1",
    "text_encoder_2.": "te2",
    "text_encoder_3.": "te3",
    "transformer_2.": "transformer_2",
}


def component_lead(part: str) -> str:
    """How the modules of a part of a pipeline are led where several stand together; empty for a denoiser."""
    kind = KINDS.get(part, part)
    return next((lead for lead, known in _COMPONENTS.items() if known == kind), "")


def _place(path: str, adapter: Adapter) -> tuple[str, str]:
    """The part of a pipeline that a module is of, and its path there."""
    lead = next((lead for lead in _COMPONENTS if path.startswith(lead)), "")
    return (_COMPONENTS[lead], path.removeprefix(lead)) if lead else (_kind(path, adapter), path)


def _kind(path: str, adapter: Adapter) -> str:
    for kind, leads in ENCODERS.items():
        if path.startswith(leads):
            return kind
    if adapter.contents is not None:
        part = next((module.part for module in adapter.contents.modules if module.path == path), "")
        if part in KINDS:
            return KINDS[part]
    return "te1" if bare(path).startswith("text_model.") else "denoiser"


def _laid(
    own: list[PlainFactors], kind: str, style: Style, adapter: Adapter, names: Names | None, notes: list[str]
) -> list[PlainFactors]:
    if kind not in ("denoiser", "transformer_2"):
        return relaid(own, "diffusers", ENCODER, _rows(names))
    layout = style.layout
    if style.name == "kohya" and is_unet(own):
        layout = "original" if is_sdxl(own, adapter.contents, names) else "diffusers"
    family = None if names is None else names.families.family_at(own[0].path)
    if family is None:
        family, note = family_for(own, layout, _origin(adapter))
        notes += [note] if note else []
    return relaid(own, layout, family, _rows(names))


def _origin(adapter: Adapter) -> TrainedOn:
    """What an adapter says that it was trained on."""
    metadata = {} if adapter.contents is None else adapter.contents.metadata
    auto = adapter.config.get("auto_mapping")
    trained = str(auto.get("base_model_class") or "") if isinstance(auto, dict) else ""
    said = [*(metadata.get(name) for name in SAID), adapter.config.base]
    return TrainedOn(adapter.ref, tuple(str(text) for text in said if text), trained)


def _rows(names: Names | None) -> Rows:
    def rows(path: str) -> int | None:
        target = None if names is None else names.find(f"{path}.weight")
        return None if target is None else target.matrix[0]

    return rows


def _lead(kind: str, own: list[PlainFactors], style: Style, counted: bool) -> str:
    if style.name == "diffusers" and kind == "denoiser" and is_unet(own):
        return "unet."
    if style.name == "kohya" and kind == "te1" and not counted:
        return "lora_te_"
    if kind not in style.leads:
        raise UnsupportedAdapter(f"a file of {style.name} has no name for {kind}", f"write {option('to', 'diffusers')}")
    return style.leads[kind]


def _named(one: PlainFactors, module: str, style: Style) -> dict[str, Tensor]:
    names = [f"{module}.{leaf}" for leaf in style.factors]
    a, b = one.stored
    if style.alpha:
        alpha = struct.pack("<f", one.scale * one.rank)

        def make() -> torch.Tensor:
            import torch

            return torch.frombuffer(bytearray(alpha), dtype=torch.float32)

        name = f"{module}.alpha"
        return {
            names[0]: Renamed(names[0], a),
            names[1]: Renamed(names[1], b),
            name: FunctionTensor(name, F32, (), make, "alpha", 0),
        }
    if one.scale == 1:
        return {names[0]: Renamed(names[0], a), names[1]: Renamed(names[1], b)}

    def scaled() -> torch.Tensor:
        found: torch.Tensor = b.read(0, b.numel).view(b.shape).float() * one.scale
        return found

    folded = FunctionTensor(names[1], F32, b.shape, scaled, "scaling folded in", b.nbytes)
    return {names[0]: Renamed(names[0], a), names[1]: folded}


def _metadata(adapter: Adapter, factors: Sequence[PlainFactors]) -> dict[str, str]:
    """What the file says of its training, and what A1111 and ComfyUI show of a LoRA."""
    old = {} if adapter.contents is None else adapter.contents.metadata
    kept = {name: value for name, value in old.items() if name != METADATA}
    ranks = {one.rank for one in factors}
    alphas = {one.scale * one.rank for one in factors}
    said = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
    }
    if adapter.config.base:
        said["ss_sd_model_name"] = str(adapter.config.base)
    return {**kept, **said}
