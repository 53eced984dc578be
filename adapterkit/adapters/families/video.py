"""Models of video and sound: HunyuanVideo, Wan, LTX-Video, LTX-2, Mochi, Cosmos and Anima, MiniMax-H3, ACE-Step.

Sources: the models' published code beside diffusers' modules; held against diffusers' conversions by the tests.
"""

from __future__ import annotations

from adapterkit.adapters.families.row import BARE, PipelineFamily, SharedRows, table

_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def _under(lead: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{lead}.{name}" for name in names)


_REFINER = "context_embedder.token_refiner.refiner_blocks.{}"
_HUNYUAN = (
    SharedRows("double_blocks.{}.img_attn_qkv", _under("transformer_blocks.{}.attn", _QKV)),
    SharedRows("double_blocks.{}.txt_attn_qkv", _under("transformer_blocks.{}.attn", _ADDED)),
    SharedRows(
        "single_blocks.{}.linear1",
        (*_under("single_transformer_blocks.{}.attn", _QKV), "single_transformer_blocks.{}.proj_mlp"),
        share="width",
        wide="single_blocks.{}.linear2",
    ),
    SharedRows("txt_in.individual_token_refiner.blocks.{}.self_attn_qkv", _under(f"{_REFINER}.attn", _QKV)),
    SharedRows("final_layer.adaLN_modulation.1", ("norm_out.linear",), swap="halves"),
    *table("""
        single_blocks.{}.linear2 -> single_transformer_blocks.{}.proj_out
        single_blocks.{}.modulation.linear -> single_transformer_blocks.{}.norm.linear
        single_blocks.{}.q_norm -> single_transformer_blocks.{}.attn.norm_q
        single_blocks.{}.k_norm -> single_transformer_blocks.{}.attn.norm_k
        double_blocks.{}.img_attn_proj -> transformer_blocks.{}.attn.to_out.0
        double_blocks.{}.txt_attn_proj -> transformer_blocks.{}.attn.to_add_out
        double_blocks.{}.img_attn_q_norm -> transformer_blocks.{}.attn.norm_q
        double_blocks.{}.img_attn_k_norm -> transformer_blocks.{}.attn.norm_k
        double_blocks.{}.txt_attn_q_norm -> transformer_blocks.{}.attn.norm_added_q
        double_blocks.{}.txt_attn_k_norm -> transformer_blocks.{}.attn.norm_added_k
        double_blocks.{}.img_mod.linear -> transformer_blocks.{}.norm1.linear
        double_blocks.{}.txt_mod.linear -> transformer_blocks.{}.norm1_context.linear
        double_blocks.{}.img_mlp.fc1 -> transformer_blocks.{}.ff.net.0.proj
        double_blocks.{}.img_mlp.fc2 -> transformer_blocks.{}.ff.net.2
        double_blocks.{}.txt_mlp.fc1 -> transformer_blocks.{}.ff_context.net.0.proj
        double_blocks.{}.txt_mlp.fc2 -> transformer_blocks.{}.ff_context.net.2
        img_in.proj -> x_embedder.proj
        time_in.mlp.0 -> time_text_embed.timestep_embedder.linear_1
        time_in.mlp.2 -> time_text_embed.timestep_embedder.linear_2
        guidance_in.mlp.0 -> time_text_embed.guidance_embedder.linear_1
        guidance_in.mlp.2 -> time_text_embed.guidance_embedder.linear_2
        vector_in.in_layer -> time_text_embed.text_embedder.linear_1
        vector_in.out_layer -> time_text_embed.text_embedder.linear_2
        final_layer.linear -> proj_out
        txt_in.input_embedder -> context_embedder.proj_in
        txt_in.t_embedder.mlp.0 -> context_embedder.time_text_embed.timestep_embedder.linear_1
        txt_in.t_embedder.mlp.2 -> context_embedder.time_text_embed.timestep_embedder.linear_2
        txt_in.c_embedder.linear_1 -> context_embedder.time_text_embed.text_embedder.linear_1
        txt_in.c_embedder.linear_2 -> context_embedder.time_text_embed.text_embedder.linear_2
    """),
    *(
        SharedRows(f"txt_in.individual_token_refiner.blocks.{{}}.{original}", (f"{_REFINER}.{part}",))
        for original, part in (
            ("self_attn_proj", "attn.to_out.0"),
            ("norm1", "norm1"),
            ("norm2", "norm2"),
            ("mlp.fc1", "ff.net.0.proj"),
            ("mlp.fc2", "ff.net.2"),
            ("adaLN_modulation.1", "norm_out.linear"),
        )
    ),
)


def _wan_block(lead: str) -> tuple[SharedRows, ...]:
    rows = []
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for original, part in (
            *(("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")),
            *(("norm_q", "norm_q"), ("norm_k", "norm_k")),
            *(("k_img", "add_k_proj"), ("v_img", "add_v_proj"), ("norm_k_img", "norm_added_k")),
        ):
            rows.append(SharedRows(f"{lead}.{ours}.{original}", (f"{lead}.{theirs}.{part}",)))
    rows += table(f"""
        {lead}.ffn.0 -> {lead}.ffn.net.0.proj
        {lead}.ffn.2 -> {lead}.ffn.net.2
        {lead}.norm3 -> {lead}.norm2
        {lead}.before_proj -> {lead}.proj_in
        {lead}.after_proj -> {lead}.proj_out
    """)
    return (*rows, SharedRows(f"{lead}.modulation", (f"{lead}.scale_shift_table",), leaves=BARE))


_WAN = (
    *_wan_block("blocks.{}"),
    *_wan_block("vace_blocks.{}"),
    *table("""
        patch_embedding -> patch_embedding
        time_embedding.0 -> condition_embedder.time_embedder.linear_1
        time_embedding.2 -> condition_embedder.time_embedder.linear_2
        text_embedding.0 -> condition_embedder.text_embedder.linear_1
        text_embedding.2 -> condition_embedder.text_embedder.linear_2
        time_projection.1 -> condition_embedder.time_proj
        img_emb.proj.0 -> condition_embedder.image_embedder.norm1
        img_emb.proj.1 -> condition_embedder.image_embedder.ff.net.0.proj
        img_emb.proj.3 -> condition_embedder.image_embedder.ff.net.2
        img_emb.proj.4 -> condition_embedder.image_embedder.norm2
        head.head -> proj_out
    """),
    SharedRows("head.modulation", ("scale_shift_table",), leaves=BARE),
)


def _ltx_norms(*attentions: str) -> tuple[SharedRows, ...]:
    return tuple(
        SharedRows(
            f"transformer_blocks.{{}}.{attention}.{name}_norm", (f"transformer_blocks.{{}}.{attention}.norm_{name}",)
        )
        for attention in attentions
        for name in "qk"
    )


_LTX = (
    *_ltx_norms("attn1", "attn2"),
    *table("""
        patchify_proj -> proj_in
        adaln_single.* -> time_embed.*
    """),
)
_LTX2 = (
    *_LTX,
    *_ltx_norms("audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"),
    *table("""
        audio_patchify_proj -> audio_proj_in
        audio_adaln_single.* -> audio_time_embed.*
        av_ca_video_scale_shift_adaln_single.* -> av_cross_attn_video_scale_shift.*
        av_ca_a2v_gate_adaln_single.* -> av_cross_attn_video_a2v_gate.*
        av_ca_audio_scale_shift_adaln_single.* -> av_cross_attn_audio_scale_shift.*
        av_ca_v2a_gate_adaln_single.* -> av_cross_attn_audio_v2a_gate.*
        prompt_adaln_single.* -> prompt_adaln.*
        audio_prompt_adaln_single.* -> audio_prompt_adaln.*
    """),
    SharedRows(
        "transformer_blocks.{}.scale_shift_table_a2v_ca_video",
        ("transformer_blocks.{}.video_a2v_cross_attn_scale_shift_table",),
        leaves=BARE,
    ),
    SharedRows(
        "transformer_blocks.{}.scale_shift_table_a2v_ca_audio",
        ("transformer_blocks.{}.audio_a2v_cross_attn_scale_shift_table",),
        leaves=BARE,
    ),
)

_MOCHI = (
    SharedRows("blocks.{}.attn.qkv_x", _under("transformer_blocks.{}.attn1", _QKV)),
    SharedRows("blocks.{}.attn.qkv_y", _under("transformer_blocks.{}.attn1", _ADDED)),
    SharedRows("blocks.{}.mlp_x.w1", ("transformer_blocks.{}.ff.net.0.proj",), swap="halves"),
    SharedRows("blocks.{}.mlp_y.w1", ("transformer_blocks.{}.ff_context.net.0.proj",), swap="halves"),
    SharedRows("final_layer.mod", ("norm_out.linear",), swap="halves"),
    *table("""
        blocks.{}.mod_x -> transformer_blocks.{}.norm1.linear
        blocks.{}.mod_y -> transformer_blocks.{}.norm1_context.linear
        blocks.{}.attn.q_norm_x -> transformer_blocks.{}.attn1.norm_q
        blocks.{}.attn.k_norm_x -> transformer_blocks.{}.attn1.norm_k
        blocks.{}.attn.q_norm_y -> transformer_blocks.{}.attn1.norm_added_q
        blocks.{}.attn.k_norm_y -> transformer_blocks.{}.attn1.norm_added_k
        blocks.{}.attn.proj_x -> transformer_blocks.{}.attn1.to_out.0
        blocks.{}.attn.proj_y -> transformer_blocks.{}.attn1.to_add_out
        blocks.{}.mlp_x.w2 -> transformer_blocks.{}.ff.net.2
        blocks.{}.mlp_y.w2 -> transformer_blocks.{}.ff_context.net.2
        x_embedder.proj -> patch_embed.proj
        t_embedder.mlp.0 -> time_embed.timestep_embedder.linear_1
        t_embedder.mlp.2 -> time_embed.timestep_embedder.linear_2
        t5_y_embedder.to_kv -> time_embed.pooler.to_kv
        t5_y_embedder.to_q -> time_embed.pooler.to_q
        t5_y_embedder.to_out -> time_embed.pooler.to_out
        t5_yproj -> time_embed.caption_proj
        final_layer.linear -> proj_out
    """),
    # The last of its 48 blocks has no more of the text's side than a scale.
    SharedRows("blocks.47.mod_y", ("transformer_blocks.47.norm1_context.linear_1",)),
    SharedRows("blocks.{}.mod_y", ("transformer_blocks.{}.norm1_context.linear_1",), alias=True),
)


def _anima_block(original: str, diffusers: str) -> tuple[SharedRows, ...]:
    rows: list[SharedRows] = []
    for number, (ours, theirs) in enumerate((("self_attn", "attn1"), ("cross_attn", "attn2")), start=1):
        rows += table(f"""
            {original}.{ours}.q_proj -> {diffusers}.{theirs}.to_q
            {original}.{ours}.k_proj -> {diffusers}.{theirs}.to_k
            {original}.{ours}.v_proj -> {diffusers}.{theirs}.to_v
            {original}.{ours}.output_proj -> {diffusers}.{theirs}.to_out.0
            {original}.{ours}.q_norm -> {diffusers}.{theirs}.norm_q
            {original}.{ours}.k_norm -> {diffusers}.{theirs}.norm_k
            {original}.adaln_modulation_{ours}.1 -> {diffusers}.norm{number}.linear_1
            {original}.adaln_modulation_{ours}.2 -> {diffusers}.norm{number}.linear_2
        """)
    rows += table(f"""
        {original}.adaln_modulation_mlp.1 -> {diffusers}.norm3.linear_1
        {original}.adaln_modulation_mlp.2 -> {diffusers}.norm3.linear_2
        {original}.mlp.layer1 -> {diffusers}.ff.net.0.proj
        {original}.mlp.layer2 -> {diffusers}.ff.net.2
    """)
    return tuple(rows)


_ANIMA = (
    *_anima_block("blocks.{}", "transformer_blocks.{}"),
    *table("""
        x_embedder.proj.1 -> patch_embed.proj
        t_embedder.1.* -> time_embed.t_embedder.*
        t_embedding_norm -> time_embed.norm
        final_layer.adaln_modulation.1 -> norm_out.linear_1
        final_layer.adaln_modulation.2 -> norm_out.linear_2
        final_layer.linear -> proj_out
        llm_adapter.* -> text_conditioner.*
    """),
)


def _minimax_block(original: str, diffusers: str) -> tuple[SharedRows, ...]:
    return (
        SharedRows(f"{original}.attn.qkv_proj", _under(f"{diffusers}.attn", _QKV)),
        SharedRows(f"{original}.mlp.fc1", (f"{diffusers}.ff.net.0.proj",), swap="halves"),
        *table(f"""
            {original}.attn.q_norm -> {diffusers}.attn.norm_q
            {original}.attn.k_norm -> {diffusers}.attn.norm_k
            {original}.attn.out_proj -> {diffusers}.attn.to_out.0
            {original}.mlp.fc2 -> {diffusers}.ff.net.2
            {original}.norm1 -> {diffusers}.norm1
            {original}.norm2 -> {diffusers}.norm2
            {original}.adaln_proj.linear -> {diffusers}.adaln_proj.linear
        """),
    )


_MINIMAX = (
    *_minimax_block("blocks.{}", "transformer_blocks.{}"),
    *_minimax_block("token_refiner.blocks.{}", "token_refiner.refiner_blocks.{}"),
    *table("""
        time_embedder.proj_in -> time_embedder.linear_1
        time_embedder.proj_out -> time_embedder.linear_2
        video_patch_proj -> proj_in
        audio_patch_proj -> audio_proj_in
        condition_proj -> context_embedder
        final_layer.norm -> norm_out.norm
        final_layer.adaln_proj.linear -> norm_out.linear
        final_layer.video_out -> proj_out
        final_layer.audio_out -> audio_proj_out
    """),
)

_ACE_STEP = tuple(
    SharedRows(f"layers.{{}}.{side}.{original}_proj", (f"layers.{{}}.{side}.{part}",))
    for side in ("self_attn", "cross_attn")
    for original, part in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
)

FAMILIES = (
    PipelineFamily(
        "HunyuanVideo",
        _HUNYUAN,
        ("double_blocks.{}.img_attn_qkv", "single_blocks.{}.modulation.linear", "double_blocks.{}.img_mlp.fc1"),
        ("context_embedder.token_refiner.refiner_blocks.{}.attn.to_q",),
        ("HunyuanVideoTransformer3DModel",),
        whole=True,
        said=r"hunyuan[-_ ]?video|frame[-_ ]?pack",
    ),
    PipelineFamily(
        "Wan",
        _WAN,
        ("blocks.{}.self_attn.q", "blocks.{}.cross_attn.q", "blocks.{}.ffn.0", "blocks.{}.self_attn.o", "head.head"),
        ("blocks.{}.attn1.to_q", "blocks.{}.attn2.to_q", "blocks.{}.ffn.net.0.proj", "blocks.{}.attn1.to_out.0"),
        ("WanTransformer3DModel", "WanVACETransformer3DModel"),
        whole=True,
        said=r"\bwan[-_. ]?\d",
    ),
    PipelineFamily(
        "LTX-2",
        _LTX2,
        ("audio_patchify_proj", "av_ca_a2v_gate_adaln_single.linear"),
        ("audio_proj_in", "transformer_blocks.{}.audio_attn1.to_q"),
        ("LTX2VideoTransformer3DModel",),
        whole=True,
        said=r"ltx[-_ ]?(v|video)?[-_. ]?2",
    ),
    PipelineFamily(
        "LTX-Video",
        _LTX,
        ("patchify_proj", "adaln_single.linear"),
        ("time_embed.linear", "time_embed.emb.timestep_embedder.linear_1"),
        ("LTXVideoTransformer3DModel",),
        whole=True,
        said=r"ltx[-_ ]?(v|video)(?![-_. ]?2)",
    ),
    PipelineFamily(
        "Mochi",
        _MOCHI,
        ("blocks.{}.attn.qkv_x", "t5_yproj"),
        ("time_embed.pooler.to_q", "time_embed.caption_proj"),
        ("MochiTransformer3DModel",),
        whole=True,
        said=r"mochi",
    ),
    PipelineFamily(
        "Cosmos-2 and Anima",
        _ANIMA,
        ("blocks.{}.self_attn.q_proj", "blocks.{}.self_attn.output_proj", "blocks.{}.mlp.layer1", "x_embedder.proj.1"),
        ("patch_embed.proj", "transformer_blocks.{}.norm1.linear_1", "time_embed.t_embedder.linear_1"),
        ("CosmosTransformer3DModel",),
        whole=True,
        said=r"anima|cosmos",
    ),
    PipelineFamily(
        "MiniMax-H3",
        _MINIMAX,
        ("blocks.{}.attn.qkv_proj", "video_patch_proj", "blocks.{}.mlp.fc1", "token_refiner.blocks.{}.attn.qkv_proj"),
        ("token_refiner.refiner_blocks.{}.attn.to_q", "transformer_blocks.{}.adaln_proj.linear"),
        ("MiniMaxH3Transformer3DModel",),
        whole=True,
        said=r"minimax[-_ ]?h3",
    ),
    PipelineFamily(
        "ACE-Step",
        _ACE_STEP,
        (),
        ("layers.{}.self_attn.to_q", "layers.{}.cross_attn.to_q"),
        ("AceStepTransformer1DModel",),
        said=r"ace[-_ ]?step",
    ),
)
