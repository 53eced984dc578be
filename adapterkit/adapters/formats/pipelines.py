"""How single files name the modules of a pipeline: which part a key belongs to, and what a base calls its modules.

Trainers of image models put the text encoders and the denoiser into one file, told apart by the start of a key. A base is
one of those parts, or a whole checkpoint of one file, in which every part has a lead of its own and the denoiser of Stable
Diffusion 1 and 2 has older names than those it was trained under.

Source of the older names: CompVis' and diffusers' own classes, as LyCORIS maps them (``utils``, Apache-2.0).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PART = re.compile(r"^(?:lora|lycoris|oft)_(?:(te\d*|unet|transformer|llm)_)?")

# Leads that modules have in one version of their classes, or in a checkpoint of a whole pipeline, and not in another.
LEADS = (
    *("text_model_", "model_", "transformer_", "model_language_model_", "language_model_", "encoder_"),
    *("model_diffusion_model_", "diffusion_model_"),
    *("cond_stage_model_transformer_", "conditioner_embedders_0_transformer_"),
)

# Parts of a block, by diffusers' name and the older one.
_IN_BLOCK = {
    "conv1": "in_layers_2",
    "conv2": "out_layers_3",
    "norm1": "in_layers_0",
    "norm2": "out_layers_0",
    "time_emb_proj": "emb_layers_1",
    "conv_shortcut": "skip_connection",
}
_KINDS = ("resnets", "attentions")
_BLOCK = re.compile(r"(down|up)_blocks_(\d+)_(resnets|attentions)_(\d+)_(.+)")
_MIDDLE = re.compile(r"mid_block_(resnets|attentions)_(\d+)_(.+)")
_SAMPLER = re.compile(r"(down|up)_blocks_(\d+)_(?:down|up)samplers_0_conv")
_TOP = {
    "conv_in": "input_blocks_0_0",
    "conv_norm_out": "out_0",
    "conv_out": "out_2",
    "time_embedding_linear_1": "time_embed_0",
    "time_embedding_linear_2": "time_embed_2",
}


def split(key: str) -> tuple[str, str]:
    """The part of a pipeline that a module of a file belongs to (empty where its name says none), and its path."""
    found = _PART.match(key)
    return ("", key) if found is None else (found.group(1) or "", key[found.end() :])


def is_prefixed(key: str) -> bool:
    """Whether a key starts as such files name modules."""
    return _PART.match(key) is not None


def aliases(name: str) -> Iterator[str]:
    """What a base may call a module of this flat name, the name itself aside."""
    older = tuple(_older(name))
    yield from older
    for one in (name, *older):
        yield from (one.removeprefix(lead) for lead in LEADS if one.startswith(lead))
        yield from (lead + one for lead in LEADS)


def _older(name: str) -> Iterator[str]:
    """The names of Stable Diffusion's UNet in checkpoints of one file, by those in diffusers."""
    if name in _TOP:
        yield _TOP[name]
    elif found := _BLOCK.fullmatch(name):
        side, block, kind, index, rest = found.groups()
        place = int(block) * 3 + int(index) + (1 if side == "down" else 0)
        yield f"{'input' if side == 'down' else 'output'}_blocks_{place}_{_KINDS.index(kind)}_{_inner(kind, rest)}"
    elif found := _MIDDLE.fullmatch(name):
        kind, index, rest = found.groups()
        yield f"middle_block_{1 if kind == 'attentions' else 2 * int(index)}_{_inner(kind, rest)}"
    elif found := _SAMPLER.fullmatch(name):
        side, block = found.groups()
        if side == "down":
            yield f"input_blocks_{int(block) * 3 + 3}_0_op"
        else:
            # After the block's attention, where it has one.
            yield from (f"output_blocks_{int(block) * 3 + 2}_{place}_conv" for place in (1, 2))


def _inner(kind: str, rest: str) -> str:
    return _IN_BLOCK.get(rest, rest) if kind == "resnets" else rest
