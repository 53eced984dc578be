"""Stable Diffusion's first code: the UNet of LDM and SGM, and OpenCLIP's text encoder.

LDM counts two layers and what changes the resolution as three blocks of one list; diffusers has a list of levels with lists in
them. Files for SDXL name the UNet by the first, ``input_blocks.4.1.transformer_blocks.0.attn1.to_q``, while diffusers stores
``down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q``.

Sources: CompVis/latent-diffusion and mlfoundations/open_clip (both MIT) beside diffusers' and transformers' modules; held
against diffusers' conversions by the tests.
"""

from __future__ import annotations

from collections.abc import Iterable

from adapterkit.adapters.families.row import BARE, JOINED, PipelineFamily, SharedRows, table

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
LAYERS, LEVELS = 2, 4  # layers of a level in every UNet of the family, levels at most

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def _resnet(original: str, diffusers: str) -> list[SharedRows]:
    return [SharedRows(f"{original}.{ours}", (f"{diffusers}.{theirs}",)) for ours, theirs in _RESNET.items()]


def _unet() -> tuple[SharedRows, ...]:
    rows = list(
        table("""
        input_blocks.0.0 -> conv_in
        out.0 -> conv_norm_out
        out.2 -> conv_out
        time_embed.0 -> time_embedding.linear_1
        time_embed.2 -> time_embedding.linear_2
        label_emb.0.0 -> add_embedding.linear_1
        label_emb.0.2 -> add_embedding.linear_2
        middle_block.1.* -> mid_block.attentions.0.*
        """)
    )
    rows += [
        SharedRows("label_emb.0.0", ("class_embedding.linear_1",), alias=True),
        SharedRows("label_emb.0.2", ("class_embedding.linear_2",), alias=True),
    ]
    rows += [*_resnet("middle_block.0", "mid_block.resnets.0"), *_resnet("middle_block.2", "mid_block.resnets.1")]
    for level in range(LEVELS):
        first = 1 + level * (LAYERS + 1)
        for layer in range(LAYERS):
            rows += _resnet(f"input_blocks.{first + layer}.0", f"down_blocks.{level}.resnets.{layer}")
            rows.append(SharedRows(f"input_blocks.{first + layer}.1.*", (f"down_blocks.{level}.attentions.{layer}.*",)))
        rows.append(SharedRows(f"input_blocks.{first + LAYERS}.0.op", (f"down_blocks.{level}.downsamplers.0.conv",)))
        first = level * (LAYERS + 1)
        for layer in range(LAYERS + 1):
            rows += _resnet(f"output_blocks.{first + layer}.0", f"up_blocks.{level}.resnets.{layer}")
            rows.append(SharedRows(f"output_blocks.{first + layer}.1.*", (f"up_blocks.{level}.attentions.{layer}.*",)))
        # Behind the attention of its level, where that has one.
        rows += [
            SharedRows(
                f"output_blocks.{first + LAYERS}.{place}.conv", (f"up_blocks.{level}.upsamplers.0.conv",), when=when
            )
            for place, when in ((2, f"up_blocks.{level}.attentions."), (1, f"-up_blocks.{level}.attentions."))
        ]
    return tuple(rows)


_OPEN_CLIP = (
    SharedRows(
        "transformer.resblocks.{}.attn.in_proj",
        tuple(f"text_model.encoder.layers.{{}}.self_attn.{name}_proj" for name in "qkv"),
        leaves=JOINED,
    ),
    *table("""
        transformer.resblocks.{}.attn.out_proj -> text_model.encoder.layers.{}.self_attn.out_proj
        transformer.resblocks.{}.mlp.c_fc -> text_model.encoder.layers.{}.mlp.fc1
        transformer.resblocks.{}.mlp.c_proj -> text_model.encoder.layers.{}.mlp.fc2
        transformer.resblocks.{}.ln_1 -> text_model.encoder.layers.{}.layer_norm1
        transformer.resblocks.{}.ln_2 -> text_model.encoder.layers.{}.layer_norm2
        ln_final -> text_model.final_layer_norm
        token_embedding -> text_model.embeddings.token_embedding
    """),
    SharedRows("positional_embedding", ("text_model.embeddings.position_embedding.weight",), leaves=BARE),
    SharedRows("text_projection", ("text_projection.weight",), leaves=BARE, turned=True),
)

# What a LoRA may be trained on alone: the attention to the text, one half of the UNet, a block.
_TRAINED = (
    *("proj_in", "proj_out", "transformer_blocks.{}.ff.net.0.proj", "transformer_blocks.{}.ff.net.2"),
    *(f"transformer_blocks.{{}}.{side}.{name}" for side in ("attn1", "attn2") for name in _PROJECTIONS),
)


def _marks(attentions: tuple[str, ...], resnets: tuple[str, ...], layers: Iterable[str]) -> tuple[str, ...]:
    inside = [f"{block}.{name}" for block in attentions for name in _TRAINED]
    return (*inside, *(f"{block}.{name}" for block in resnets for name in layers))


FAMILIES = (
    PipelineFamily(
        "Stable Diffusion UNet",
        _unet(),
        (
            "input_blocks.0.0",
            *_marks(
                ("input_blocks.{}.1", "middle_block.1", "output_blocks.{}.1"),
                ("input_blocks.{}.0", "middle_block.0", "middle_block.2", "output_blocks.{}.0"),
                _RESNET,
            ),
        ),
        _marks(
            ("down_blocks.{}.attentions.{}", "mid_block.attentions.{}", "up_blocks.{}.attentions.{}"),
            ("down_blocks.{}.resnets.{}", "mid_block.resnets.{}", "up_blocks.{}.resnets.{}"),
            _RESNET.values(),
        ),
        ("UNet2DConditionModel",),
        whole=True,
        said=r"sd[-_ ]?(xl|v?[12](?!\d))|stable[-_ ]diffusion[-_ ](v?[12](?!\d)|xl)",
    ),
    PipelineFamily(
        "OpenCLIP text encoder",
        _OPEN_CLIP,
        ("transformer.resblocks.{}.attn.out_proj", "transformer.resblocks.{}.mlp.c_fc"),
        ("text_model.encoder.layers.{}.self_attn.q_proj",),
        ("CLIPTextModel", "CLIPTextModelWithProjection"),
    ),
)
