"""Models of images beside Flux and Stable Diffusion.

SD3, AuraFlow, Lumina 2, Z-Image, Qwen-Image, HiDream, Sana, Krea 2 and Ideogram 4.

Sources: the models' published code beside diffusers' modules; held against diffusers' conversions by the tests.
"""

from __future__ import annotations

from adapterkit.adapters.families.row import BARE, SCALE, PipelineFamily, SharedRows, table

_QKV = ("to_q", "to_k", "to_v")


def _under(lead: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{lead}.{name}" for name in names)


_BLOCK = "transformer_blocks.{}"
_SD3 = (
    SharedRows("joint_blocks.{}.x_block.attn.qkv", _under(f"{_BLOCK}.attn", _QKV)),
    SharedRows(
        "joint_blocks.{}.context_block.attn.qkv", _under(f"{_BLOCK}.attn", ("add_q_proj", "add_k_proj", "add_v_proj"))
    ),
    SharedRows("joint_blocks.{}.x_block.attn2.qkv", _under(f"{_BLOCK}.attn2", _QKV)),
    # The last block has no more of its text side than a scale and a shift, which change places.
    SharedRows("joint_blocks.{}.context_block.adaLN_modulation.1", (f"{_BLOCK}.norm1_context.linear",), swap="pair"),
    SharedRows("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap="halves"),
    SharedRows("pos_embed", ("pos_embed.pos_embed",), leaves=BARE),
    *table("""
        joint_blocks.{}.x_block.attn.proj -> transformer_blocks.{}.attn.to_out.0
        joint_blocks.{}.context_block.attn.proj -> transformer_blocks.{}.attn.to_add_out
        joint_blocks.{}.x_block.attn2.proj -> transformer_blocks.{}.attn2.to_out.0
        joint_blocks.{}.x_block.attn.ln_q -> transformer_blocks.{}.attn.norm_q
        joint_blocks.{}.x_block.attn.ln_k -> transformer_blocks.{}.attn.norm_k
        joint_blocks.{}.context_block.attn.ln_q -> transformer_blocks.{}.attn.norm_added_q
        joint_blocks.{}.context_block.attn.ln_k -> transformer_blocks.{}.attn.norm_added_k
        joint_blocks.{}.x_block.attn2.ln_q -> transformer_blocks.{}.attn2.norm_q
        joint_blocks.{}.x_block.attn2.ln_k -> transformer_blocks.{}.attn2.norm_k
        joint_blocks.{}.x_block.adaLN_modulation.1 -> transformer_blocks.{}.norm1.linear
        joint_blocks.{}.x_block.mlp.fc1 -> transformer_blocks.{}.ff.net.0.proj
        joint_blocks.{}.x_block.mlp.fc2 -> transformer_blocks.{}.ff.net.2
        joint_blocks.{}.context_block.mlp.fc1 -> transformer_blocks.{}.ff_context.net.0.proj
        joint_blocks.{}.context_block.mlp.fc2 -> transformer_blocks.{}.ff_context.net.2
        x_embedder.proj -> pos_embed.proj
        t_embedder.mlp.0 -> time_text_embed.timestep_embedder.linear_1
        t_embedder.mlp.2 -> time_text_embed.timestep_embedder.linear_2
        y_embedder.mlp.0 -> time_text_embed.text_embedder.linear_1
        y_embedder.mlp.2 -> time_text_embed.text_embedder.linear_2
        context_embedder -> context_embedder
        final_layer.linear -> proj_out
    """),
)


def _aura(lead: str, to: str, sides: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[SharedRows, ...]:
    return tuple(
        SharedRows(f"{lead}.attn.{side}{letter}", (f"{to}.attn.{name}",))
        for side, names in sides
        for letter, name in zip("qkvo", names, strict=True)
    )


_PLAIN = (*_QKV, "to_out.0")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_AURA = (
    *_aura("double_layers.{}", "joint_transformer_blocks.{}", (("w2", _PLAIN), ("w1", _ADDED))),
    *_aura("single_layers.{}", "single_transformer_blocks.{}", (("w1", _PLAIN),)),
    *(
        SharedRows(f"{lead}.{mlp}.{name}", (f"{to}.{ff}.{other}",))
        for lead, mlp, to, ff in (
            ("double_layers.{}", "mlpX", "joint_transformer_blocks.{}", "ff"),
            ("double_layers.{}", "mlpC", "joint_transformer_blocks.{}", "ff_context"),
            ("single_layers.{}", "mlp", "single_transformer_blocks.{}", "ff"),
        )
        for name, other in (("c_fc1", "linear_1"), ("c_fc2", "linear_2"), ("c_proj", "out_projection"))
    ),
    SharedRows("modF.1", ("norm_out.linear",), swap="halves"),
    SharedRows("register_tokens", ("register_tokens",), leaves=BARE),
    SharedRows("positional_encoding", ("pos_embed.pos_embed",), leaves=BARE),
    *table("""
        double_layers.{}.modX.1 -> joint_transformer_blocks.{}.norm1.linear
        double_layers.{}.modC.1 -> joint_transformer_blocks.{}.norm1_context.linear
        single_layers.{}.modCX.1 -> single_transformer_blocks.{}.norm1.linear
        t_embedder.mlp.0 -> time_step_proj.linear_1
        t_embedder.mlp.2 -> time_step_proj.linear_2
        cond_seq_linear -> context_embedder
        final_linear -> proj_out
        init_x_linear -> pos_embed.proj
    """),
)


def _lumina(lead: str, modulated: bool) -> tuple[SharedRows, ...]:
    rows = (
        SharedRows(f"{lead}.attention.qkv", _under(f"{lead}.attn", _QKV), share="grouped"),
        *table(f"""
            {lead}.attention.out -> {lead}.attn.to_out.0
            {lead}.attention.q_norm -> {lead}.attn.norm_q
            {lead}.attention.k_norm -> {lead}.attn.norm_k
            {lead}.feed_forward.w1 -> {lead}.feed_forward.linear_1
            {lead}.feed_forward.w2 -> {lead}.feed_forward.linear_2
            {lead}.feed_forward.w3 -> {lead}.feed_forward.linear_3
            {lead}.attention_norm2 -> {lead}.norm2
            {lead}.ffn_norm1 -> {lead}.ffn_norm1
            {lead}.ffn_norm2 -> {lead}.ffn_norm2
        """),
    )
    first = f"{lead}.norm1.norm" if modulated else f"{lead}.norm1"
    more = (SharedRows(f"{lead}.adaLN_modulation.1", (f"{lead}.norm1.linear",)),) if modulated else ()
    return (*rows, SharedRows(f"{lead}.attention_norm1", (first,)), *more)


_LUMINA = (
    *_lumina("layers.{}", True),
    *_lumina("noise_refiner.{}", True),
    *_lumina("context_refiner.{}", False),
    *table("""
        cap_embedder.0 -> time_caption_embed.caption_embedder.0
        cap_embedder.1 -> time_caption_embed.caption_embedder.1
        t_embedder.mlp.0 -> time_caption_embed.timestep_embedder.linear_1
        t_embedder.mlp.2 -> time_caption_embed.timestep_embedder.linear_2
        x_embedder -> x_embedder
        final_layer.adaLN_modulation.1 -> norm_out.linear_1
        final_layer.linear -> norm_out.linear_2
    """),
)


def _z_block(lead: str) -> tuple[SharedRows, ...]:
    return (
        SharedRows(f"{lead}.attention.qkv", _under(f"{lead}.attention", _QKV)),
        *table(f"""
            {lead}.attention.out -> {lead}.attention.to_out.0
            {lead}.attention.q_norm -> {lead}.attention.norm_q
            {lead}.attention.k_norm -> {lead}.attention.norm_k
            {lead}.adaLN_modulation.0 -> {lead}.adaLN_modulation.0
            {lead}.attention_norm1 -> {lead}.attention_norm1
            {lead}.attention_norm2 -> {lead}.attention_norm2
            {lead}.feed_forward.w1 -> {lead}.feed_forward.w1
            {lead}.feed_forward.w2 -> {lead}.feed_forward.w2
            {lead}.feed_forward.w3 -> {lead}.feed_forward.w3
            {lead}.ffn_norm1 -> {lead}.ffn_norm1
            {lead}.ffn_norm2 -> {lead}.ffn_norm2
        """),
    )


_Z_IMAGE = (
    *_z_block("layers.{}"),
    *_z_block("noise_refiner.{}"),
    *_z_block("context_refiner.{}"),
    *table("""
        final_layer.* -> all_final_layer.2-1.*
        x_embedder -> all_x_embedder.2-1
    """),
)

_IDEOGRAM = (
    SharedRows("layers.{}.attention.qkv", _under("layers.{}.attention", _QKV)),
    SharedRows("layers.{}.attention.o", ("layers.{}.attention.to_out.0",)),
)


def _krea_block(original: str, diffusers: str) -> tuple[SharedRows, ...]:
    return (
        *table(f"""
            {original}.attn.wq -> {diffusers}.attn.to_q
            {original}.attn.wk -> {diffusers}.attn.to_k
            {original}.attn.wv -> {diffusers}.attn.to_v
            {original}.attn.wo -> {diffusers}.attn.to_out.0
            {original}.attn.gate -> {diffusers}.attn.to_gate
            {original}.mlp.gate -> {diffusers}.ff.gate
            {original}.mlp.up -> {diffusers}.ff.up
            {original}.mlp.down -> {diffusers}.ff.down
        """),
        *table(
            f"""
            {original}.attn.qknorm.qnorm -> {diffusers}.attn.norm_q
            {original}.attn.qknorm.knorm -> {diffusers}.attn.norm_k
            {original}.prenorm -> {diffusers}.norm1
            {original}.postnorm -> {diffusers}.norm2
            """,
            leaves=SCALE,
        ),
    )


_KREA = (
    *_krea_block("blocks.{}", "transformer_blocks.{}"),
    *_krea_block("txtfusion.layerwise_blocks.{}", "text_fusion.layerwise_blocks.{}"),
    *_krea_block("txtfusion.refiner_blocks.{}", "text_fusion.refiner_blocks.{}"),
    SharedRows("blocks.{}.mod.lin", ("transformer_blocks.{}.scale_shift_table",), leaves=BARE, fold=6),
    SharedRows("last.modulation.lin", ("final_layer.scale_shift_table",), leaves=BARE),
    *table("txtmlp.0 -> txt_in.norm\nlast.norm -> final_layer.norm", leaves=SCALE),
    *table("""
        first -> img_in
        tmlp.0 -> time_embed.linear_1
        tmlp.2 -> time_embed.linear_2
        tproj.1 -> time_mod_proj
        txtmlp.1 -> txt_in.linear_1
        txtmlp.3 -> txt_in.linear_2
        txtfusion.projector -> text_fusion.projector
        last.linear -> final_layer.linear
    """),
)

_SANA = (
    SharedRows("blocks.{}.attn.qkv", _under(f"{_BLOCK}.attn1", _QKV)),
    SharedRows("blocks.{}.cross_attn.kv_linear", _under(f"{_BLOCK}.attn2", _QKV[1:])),
    SharedRows("blocks.{}.scale_shift_table", (f"{_BLOCK}.scale_shift_table",), leaves=BARE),
    SharedRows("final_layer.scale_shift_table", ("scale_shift_table",), leaves=BARE),
    *table("""
        blocks.{}.attn.proj -> transformer_blocks.{}.attn1.to_out.0
        blocks.{}.cross_attn.q_linear -> transformer_blocks.{}.attn2.to_q
        blocks.{}.cross_attn.proj -> transformer_blocks.{}.attn2.to_out.0
        blocks.{}.mlp.inverted_conv.conv -> transformer_blocks.{}.ff.conv_inverted
        blocks.{}.mlp.depth_conv.conv -> transformer_blocks.{}.ff.conv_depth
        blocks.{}.mlp.point_conv.conv -> transformer_blocks.{}.ff.conv_point
        x_embedder.proj -> patch_embed.proj
        t_embedder.mlp.0 -> time_embed.emb.timestep_embedder.linear_1
        t_embedder.mlp.2 -> time_embed.emb.timestep_embedder.linear_2
        t_block.1 -> time_embed.linear
        y_embedder.y_proj.fc1 -> caption_projection.linear_1
        y_embedder.y_proj.fc2 -> caption_projection.linear_2
        attention_y_norm -> caption_norm
        final_layer.linear -> proj_out
    """),
)

FAMILIES = (
    PipelineFamily(
        "SD3",
        _SD3,
        ("joint_blocks.{}.x_block.attn.qkv", "joint_blocks.{}.x_block.attn.proj", "joint_blocks.{}.x_block.mlp.fc1"),
        ("transformer_blocks.{}.norm1_context.linear", "time_text_embed.text_embedder.linear_1"),
        ("SD3Transformer2DModel",),
        whole=True,
        said=r"sd[-_ ]?3|stable[-_ ]diffusion[-_ ]3",
    ),
    PipelineFamily(
        "AuraFlow",
        _AURA,
        ("double_layers.{}.attn.w2q", "single_layers.{}.attn.w1q"),
        ("joint_transformer_blocks.{}.attn.to_q",),
        ("AuraFlowTransformer2DModel",),
        whole=True,
        said=r"aura[-_ ]?flow",
    ),
    PipelineFamily(
        "Z-Image",
        _Z_IMAGE,
        ("layers.{}.attention.qkv", "layers.{}.attention.out"),
        ("layers.{}.attention.to_q", "layers.{}.attention.to_out.0", "all_x_embedder.2-1"),
        ("ZImageTransformer2DModel",),
        whole=True,
        said=r"z[-_ ]?image",
    ),
    PipelineFamily(
        "Lumina 2",
        _LUMINA,
        ("layers.{}.adaLN_modulation.1", "noise_refiner.{}.adaLN_modulation.1"),
        ("layers.{}.attn.to_q", "layers.{}.feed_forward.linear_1", "time_caption_embed.caption_embedder.1"),
        ("Lumina2Transformer2DModel",),
        whole=True,
        said=r"lumina",
    ),
    PipelineFamily(
        "Ideogram 4",
        _IDEOGRAM,
        ("layers.{}.attention.o",),
        ("layers.{}.adaln_modulation",),
        ("Ideogram4Transformer2DModel",),
        said=r"ideogram",
    ),
    PipelineFamily(
        "Qwen-Image",
        (
            SharedRows(
                "transformer_blocks.{}.img_mlp.gate_up",
                ("transformer_blocks.{}.img_mlp.gate_layer", "transformer_blocks.{}.img_mlp.proj"),
            ),
        ),
        ("transformer_blocks.{}.img_mlp.gate_up",),
        (
            "transformer_blocks.{}.img_mlp.gate_layer",
            "transformer_blocks.{}.img_mlp.net.2",
            "transformer_blocks.{}.img_mod.1",
            "transformer_blocks.{}.txt_mod.1",
        ),
        ("QwenImageTransformer2DModel",),
        whole=True,
        said=r"qwen[-_ ]?image",
    ),
    PipelineFamily(
        "HiDream",
        (),
        (),
        ("double_stream_blocks.{}.block.attn1.to_q", "single_stream_blocks.{}.block.attn1.to_q"),
        ("HiDreamImageTransformer2DModel",),
        whole=True,
        said=r"hidream",
    ),
    PipelineFamily(
        "Krea 2",
        _KREA,
        ("blocks.{}.attn.wq", "blocks.{}.mlp.up", "txtfusion.projector", "first"),
        ("transformer_blocks.{}.attn.to_gate", "transformer_blocks.{}.ff.up", "text_fusion.projector"),
        ("Krea2Transformer2DModel",),
        whole=True,
        said=r"krea[-_ ]?2",
    ),
    PipelineFamily(
        "Sana",
        _SANA,
        ("blocks.{}.cross_attn.kv_linear", "blocks.{}.mlp.inverted_conv.conv"),
        ("transformer_blocks.{}.ff.conv_inverted",),
        ("SanaTransformer2DModel",),
        whole=True,
        only_original=("pos_embed", "y_embedder.y_embedding"),
        said=r"\bsana",
    ),
)
