"""Flux.1 (Kontext, control LoRAs, XLabs' names), Chroma, Flux.2 and Flux.3.

Sources: the models' own code (black-forest-labs/flux, Apache-2.0; lodestone-rock/flow) beside diffusers' modules; held against
diffusers' conversions by the tests.
"""

from __future__ import annotations

from adapterkit.adapters.families.row import SCALE, PipelineFamily, SharedRows, table

_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"


def _under(lead: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{lead}.{name}" for name in names)


_ATTENTION = (
    SharedRows("double_blocks.{}.img_attn.qkv", _under(f"{_DOUBLE}.attn", _QKV)),
    SharedRows("double_blocks.{}.txt_attn.qkv", _under(f"{_DOUBLE}.attn", _ADDED)),
    *table("""
        double_blocks.{}.img_attn.proj -> transformer_blocks.{}.attn.to_out.0
        double_blocks.{}.txt_attn.proj -> transformer_blocks.{}.attn.to_add_out
    """),
    *table(
        """
        double_blocks.{}.img_attn.norm.query_norm -> transformer_blocks.{}.attn.norm_q
        double_blocks.{}.img_attn.norm.key_norm -> transformer_blocks.{}.attn.norm_k
        double_blocks.{}.txt_attn.norm.query_norm -> transformer_blocks.{}.attn.norm_added_q
        double_blocks.{}.txt_attn.norm.key_norm -> transformer_blocks.{}.attn.norm_added_k
        single_blocks.{}.norm.query_norm -> single_transformer_blocks.{}.attn.norm_q
        single_blocks.{}.norm.key_norm -> single_transformer_blocks.{}.attn.norm_k
        """,
        leaves=SCALE,
    ),
)
_ENDS = table("""
    img_in -> x_embedder
    txt_in -> context_embedder
    final_layer.linear -> proj_out
""")
_FINAL = (SharedRows("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap="halves"),)
_DOUBLE_MLP = table("""
    double_blocks.{}.img_mlp.0 -> transformer_blocks.{}.ff.net.0.proj
    double_blocks.{}.img_mlp.2 -> transformer_blocks.{}.ff.net.2
    double_blocks.{}.txt_mlp.0 -> transformer_blocks.{}.ff_context.net.0.proj
    double_blocks.{}.txt_mlp.2 -> transformer_blocks.{}.ff_context.net.2
""")
_SINGLE_LINEAR = (
    SharedRows(
        "single_blocks.{}.linear1",
        (*_under(f"{_SINGLE}.attn", _QKV), f"{_SINGLE}.proj_mlp"),
        share="width",
        wide="single_blocks.{}.linear2",
    ),
    SharedRows("single_blocks.{}.linear2", (f"{_SINGLE}.proj_out",)),
)
# XLabs names what a processor adds: lora1 is the image's side, lora2 the text's; in a single block q, k and v alone.
_XLABS = (
    SharedRows("double_blocks.{}.processor.qkv_lora1", _under(f"{_DOUBLE}.attn", _QKV), alias=True),
    SharedRows("double_blocks.{}.processor.qkv_lora2", _under(f"{_DOUBLE}.attn", _ADDED), alias=True),
    SharedRows("double_blocks.{}.processor.proj_lora1", (f"{_DOUBLE}.attn.to_out.0",), alias=True),
    SharedRows("double_blocks.{}.processor.proj_lora2", (f"{_DOUBLE}.attn.to_add_out",), alias=True),
    SharedRows("single_blocks.{}.processor.qkv_lora", _under(f"{_SINGLE}.attn", _QKV), alias=True),
    SharedRows("single_blocks.{}.processor.proj_lora", (f"{_SINGLE}.proj_out",), alias=True),
)
_EMBEDDERS = table("""
    time_in.in_layer -> time_text_embed.timestep_embedder.linear_1
    time_in.out_layer -> time_text_embed.timestep_embedder.linear_2
    vector_in.in_layer -> time_text_embed.text_embedder.linear_1
    vector_in.out_layer -> time_text_embed.text_embedder.linear_2
    guidance_in.in_layer -> time_text_embed.guidance_embedder.linear_1
    guidance_in.out_layer -> time_text_embed.guidance_embedder.linear_2
""")
_MODULATION = table("""
    double_blocks.{}.img_mod.lin -> transformer_blocks.{}.norm1.linear
    double_blocks.{}.txt_mod.lin -> transformer_blocks.{}.norm1_context.linear
    single_blocks.{}.modulation.lin -> single_transformer_blocks.{}.norm.linear
""")
_GUIDANCE = (
    *table("""
        distilled_guidance_layer.in_proj -> distilled_guidance_layer.in_proj
        distilled_guidance_layer.out_proj -> distilled_guidance_layer.out_proj
        distilled_guidance_layer.layers.{}.in_layer -> distilled_guidance_layer.layers.{}.linear_1
        distilled_guidance_layer.layers.{}.out_layer -> distilled_guidance_layer.layers.{}.linear_2
    """),
    *table("distilled_guidance_layer.norms.{} -> distilled_guidance_layer.norms.{}", leaves=SCALE),
)
_FLUX2 = (
    *_ATTENTION,
    # diffusers can fuse its projections, and does so for a LoKr, which cannot be split.
    SharedRows("double_blocks.{}.img_attn.qkv", (f"{_DOUBLE}.attn.to_qkv",), alias=True),
    SharedRows("double_blocks.{}.txt_attn.qkv", (f"{_DOUBLE}.attn.to_added_qkv",), alias=True),
    *_ENDS,
    *_FINAL,
    *table("""
        double_blocks.{}.img_mlp.0 -> transformer_blocks.{}.ff.linear_in
        double_blocks.{}.img_mlp.2 -> transformer_blocks.{}.ff.linear_out
        double_blocks.{}.txt_mlp.0 -> transformer_blocks.{}.ff_context.linear_in
        double_blocks.{}.txt_mlp.2 -> transformer_blocks.{}.ff_context.linear_out
        single_blocks.{}.linear1 -> single_transformer_blocks.{}.attn.to_qkv_mlp_proj
        single_blocks.{}.linear2 -> single_transformer_blocks.{}.attn.to_out
        time_in.in_layer -> time_guidance_embed.timestep_embedder.linear_1
        time_in.out_layer -> time_guidance_embed.timestep_embedder.linear_2
        guidance_in.in_layer -> time_guidance_embed.guidance_embedder.linear_1
        guidance_in.out_layer -> time_guidance_embed.guidance_embedder.linear_2
        double_stream_modulation_img.lin -> double_stream_modulation_img.linear
        double_stream_modulation_txt.lin -> double_stream_modulation_txt.linear
        single_stream_modulation.lin -> single_stream_modulation.linear
    """),
    # Some exports cut the lead short.
    *(
        SharedRows(f"sformer_blocks.{{}}.{name}", (f"{_DOUBLE}.{name}",), alias=True)
        for name in (
            *(f"attn.{one}" for one in (*_QKV, *_ADDED, "to_out.0", "to_add_out")),
            *(f"{ff}.{one}" for ff in ("ff", "ff_context") for one in ("linear_in", "linear_out")),
        )
    ),
)


def _flux3_block(original: str, diffusers: str) -> tuple[SharedRows, ...]:
    names = table(f"""
        {original}.q_proj -> {diffusers}.attn.to_q
        {original}.k_proj -> {diffusers}.attn.to_k
        {original}.v_proj -> {diffusers}.attn.to_v
        {original}.attn_out -> {diffusers}.attn.to_out.0
        {original}.mlp_in -> {diffusers}.ff.linear_in
        {original}.mlp_out -> {diffusers}.ff.linear_out
    """)
    norms = table(
        f"""
        {original}.norm.query_norm -> {diffusers}.attn.norm_q
        {original}.norm.key_norm -> {diffusers}.attn.norm_k
        """,
        leaves=SCALE,
    )
    return (*names, *norms)


_MODES = ("image", "image_cond", "txt")
_FLUX3 = (
    *_flux3_block("single_blocks.{}", "single_transformer_blocks.{}"),
    *_flux3_block("content_mode_blocks.{}", "mode_blocks.{}"),
    *_flux3_block("txt_mode_blocks.{}", "txt_mode_blocks.{}"),
    *(row for mode in _MODES for row in _flux3_block(f"content_mode_blocks.{mode}.{{}}", f"mode_blocks.{mode}.{{}}")),
    *(row for mode in _MODES for row in _flux3_block(f"content_mode_blocks.{{}}.{mode}", f"mode_blocks.{{}}.{mode}")),
    *table("""
        emb_in.* -> x_embedders.*
        txt_in -> context_embedder
        time_in.in_layer -> timestep_embedder.linear_1
        time_in.out_layer -> timestep_embedder.linear_2
        ref_time_in.in_layer -> target_timestep_embedder.linear_1
        ref_time_in.out_layer -> target_timestep_embedder.linear_2
        final_layer.image.linear -> proj_out
    """),
    *(
        SharedRows(f"{place}_stream_modulations.{mode}.lin", (f"{place}_stream_modulations.{mode}.linear",))
        for place in ("early", "late", "single", "mode")
        for mode in _MODES
    ),
    SharedRows("single_stream_modulation.lin", ("single_stream_modulation.linear",)),
    SharedRows("final_layer.image.adaLN_modulation.1", ("norm_out.linear",), swap="halves"),
)

FAMILIES = (
    PipelineFamily(
        "Flux.1",
        (*_ATTENTION, *_ENDS, *_FINAL, *_DOUBLE_MLP, *_SINGLE_LINEAR, *_MODULATION, *_EMBEDDERS, *_XLABS),
        (
            "double_blocks.{}.img_attn.qkv",
            "double_blocks.{}.img_mlp.0",
            "single_blocks.{}.linear1",
            "single_blocks.{}.linear2",
            "double_blocks.{}.img_attn.proj",
            "double_blocks.{}.img_mod.lin",
            "single_blocks.{}.modulation.lin",
            "double_blocks.{}.processor.qkv_lora1",
            "single_blocks.{}.processor.qkv_lora",
        ),
        (
            "single_transformer_blocks.{}.proj_mlp",
            "single_transformer_blocks.{}.proj_out",
            "single_transformer_blocks.{}.attn.to_q",
            "transformer_blocks.{}.ff_context.net.2",
        ),
        ("FluxTransformer2DModel",),
        whole=True,
        said=r"flux[-_. ]?(1|dev|schnell|kontext|fill|redux|canny|depth|krea)",
    ),
    PipelineFamily(
        "Flux.2",
        _FLUX2,
        ("single_stream_modulation.lin", "double_stream_modulation_img.lin", "double_stream_modulation_txt.lin"),
        (
            "single_transformer_blocks.{}.attn.to_qkv_mlp_proj",
            "transformer_blocks.{}.ff.linear_in",
            "time_guidance_embed.timestep_embedder.linear_1",
        ),
        ("Flux2Transformer2DModel",),
        whole=True,
        said=r"flux[-_. ]?2",
    ),
    PipelineFamily(
        "Flux.3",
        _FLUX3,
        (
            "single_blocks.{}.q_proj",
            "single_blocks.{}.attn_out",
            "single_blocks.{}.mlp_in",
            "early_stream_modulations.image.lin",
            "content_mode_blocks.{}.q_proj",
        ),
        ("single_transformer_blocks.{}.ff.linear_in",),
        ("Flux3Transformer2DModel",),
        whole=True,
        said=r"flux[-_. ]?3",
    ),
    PipelineFamily(
        "Chroma",
        (*_ATTENTION, *_ENDS, *_DOUBLE_MLP, *_SINGLE_LINEAR, *_GUIDANCE),
        ("distilled_guidance_layer.layers.{}.in_layer",),
        ("distilled_guidance_layer.layers.{}.linear_1",),
        ("ChromaTransformer2DModel",),
        whole=True,
        said=r"chroma",
    ),
)
