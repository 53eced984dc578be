"""Rows: state-space models, and decoders that mix them, convolutions or linear attention with attention."""

from __future__ import annotations

from typing import Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.ops import Column, Grouped, GroupSplit, NegExp, Scale, ScaleRows, Split, Squeeze, Tile
from adapterkit.gguf.arch.shared import (
    EMBEDDINGS,
    EXPERT_WIDTH,
    MLP,
    NORMS,
    QK_NORMS,
    ROPE_DIM,
    VOCAB_SIZE,
    attention,
    constant,
    experts,
    shared_expert,
)
from adapterkit.gguf.arch.spec import ArchSpec, Key, Rule, block, blocks, plus_one, rule

_LAYERS = Key("block_count", lambda c: c.number("layers"))
LONG = 2**20  # positions of a model that counts none


# ------------------------------------------------------------------ Mamba


def mamba(where: str, first: bool, groups: str = "ssm_groups") -> tuple[Rule, ...]:
    """The mixer of Mamba (``first``), or of Mamba 2, whose decays are one number per head."""
    one: list[Any] = [] if first else [Column()]
    rules = [
        block(f"{where}in_proj", "ssm_in"),
        block(f"{where}conv1d.weight", "ssm_conv1d.weight", ops=[Squeeze()]),
        block(f"{where}conv1d.bias", "ssm_conv1d.bias"),
        block(f"{where}A_log", "ssm_a", ops=[*one, NegExp()]),
        block(f"{where}D", "ssm_d", ops=one),
        block(f"{where}out_proj", "ssm_out"),
    ]
    if first:
        rules += blocks(ssm_x=f"{where}x_proj", ssm_dt=f"{where}dt_proj")
    else:
        rules += [
            block(f"{where}dt_bias", "ssm_dt.bias"),
            block(f"{where}norm.weight", "ssm_norm.weight", ops=[Grouped(groups)]),
        ]
    return tuple(rules)


def _moved(rules: tuple[Rule, ...], start: str) -> tuple[Rule, ...]:
    """The same rules for layers that are called otherwise."""
    return tuple(Rule(one.hf.replace("model.layers.", start), one.gguf, one.ops, one.writes) for one in rules)


def _mamba_inner(config: Config) -> int:
    found = int(config.get("intermediate_size", "d_inner", default=2 * config.number("hidden")))
    if found != 2 * config.number("hidden"):
        raise CheckpointError(f"{config.ref}: llama.cpp's mamba is twice as wide inside as outside", "run it elsewhere")
    return found


