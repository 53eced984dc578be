"""Module names of Stable Diffusion's first code (LDM, later SGM) as diffusers names the same modules.

kohya's scripts name the UNet of SDXL by the first, ``input_blocks_4_1_transformer_blocks_0_attn1_to_q``, while the model is
stored with the second, ``down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q``. LDM counts two layers and what changes
the resolution as three blocks of one list; diffusers has a list of levels with lists in them.

Source: the UNet of CompVis/latent-diffusion (MIT) beside that of diffusers; held against diffusers' own conversion.
"""

from __future__ import annotations

import re

LAYERS = 2  # per level, in every UNet of the family

_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ALONE = {
    "input_blocks_0_0": "conv_in",
    "out_0": "conv_norm_out",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}


def diffusers_name(flat: str) -> str | None:
    """The flat name that a module of LDM's UNet has in diffusers, both with ``_`` for every dot; None for any other name."""
    if flat in _ALONE:
        return _ALONE[flat]
    if flat.startswith("middle_block_"):
        at, _, rest = flat.removeprefix("middle_block_").partition("_")
        if at == "1":
            return f"mid_block_attentions_0_{rest}"
        return f"mid_block_resnets_{int(at) // 2}_{_RESNET[rest]}" if at in ("0", "2") and rest in _RESNET else None
    match = re.fullmatch(r"(input|output)_blocks_(\d{1,3})_(\d)_(.+)", flat)
    if match is None:
        return None
    side, rest = match.group(1), match.group(4)
    level, layer = divmod(int(match.group(2)) - (side == "input"), LAYERS + 1)
    blocks = f"{'down' if side == 'input' else 'up'}_blocks_{level}"
    if rest == "op":
        return f"{blocks}_downsamplers_0_conv"
    if rest == "conv":
        return f"{blocks}_upsamplers_0_conv"
    if match.group(3) == "1":
        return f"{blocks}_attentions_{layer}_{rest}"
    return f"{blocks}_resnets_{layer}_{_RESNET[rest]}" if match.group(3) == "0" and rest in _RESNET else None
