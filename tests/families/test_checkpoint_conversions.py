"""Every row of the families' tables beside diffusers' conversion of whole checkpoints (``loaders/single_file_utils.py``).

An original checkpoint with a module for every row is converted by diffusers. Then each of diffusers' parameters has to be found
in the original, and each of the original's in diffusers', with the same values.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from adapterkit.adapters.families.names import FAMILIES, FamilyNames, family_of
from adapterkit.adapters.families.row import PipelineFamily, SharedRows
from adapterkit.adapters.layout import Layout

Tensors = dict[str, torch.Tensor]
WIDE = 3072  # diffusers splits Flux's and HunyuanVideo's rows at its own width

# The function of diffusers; how many blocks; rows of the table that its checkpoints do not have.
CONVERSIONS: dict[str, tuple[str, int, str]] = {
    "Flux.1": ("convert_flux_transformer_checkpoint_to_diffusers", 2, "processor"),
    "Chroma": ("convert_chroma_transformer_checkpoint_to_diffusers", 2, r"^final_layer\.adaLN"),
    "Flux.2": ("convert_flux2_transformer_checkpoint_to_diffusers", 1, "sformer"),
    "Flux.3": ("convert_flux3_transformer_checkpoint_to_diffusers", 1, ""),
    "HunyuanVideo": ("convert_hunyuan_video_transformer_to_diffusers", 1, ""),
    "Wan": ("convert_wan_transformer_to_diffusers", 1, ""),
    "LTX-Video": ("convert_ltx_transformer_checkpoint_to_diffusers", 1, ""),
    "LTX-2": ("convert_ltx2_transformer_to_diffusers", 1, r"prompt_adaln"),
    "Cosmos-2 and Anima": ("convert_cosmos_transformer_checkpoint_to_diffusers", 1, "llm_adapter"),
    "Lumina 2": ("convert_lumina2_to_diffusers", 1, ""),
    "Z-Image": ("convert_z_image_transformer_checkpoint_to_diffusers", 1, ""),
    "Qwen-Image": ("convert_qwen_image21_transformer_checkpoint_to_diffusers", 1, ""),
    "Krea 2": ("convert_krea2_transformer_checkpoint_to_diffusers", 1, ""),
    "MiniMax-H3": ("convert_minimax_h3_transformer_checkpoint_to_diffusers", 1, ""),
    "SD3": ("convert_sd3_transformer_checkpoint_to_diffusers", 2, r"^joint_blocks\.1\.context_block\.(attn\.proj|mlp)"),
    "AuraFlow": ("convert_auraflow_transformer_checkpoint_to_diffusers", 1, ""),
    "Mochi": ("convert_mochi_transformer_checkpoint_to_diffusers", 48, r"^blocks\.47\.(attn\.proj_y|mlp_y)"),
    "Sana": ("convert_sana_transformer_to_diffusers", 1, ""),
}
# Parameters that the models have not, as biases.
LACKING = {
    "Flux.3": r"\.bias$",
    "Mochi": r"(attn\.(qkv|[qk]_norm)_[xy]|mlp_[xy]\.w[12])\.bias$",
    "MiniMax-H3": r"blocks.*\.bias$",
    "AuraFlow": r"(?<!init_x_linear)\.bias$",
    "Sana": r"(attn\.qkv|point_conv\.conv|attention_y_norm)\.bias$",
    "Cosmos-2 and Anima": r"\.bias$",
    "SD3": r"ln_[qk]\.bias$",
}
FAMILY = {family.name: family for family in FAMILIES}


@pytest.fixture(scope="module")
def functions() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.loaders import single_file_utils
    return single_file_utils


def rows_of(row: SharedRows, name: str) -> int:
    if row.share == "width":
        return 7 * WIDE
    if row.share == "grouped":
        return 3840
    if row.wide or name.endswith("linear2"):
        return WIDE
    return 8 * len(row.parts) * (2 if row.swap else 1)


def original(family: PipelineFamily, blocks: int, without: str) -> Tensors:
    """A checkpoint with a module for every row."""
    found: Tensors = {}
    for row in family.rows:
        text = row.original.replace(".*", ".linear_1" if "t_embedder" in row.original else ".linear")
        for block in range(blocks if "{}" in text else 1):
            name = text.replace("{}", str(block))
            if row.alias or (without and re.search(without, name)):
                continue
            rows, columns = rows_of(row, name), 2304 if row.share == "grouped" else 6
            if row.fold:
                found[name] = torch.randn(6 * row.fold)
                continue
            if row.swap == "pair":
                rows = 2 * columns if block == blocks - 1 else 6 * columns
            for ours, _ in row.leaves:
                shape = (rows,) if ours in (".bias", ".scale") else (rows, columns)
                found[name + ours] = torch.randn(shape)
    return found


def values(layout: Layout | None, tensors: Tensors) -> torch.Tensor | None:
    """A parameter put together from the tensors that hold its rows."""
    if layout is None:
        return None
    out = torch.full(layout.shape, float("nan"))
    for piece in layout.pieces:
        held = tensors[piece.tensor]
        rows = held[piece.at : piece.at + piece.count * piece.at_step : piece.at_step]
        out[piece.row : piece.row + piece.count * piece.row_step : piece.row_step] = rows
    return out


def converted(name: str, functions: Any) -> tuple[Tensors, Tensors]:
    function, blocks, without = CONVERSIONS[name]
    torch.manual_seed(0)
    before = original(FAMILY[name], blocks, without)
    more = {"config": {}} if name == "MiniMax-H3" else {}
    convert: Callable[..., Tensors] = getattr(functions, function)
    before = {key: tensor for key, tensor in before.items() if not re.search(LACKING.get(name, "^$"), key)}
    before |= {"pos_frequencies": torch.zeros(3, 1, 1)} if name == "Mochi" else {}
    thrown = ("pos_embed", "y_embedder.y_embedding") if name == "Sana" else ()
    extra = {key: torch.zeros(1) for key in thrown}
    after = convert({**copy.deepcopy(before), **extra}, **more)
    return before, {key: tensor for key, tensor in after.items() if tensor is not None}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_every_row_as_diffusers_converts_it(name: str, functions: Any) -> None:
    before, after = converted(name, functions)
    here, there = (FamilyNames({key: tuple(tensor.shape) for key, tensor in one.items()}) for one in (before, after))
    checked = 0
    for key, tensor in after.items():
        found = values(here.find(key), before)
        if found is None and key.endswith("scale_shift_table") and name == "Krea 2":
            continue  # six vectors that are one in the original
        assert found is not None, f"{key} of diffusers is nowhere in the original"
        assert torch.equal(found.reshape(tensor.shape), tensor), f"{key} of diffusers is something else in the original"
        checked += 1
    for key, tensor in before.items():
        found = values(there.find(key), after)
        if found is None and key not in after and any(key.endswith(end) for end in (".mod.lin",)):
            continue
        assert found is not None, f"{key} of the original is nowhere in diffusers"
        assert torch.equal(found.reshape(tensor.shape), tensor), f"{key} of the original is something else in diffusers"
    assert checked > 0


@pytest.mark.parametrize("name", CONVERSIONS)
def test_the_family_is_told_by_the_names(name: str, functions: Any) -> None:
    before, after = converted(name, functions)
    for lead in ("", "model.diffusion_model."):
        told = family_of({lead + key: None for key in before})
        assert told is not None
        assert (told[0].name, told[1]) == (name, "original")
    told = family_of(after)
    assert told is not None
    assert (told[0].name, told[1]) == (name, "diffusers")