def _dt_rank(name: str) -> Any:
    def find(config: Config) -> int:
        found = config.get(name, "dt_rank")
        return int(found) if isinstance(found, int) else -(config.number("hidden") // -16)

    return find


_MAMBA2_INNER = Key("ssm.inner_size", lambda c: int(c.get("expand", default=2)) * c.number("hidden"))


def _mamba2_heads(config: Config) -> int:
    return int(config.get("expand", default=2)) * config.number("hidden") // int(config.get("head_dim", default=64))


_MAMBA_COMMON = (
    constant("context_length", LONG),
    Key("embedding_length", "hidden", field="hidden_size"),
    constant("feed_forward_length", 0),
    constant("attention.head_count", 0),
    _LAYERS,
)


# ------------------------------------------------------------------ with attention


def _attention_layers(config: Config) -> list[bool]:
    """Which layers of a hybrid attend."""
    kinds, layers = config.get("layer_types", "layers_block_type"), config.number("layers")
    if isinstance(kinds, list):
        return [kind in ("attention", "full_attention") for kind in kinds]
    chosen = config.get("attn_layer_indices")
    if isinstance(chosen, list):
        return [i in chosen for i in range(layers)]
    period, offset = config.number("attn_layer_period"), config.number("attn_layer_offset")
    return [i >= offset and (i - offset) % max(period, 1) == 0 for i in range(layers)]


def _kv_by_layer(config: Config) -> list[int]:
    heads = config.number("kv_heads")
    return [heads if attends else 0 for attends in _attention_layers(config)]


def _granite_variant(config: Config) -> str | None:
    some = config.get("num_local_experts")
    if all(_attention_layers(config)):
        return "granitemoe" if some else "granite"
    return None if some else "granitehybrid_dense"


_GRANITE_HYBRID = (
    *EMBEDDINGS,
    *NORMS,
    *attention(interleave=True),
    *mamba("mamba.", first=False),
)
_GRANITE_KEYS = (
    VOCAB_SIZE,
    ROPE_DIM,
    Key("attention.scale", "attention_multiplier"),
    Key("embedding_scale", "embedding_multiplier"),
    Key("residual_scale", "residual_multiplier"),
    Key("logit_scale", "logits_scaling"),
    Key("expert_shared_feed_forward_length", lambda c: c.get("shared_intermediate_size") or None),
    Key("ssm.conv_kernel", "mamba_d_conv", needed=True),
    Key("ssm.state_size", "mamba_d_state", needed=True),
    Key("ssm.group_count", lambda c: c.number("ssm_groups")),
    Key("ssm.inner_size", lambda c: c.number("ssm_inner")),
    Key("ssm.time_step_rank", "mamba_n_heads", needed=True),
    Key("attention.head_count_kv", _kv_by_layer),
    Key("rope.scaling.finetuned", lambda c: c.get("position_embedding_type") == "rope"),
    Key("context_length", lambda c: LONG if c.get("position_embedding_type") != "rope" else c.number("context")),
)


def _falcon_h1(config: Config) -> None:
    if config.get("mamba_rms_norm") and config.get("mamba_norm_before_gate", default=True):
        raise CheckpointError(
            f"{config.ref}: llama.cpp normalises a falcon-h1's mixer after its gate, and this one does before",
            "run it with transformers",
        )
    if config.get("tie_word_embeddings", default=False):
        raise CheckpointError(
            f"{config.ref}: its output layer is its embedding times another number, which GGUF cannot say",
            "run it with transformers",
        )


def _lfm2_width(config: Config) -> int:
    width = int(config.need("block_ff_dim", "intermediate_size"))
    if not config.get("block_auto_adjust_ff_dim", default=False):
        return width
    width = int(2 * width / 3)
    if config.get("block_ffn_dim_multiplier") is not None:
        width = int(config.real("block_ffn_dim_multiplier") * width)
    step = config.number("block_multiple_of")
    return step * -(-width // step)


def lfm2_kv(config: Config) -> list[int]:
    heads = config.number("kv_heads")
    return [heads if kind == "full_attention" else 0 for kind in config.need("layer_types")]


LFM2 = (
    rule("model.embed_tokens", "token_embd"),
    rule("model.embedding_norm", "token_embd_norm"),
    rule("lm_head", "output"),
    *blocks(
        attn_norm="operator_norm",
        ffn_norm="ffn_norm",
        attn_q="self_attn.q_proj",
        attn_k="self_attn.k_proj",
        attn_v="self_attn.v_proj",
        attn_output="self_attn.out_proj",
        attn_q_norm="self_attn.q_layernorm",
        attn_k_norm="self_attn.k_layernorm",
        ffn_gate="feed_forward.w1",
        ffn_up="feed_forward.w3",
        ffn_down="feed_forward.w2",
    ),
    block("conv.conv.weight", "shortconv.conv.weight", ops=[Squeeze()]),
    block("conv.conv.bias", "shortconv.conv.bias"),
    block("conv.in_proj", "shortconv.in_proj"),
    block("conv.out_proj", "shortconv.out_proj"),
)


# ------------------------------------------------------------------ linear attention


def _linear(tiled: bool) -> tuple[Rule, ...]:
    """Gated delta nets: ``tiled`` where each key head's value heads are spread out, as ggml broadcasts them."""
    k, v, d = "linear_num_key_heads", "linear_num_value_heads", "linear_value_head_dim"
    per_head: list[Any] = [Tile(k, v, 1)] if tiled else []
    per_row: list[Any] = [Tile(k, v, d)] if tiled else []
    after_qk: list[Any] = [Tile(k, v, d, "linear_kq_rows")] if tiled else []
    over: list[Any] = [Tile(k, v, d, columns=True)] if tiled else []
    return (
        block("linear_attn.A_log", "ssm_a", ops=[*per_head, NegExp()]),
        block("linear_attn.dt_bias", "ssm_dt.bias", ops=per_head),
        block("linear_attn.conv1d.weight", "ssm_conv1d.weight", ops=[Squeeze(), *after_qk]),
        block("linear_attn.norm.weight", "ssm_norm.weight"),
        block("linear_attn.out_proj", "ssm_out", ops=over),
        block("linear_attn.in_proj_qkv", "attn_qkv", ops=after_qk),
        block("linear_attn.in_proj_z", "attn_gate", ops=per_row),
        block("linear_attn.in_proj_b", "ssm_beta", ops=per_head),
        block("linear_attn.in_proj_a", "ssm_alpha", ops=per_head),
    )


_KEY_DIM, _GROUP_V = "linear_key_head_dim", "linear_group_v"
_NEXT_LINEAR = (
    *(one for one in _linear(tiled=False) if "in_proj" not in one.hf),
    block(
        "linear_attn.in_proj_qkvz.weight",
        "attn_qkv.weight",
        "attn_gate.weight",
        ops=[GroupSplit("linear_num_key_heads", (_KEY_DIM, _KEY_DIM, _GROUP_V, _GROUP_V), ((0, 1, 2), (3,)))],
    ),
    block("linear_attn.in_proj_ba", "ssm_ba"),
)
_NEXT = plus_one(
    (
        *EMBEDDINGS,
        *blocks(attn_norm="input_layernorm", post_attention_norm="post_attention_layernorm"),
        *attention(),
        *QK_NORMS,
        *MLP,
    )
)
_NEXT_EXPERTS = (*experts(), *shared_expert("mlp.shared_expert", plain=False))


def _recurrent(config: Config) -> list[bool] | None:
    kinds = config.get("layer_types")
    return [kind == "linear_attention" for kind in kinds] if isinstance(kinds, list) else None


def _next_rope(config: Config) -> int:
    return int(config.number("head_dim") * float(config.rope.get("partial_rotary_factor", 0.25)))


_NEXT_KEYS = (
    Key("ssm.conv_kernel", "linear_conv_kernel_dim", needed=True),
    Key("ssm.state_size", "linear_key_head_dim", needed=True),
    Key("ssm.group_count", "linear_num_key_heads", needed=True),
    Key("ssm.time_step_rank", "linear_num_value_heads", needed=True),
    Key("ssm.inner_size", lambda c: c.number("linear_all")),
    Key("attention.recurrent_layers", _recurrent),
    Key("full_attention_interval", "full_attention_interval", 4),
    Key("rope.dimension_count", _next_rope),
)
_NEXT_MOE_KEYS = (
    EXPERT_WIDTH,
    Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size"),
)


def _sections(config: Config) -> list[int]:
    """Rotary dimensions of time, height and width; those of Qwen3.5 where a config does not say."""
    found = config.rope_by_kind.get("mrope_section")
    return ([*found, 0, 0, 0, 0] if isinstance(found, list) else [11, 11, 10, 0])[:4]


_MTP = (r"^(model\.)?mtp\.", r"^model\.language_model\.mtp\.")

SPECS = (
    ArchSpec(
        "mamba",
        ("MambaForCausalLM", "MambaLMHeadModel", "FalconMambaForCausalLM"),
        "mamba",
        (
            rule("embeddings", "token_embd"),
            rule("norm_f", "output_norm"),
            rule("lm_head", "output"),
            *_moved((block("norm", "attn_norm"), *mamba("mixer.", first=True)), "layers."),
        ),
        (
            *_MAMBA_COMMON,
            Key("ssm.conv_kernel", ("conv_kernel", "d_conv"), 4),
            Key("ssm.inner_size", _mamba_inner, field="intermediate_size"),
            Key("ssm.state_size", ("state_size", "d_state"), 16),
            Key("ssm.time_step_rank", _dt_rank("time_step_rank"), field="time_step_rank"),
            Key("attention.layer_norm_rms_epsilon", ("layer_norm_epsilon", "rms_norm_eps"), 1e-5),
            Key("ssm.dt_b_c_rms", lambda c: c.model_type == "falcon_mamba"),
        ),
        common=False,
        prefixes=("backbone.", "model.backbone."),
        root="backbone.",
        types=("falcon_mamba",),
    ),
    ArchSpec(
        "mamba2",
        ("Mamba2ForCausalLM",),
        "mamba2",
        (
            rule("embeddings", "token_embd"),
            rule("norm_f", "output_norm"),
            rule("lm_head", "output"),
            *_moved((block("norm", "attn_norm"), *mamba("mixer.", first=False)), "layers."),
        ),
        (
            *_MAMBA_COMMON,
            Key("ssm.conv_kernel", ("conv_kernel", "d_conv"), 4),
            _MAMBA2_INNER,
            Key("ssm.state_size", ("state_size", "d_state"), 128),
            Key("ssm.time_step_rank", _mamba2_heads),
            Key("ssm.group_count", "n_groups", 1),
            Key("attention.layer_norm_rms_epsilon", ("layer_norm_epsilon", "rms_norm_eps"), 1e-5),
        ),
        common=False,
        prefixes=("backbone.", "model.backbone."),
        root="backbone.",
    ),
    ArchSpec(
        "jamba",
        ("JambaForCausalLM",),
        "jamba",
        (
            rule("model.embed_tokens", "token_embd"),
            rule("model.final_layernorm", "output_norm"),
            rule("lm_head", "output"),
            *blocks(attn_norm="input_layernorm", ffn_norm="pre_ff_layernorm"),
            *attention(),
            *mamba("mamba.", first=True),
            *blocks(ssm_dt_norm="mamba.dt_layernorm", ssm_b_norm="mamba.b_layernorm", ssm_c_norm="mamba.c_layernorm"),
            *blocks(
                ffn_gate="feed_forward.gate_proj", ffn_up="feed_forward.up_proj", ffn_down="feed_forward.down_proj"
            ),
            *experts("feed_forward.", router="router"),
        ),
        (
            _LAYERS,
            Key("context_length", "context", field="max_position_embeddings"),
            Key("embedding_length", "hidden_size", needed=True),
            Key("feed_forward_length", "intermediate_size", needed=True),
            Key("attention.head_count", "num_attention_heads", needed=True),
            Key("attention.head_count_kv", _kv_by_layer),
            Key("ssm.conv_kernel", "mamba_d_conv", 4),
            Key("ssm.inner_size", lambda c: c.number("mamba_expand") * c.number("hidden")),
            Key("ssm.state_size", "mamba_d_state", 16),
            Key("ssm.time_step_rank", _dt_rank("mamba_dt_rank")),
            Key("attention.layer_norm_rms_epsilon", ("layer_norm_epsilon", "rms_norm_eps"), 1e-6),
            Key("expert_count", ("num_local_experts", "num_experts"), needed=True),
            Key("expert_used_count", ("num_experts_per_tok", "num_experts_per_token"), needed=True),
        ),
        common=False,
    ),
    ArchSpec(
        "falcon-h1",
        ("FalconH1ForCausalLM",),
        "falcon_h1",
        (
            rule("model.embed_tokens.weight", "token_embd.weight", ops=[Scale(("embedding_multiplier",))]),
            rule("model.final_layernorm", "output_norm"),
            rule("lm_head.weight", "output.weight", ops=[Scale(("lm_head_multiplier",))]),
            block("self_attn.q_proj.weight", "attn_q.weight", ops=[Scale(("attention_in_multiplier",))]),
            block(
                "self_attn.k_proj.weight",
                "attn_k.weight",
                ops=[Scale(("key_multiplier",)), Scale(("attention_in_multiplier",))],
            ),
            block("self_attn.v_proj.weight", "attn_v.weight", ops=[Scale(("attention_in_multiplier",))]),
            block("self_attn.o_proj.weight", "attn_output.weight", ops=[Scale(("attention_out_multiplier",))]),
            block("feed_forward.gate_proj.weight", "ffn_gate.weight", ops=[Scale(("mlp_multipliers.0",))]),
            block("feed_forward.up_proj.weight", "ffn_up.weight"),
            block("feed_forward.down_proj.weight", "ffn_down.weight", ops=[Scale(("mlp_multipliers.1",))]),
            block("input_layernorm", "attn_norm"),
            # llama.cpp reads this norm under a name without its suffix.
            block("pre_ff_layernorm.weight", "ffn_norm"),
            block(
                "mamba.in_proj.weight",
                "ssm_in.weight",
                ops=[
                    Scale(("ssm_in_multiplier",)),
                    ScaleRows(
                        ("ssm_inner", "ssm_inner", "ssm_bc", "ssm_bc", "ssm_heads"),
                        tuple(f"ssm_multipliers.{i}" for i in range(5)),
                    ),
                ],
            ),
            block("mamba.out_proj.weight", "ssm_out.weight", ops=[Scale(("ssm_out_multiplier",))]),
            *(one for one in mamba("mamba.", first=False) if "in_proj" not in one.hf and "out_proj" not in one.hf),
        ),
        (
            Key("context_length", "max_position_embeddings", 0),
            Key("embedding_length", "hidden_size", needed=True),
            Key("feed_forward_length", "intermediate_size", needed=True),
            Key("attention.head_count", "num_attention_heads", needed=True),
            Key("attention.head_count_kv", "num_key_value_heads", needed=True),
            _LAYERS,
            Key("ssm.conv_kernel", "mamba_d_conv", 4),
            Key("ssm.inner_size", lambda c: c.number("ssm_inner")),
            Key("ssm.state_size", "mamba_d_state", needed=True),
            Key("ssm.time_step_rank", lambda c: c.number("ssm_inner") // c.number("mamba_d_head")),
            Key("ssm.group_count", lambda c: c.number("ssm_groups")),
            Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", 1e-5),
            VOCAB_SIZE,
            Key("attention.key_length", lambda c: c.number("head_dim")),
            Key("attention.value_length", lambda c: c.number("head_dim")),
            Key("rope.freq_base", lambda c: c.rope.get("rope_theta")),
        ),
        common=False,
        check=_falcon_h1,
        scaled=True,
    ),
    ArchSpec(
        "granitehybrid",
        ("GraniteMoeHybridForCausalLM",),
        "granitemoehybrid",
        (
            *_GRANITE_HYBRID,
            block("block_sparse_moe.router.layer", "ffn_gate_inp"),
            block("block_sparse_moe.input_linear", "ffn_gate_exps", "ffn_up_exps", ops=[Split()]),
            block("block_sparse_moe.output_linear", "ffn_down_exps"),
            block("shared_mlp.input_linear", "ffn_gate_shexp", "ffn_up_shexp", ops=[Split()]),
            block("shared_mlp.output_linear", "ffn_down_shexp"),
        ),
        _GRANITE_KEYS,
        leave=("attention.key_length", "attention.value_length"),
        variant=_granite_variant,
        experts=True,
    ),
    ArchSpec(
        "granitehybrid",
        (),
        "granitehybrid_dense",
        (
            *_GRANITE_HYBRID,
            block("shared_mlp.input_linear", "ffn_gate", "ffn_up", ops=[Split()]),
            block("shared_mlp.output_linear", "ffn_down"),
        ),
        (
            *_GRANITE_KEYS,
            Key("feed_forward_length", ("shared_intermediate_size", "intermediate_size"), field="intermediate_size"),
        ),
        leave=("attention.key_length", "attention.value_length"),
        experts=False,
        defaults={"model_type": "granitemoehybrid", "architectures": ["GraniteMoeHybridForCausalLM"]},
    ),
    ArchSpec(
        "lfm2",
        ("Lfm2ForCausalLM", "LFM2ForCausalLM", "Lfm2VlForConditionalGeneration", "Lfm2Model"),
        "lfm2",
        LFM2,
        (
            Key("attention.head_count_kv", lfm2_kv),
            VOCAB_SIZE,
            Key("shortconv.l_cache", "conv_L_cache", needed=True),
            Key("attention.layer_norm_rms_epsilon", "norm_eps", needed=True),
            Key("feed_forward_length", _lfm2_width),
        ),
        needs=("token_embd.weight", "token_embd_norm.weight"),
    ),
    ArchSpec(
        "qwen3next",
        ("Qwen3NextForCausalLM",),
        "qwen3_next",
        (*_NEXT, *_NEXT_LINEAR, *_NEXT_EXPERTS),
        (*_NEXT_MOE_KEYS, *_NEXT_KEYS),
        drops=_MTP,
    ),
    ArchSpec(
        "qwen35",
        ("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
        "qwen3_5_text",
        (*_NEXT, *_linear(tiled=True)),
        (*_NEXT_KEYS, Key("rope.dimension_sections", _sections)),
        drops=_MTP,
        types=("qwen3_5",),
    ),
    ArchSpec(
        "qwen35moe",
        ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        "qwen3_5_moe_text",
        (*_NEXT, *_linear(tiled=True), *_NEXT_EXPERTS),
        (*_NEXT_MOE_KEYS, *_NEXT_KEYS, Key("rope.dimension_sections", _sections)),
        drops=_MTP,
        types=("qwen3_5_moe",),
    ),
)
