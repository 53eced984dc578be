"""Files of every trainer's keys, merged into a model of diffusers and into the original layout.

diffusers 0.42 converts a LoRA file (``loaders/lora_conversion_utils.py``); what its result adds to a weight is what a merge of
the file has to add. Into the original layout the same file has to add its own product.

Not asked here: the last modulation of Flux, HunyuanVideo and Flux.2 (``final_layer.adaLN_modulation.1``), whose halves change
places. diffusers 0.42 swaps those of ``lora_A`` too, which are ranks and no outputs, or swaps nothing; its conversion of
whole checkpoints is right, and is asked in ``test_checkpoint_conversions.py``.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from models import write_checkpoint
from safetensors.torch import save_file

from adapterkit.adapters.fold import fold
from adapterkit.adapters.load import load_adapter
from adapterkit.checkpoint.open import open_checkpoint

RANK, INPUTS, ALPHA, WIDE = 2, 8, 3.0, 3072  # diffusers splits Flux's rows at its own width

Modules = dict[str, tuple[int, int]]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def convert() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.loaders import lora_conversion_utils
    logging.getLogger("diffusers").setLevel(logging.CRITICAL)
    return lora_conversion_utils


def pair(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(RANK, columns), torch.randn(rows, RANK) * 0.1


def peft(lead: str, infix: str = "") -> Callable[[str, int, int], tuple[Tensors, torch.Tensor]]:
    def made(path: str, rows: int, columns: int) -> tuple[Tensors, torch.Tensor]:
        a, b = pair(rows, columns)
        return {f"{lead}{path}.lora_A.{infix}weight": a, f"{lead}{path}.lora_B.{infix}weight": b}, b @ a

    return made


def kohya(lead: str, flat: bool) -> Callable[[str, int, int], tuple[Tensors, torch.Tensor]]:
    def made(path: str, rows: int, columns: int) -> tuple[Tensors, torch.Tensor]:
        a, b = pair(rows, columns)
        module = lead + (path.replace(".", "_") if flat else path)
        found = {f"{module}.lora_down.weight": a, f"{module}.lora_up.weight": b, f"{module}.alpha": torch.tensor(ALPHA)}
        return found, ALPHA / RANK * b @ a

    return made


def xlabs(path: str, rows: int, columns: int) -> tuple[Tensors, torch.Tensor]:
    a, b = pair(rows, columns)
    return {f"{path}.down.weight": a, f"{path}.up.weight": b}, b @ a


def lokr(lead: str, flat: bool) -> Callable[[str, int, int], tuple[Tensors, torch.Tensor]]:
    def made(path: str, rows: int, columns: int) -> tuple[Tensors, torch.Tensor]:
        module = lead + (path.replace(".", "_") if flat else path)
        one, two = torch.randn(2, 2), torch.randn(rows // 2, columns // 2) * 0.1
        found = {f"{module}.lokr_w1": one, f"{module}.lokr_w2": two, f"{module}.alpha": torch.tensor(ALPHA)}
        return found, torch.kron(one, two)

    return made


def sized(rows: int, *paths: str) -> Modules:
    return dict.fromkeys(paths, (rows, INPUTS))


def flux_blocks() -> Modules:
    found: Modules = {}
    for side in ("img", "txt"):
        lead = f"double_blocks.1.{side}"
        found |= sized(16, f"{lead}_attn.proj", f"{lead}_mlp.2")
        found |= sized(48, f"{lead}_attn.qkv", f"{lead}_mod.lin") | sized(64, f"{lead}_mlp.0")
    return found


FLUX_SINGLE = {
    "single_blocks.2.linear1": (7 * WIDE, INPUTS),
    "single_blocks.2.linear2": (WIDE, INPUTS),
    **sized(48, "single_blocks.2.modulation.lin"),
}
FLUX2 = {
    **{name: size for name, size in flux_blocks().items() if "_mod" not in name},
    **sized(96, "single_blocks.0.linear1"),
    **sized(16, "single_blocks.0.linear2"),
}
FLUX2_ENDS = sized(16, "img_in", "txt_in", "guidance_in.in_layer", "final_layer.linear", "single_stream_modulation.lin")
HUNYUAN = {
    **sized(48, "double_blocks.0.img_attn_qkv", "double_blocks.0.txt_attn_qkv"),
    **sized(16, "double_blocks.0.img_attn_proj", "double_blocks.0.txt_mlp.fc2", "img_in.proj", "vector_in.in_layer"),
    **{name.replace("modulation.lin", "modulation.linear"): size for name, size in FLUX_SINGLE.items()},
}
WAN = {
    **sized(16, *(f"blocks.0.{side}.{name}" for side in ("self_attn", "cross_attn") for name in "qkvo")),
    **sized(16, "blocks.0.ffn.0", "blocks.0.ffn.2"),
}
WAN_IMAGE = sized(16, "blocks.0.cross_attn.k_img", "blocks.0.cross_attn.v_img")
QWEN = sized(
    16, *(f"transformer_blocks.0.{name}" for name in ("attn.to_q", "attn.add_q_proj", "img_mlp.net.2", "txt_mod.1"))
)
Z_IMAGE = sized(
    16, *(f"layers.3.attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")), "layers.3.feed_forward.w2"
)
LUMINA = {
    f"{block}.{name}": size
    for block in ("noise_refiner.0", "context_refiner.0", "layers.0")
    for name, size in {
        "attention.qkv": (3840, INPUTS),
        **sized(16, "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
        **({} if block.startswith("context") else sized(64, "adaLN_modulation.1")),
    }.items()
}
MINIMAX = {
    **sized(48, "blocks.0.attn.qkv_proj", "token_refiner.blocks.0.attn.qkv_proj"),
    **sized(64, "blocks.0.mlp.fc1"),
    **sized(16, "video_patch_proj", "condition_proj", "blocks.0.mlp.fc2"),
}
ANIMA = sized(
    16, "blocks.0.self_attn.q_proj", "blocks.0.mlp.layer1", "blocks.0.adaln_modulation_mlp.2", "x_embedder.proj.1"
)
KREA = sized(
    16, "blocks.0.attn.wq", "blocks.0.attn.gate", "blocks.0.mlp.up", "first", "txtfusion.refiner_blocks.0.attn.wo"
)
FLUX3 = sized(16, "single_blocks.0.q_proj", "single_blocks.0.attn_out", "content_mode_blocks.1.mlp_in")
IDEOGRAM = {
    **sized(48, "layers.0.attention.qkv"),
    **sized(16, "layers.0.attention.o", "layers.0.feed_forward.w1", "layers.0.adaln_modulation"),
}
ACE = sized(16, *(f"layers.0.{side}.{name}_proj" for side in ("self_attn", "cross_attn") for name in "qkvo"))
LTX2 = sized(16, "transformer_blocks.0.attn1.to_q", "patchify_proj", "audio_patchify_proj", "adaln_single.linear")
XLABS = {
    **sized(48, *(f"double_blocks.0.processor.qkv_lora{number}" for number in (1, 2))),
    **sized(
        16,
        *(f"double_blocks.0.processor.proj_lora{number}" for number in (1, 2)),
        "single_blocks.0.processor.proj_lora",
    ),
    **sized(48, "single_blocks.0.processor.qkv_lora"),
}

CASES: dict[str, tuple[str, Modules, Callable[[str, int, int], tuple[Tensors, torch.Tensor]]]] = {
    "Flux, kohya": ("kohya_flux_lora", flux_blocks() | FLUX_SINGLE, kohya("lora_unet_", True)),
    "Flux, ComfyUI": ("kohya_flux_lora", flux_blocks() | FLUX_SINGLE, kohya("diffusion_model.", False)),
    "Flux, XLabs": ("xlabs_flux_lora", XLABS, xlabs),
    "Flux.2, ai-toolkit": ("non_diffusers_flux2_lora", FLUX2 | FLUX2_ENDS, peft("diffusion_model.")),
    "Flux.2, kohya": ("kohya_flux2_lora", FLUX2, kohya("lora_unet_", True)),
    "Flux.2, LoKr": ("non_diffusers_flux2_lokr", FLUX2, lokr("diffusion_model.", False)),
    "Flux.2, LyCORIS": (
        "lycoris_flux2_lokr",
        sized(16, "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_out"),
        lokr("lycoris_", True),
    ),
    "Flux.3, ai-toolkit": ("non_diffusers_flux3_lora", FLUX3, peft("diffusion_model.")),
    "HunyuanVideo": ("hunyuan_video_lora", HUNYUAN, peft("transformer.")),
    "HunyuanVideo, ComfyUI": ("hunyuan_video_lora", HUNYUAN, peft("diffusion_model.")),
    "Lumina 2": ("non_diffusers_lumina2_lora", LUMINA, peft("diffusion_model.")),
    "Wan": ("non_diffusers_wan_lora", WAN | WAN_IMAGE, peft("diffusion_model.")),
    "Wan, alpha": ("non_diffusers_wan_lora", WAN, kohya("diffusion_model.", False)),
    "Wan, musubi": ("musubi_wan_lora", WAN | WAN_IMAGE, kohya("lora_unet_", True)),
    "LTX-2": ("non_diffusers_ltx2_lora", LTX2, peft("diffusion_model.")),
    "LTX-Video": ("non_diffusers_ltxv_lora", sized(16, "transformer_blocks.0.attn1.to_q"), peft("diffusion_model.")),
    "HiDream": (
        "non_diffusers_hidream_lora",
        sized(16, "double_stream_blocks.0.block.attn1.to_q"),
        peft("diffusion_model."),
    ),
    "Qwen-Image": ("non_diffusers_qwen_lora", QWEN, peft("diffusion_model.")),
    "Qwen-Image, musubi": ("non_diffusers_qwen_lora", QWEN, kohya("lora_unet_", True)),
    "Qwen-Image, DiffSynth": ("non_diffusers_qwen_lora", QWEN, peft("", "default.")),
    "Anima": ("non_diffusers_anima_lora", ANIMA, peft("diffusion_model.")),
    "Z-Image, ai-toolkit": ("non_diffusers_z_image_lora", Z_IMAGE, peft("diffusion_model.")),
    "Z-Image, musubi": ("non_diffusers_z_image_lora", Z_IMAGE, kohya("lora_unet_", True)),
    "Z-Image, LoKr": ("non_diffusers_lokr", Z_IMAGE, lokr("diffusion_model.", False)),
    "Ideogram 4": ("non_diffusers_ideogram4_lora", IDEOGRAM, peft("diffusion_model.")),
    "Krea 2": ("non_diffusers_krea2_lora", KREA, peft("base_model.model.")),
    "ACE-Step": ("non_diffusers_ace_step_lora", ACE, peft("base_model.model.")),
    "MiniMax-H3": ("non_diffusers_minimax_h3_lora", MINIMAX, peft("diffusion_model.")),
    "MiniMax-H3, musubi": ("non_diffusers_minimax_h3_lora", MINIMAX, kohya("lora_unet_", True)),
}
# XLabs' names are of what a processor adds; the weight itself has the name of its layer.
PLACES = {
    "processor.qkv_lora1": "img_attn.qkv",
    "processor.qkv_lora2": "txt_attn.qkv",
    "processor.proj_lora1": "img_attn.proj",
    "processor.proj_lora2": "txt_attn.proj",
    "processor.proj_lora": "linear2",
}


def change(state: Mapping[str, torch.Tensor]) -> Tensors:
    """What a file of diffusers' keys adds to each module, with scale 1."""
    found = {}
    for key, tensor in state.items():
        for end, other in ((".lora_A.weight", ".lora_B.weight"), (".lokr_w1", ".lokr_w2")):
            if key.endswith(end):
                path = key.removesuffix(end)
                two = state[path + other].float()
                found[path] = two @ tensor.float() if end == ".lora_A.weight" else torch.kron(tensor.float(), two)
    return found


def merged(base: Path, file: Path) -> Tensors:
    found = fold(open_checkpoint(base), [load_adapter(file)]).checkpoint
    return {name: tensor.read(0, tensor.numel).view(tensor.shape) for name, tensor in found.tensors.items()}


def check(base: Path, file: Path, before: Tensors, deltas: Tensors) -> None:
    after = merged(base, file)
    assert set(after) == set(before)
    for name, delta in deltas.items():
        error = (after[name] - before[name] - delta).abs().max()
        assert error <= 2e-5 * delta.abs().max(), f"{name}: {error / delta.abs().max():.1e} of the change"


@pytest.mark.parametrize("name", CASES)
def test_as_diffusers_converts_it(name: str, convert: Any, tmp_path: Path) -> None:
    function, modules, style = CASES[name]
    torch.manual_seed(0)
    state: Tensors = {}
    products: Tensors = {}
    for path, (rows, columns) in modules.items():
        found, delta = style(path, rows, columns)
        state |= found
        products[path] = delta
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "lora.safetensors")
    made = getattr(convert, f"_convert_{function}_to_diffusers")(copy.deepcopy(state))
    made = {key.removeprefix("transformer.").removeprefix("text_conditioner."): tensor for key, tensor in made.items()}
    deltas = {f"{path}.weight": delta for path, delta in change(made).items()}
    before = {key: torch.randn_like(delta) for key, delta in deltas.items()}
    base = write_checkpoint(tmp_path / "transformer", before, {"_class_name": "Transformer2DModel"})
    check(base, tmp_path / "lora.safetensors", before, deltas)
    # The original layout, under the leads that its files have.
    places = {
        f"{_placed(path)}.weight": delta for path, delta in products.items() if "processor.qkv_lora." not in path + "."
    }
    if name == "Flux, XLabs":
        delta = products["single_blocks.0.processor.qkv_lora"]
        places["single_blocks.0.linear1.weight"] = torch.cat([delta, torch.zeros(64, INPUTS)])
    for number, lead in enumerate(("", "model.diffusion_model.")):
        deltas = {lead + key: delta for key, delta in places.items()}
        before = {key: torch.randn_like(delta) for key, delta in deltas.items()}
        base = write_checkpoint(tmp_path / f"original{number}", before, {})
        check(base, tmp_path / "lora.safetensors", before, deltas)


def _placed(path: str) -> str:
    """The layer whose weight a module of a file changes, in the original layout."""
    lead, dot, end = path.partition("processor.")
    return lead + PLACES[dot + end] if dot else path
