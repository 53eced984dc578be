"""Rows: decoders with code in their own repository, with experts or with mixers beside attention.

Arctic, Grok, GroveMoE, SmallThinker, Maple, LLaDA-MoE, Sarvam, MiniMax-Text-01 and M1, and PLaMo 2. Names and keys are those of
llama.cpp's converter; what its runtime has built in is stated as `Fixed`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.arch import remote
from adapterkit.gguf.arch.builtin import Fixed
from adapterkit.gguf.arch.coded import LAYERS, SILU
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.hyper import GATING
from adapterkit.gguf.arch.ops import Add, NegExp, Squeeze, Stack
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
    window_pattern,
)
from adapterkit.gguf.arch.spec import ArchSpec, Key, Rule, block, blocks, plus_one, rule, tree
from adapterkit.gguf.arch.windows import kinds

if TYPE_CHECKING:
    from collections.abc import Mapping

_NORMED = Fixed("norm_topk_prob", True, "divides the weights of the chosen experts by their sum", default=True)


def w123(where: str = "block_sparse_moe.") -> tuple[Rule, ...]:
    """Experts of ``w1`` (gate), ``w2`` (down) and ``w3`` (up)."""
    return experts(where, gate="w1", up="w3", down="w2")


# ------------------------------------------------------------------ SmallThinker


def _slides(config: Config) -> list[int]:
    found = config.get("sliding_window_layout", default=[0] * config.number("layers"))
    return [int(bool(one)) for one in found]


def _windowed(config: Config) -> bool:
    return any(_slides(config)) and bool(config.get("sliding_window_size"))


def _smallthinker_layers(config: Config) -> list[int]:
    if not _windowed(config):
        return [0] * config.number("layers")
    return [int(index % 4 != 0) for index in range(config.number("layers"))]


def _smallthinker_rope(config: Config) -> list[int]:
    if not _windowed(config):
        return [1] * config.number("layers")
    return _smallthinker_layers(config)


def _smallthinker_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    layers = values["block_count"]
    slides = (
        [int(index % 4 != 0) for index in range(layers)] if values.get("attention.sliding_window") else [0] * layers
    )
    return {
        "moe_num_primary_experts": values["expert_count"],
        "moe_num_active_primary_experts": values["expert_used_count"],
        "moe_ffn_hidden_size": values["expert_feed_forward_length"],
        "moe_primary_router_apply_softmax": values["expert_gating_func"] == GATING["softmax"],
        "sliding_window_layout": slides,
        "sliding_window_size": values.get("attention.sliding_window"),
        "rope_layout": slides if any(slides) else [1] * layers,
        "norm_topk_prob": True,
        "scoring_func": None,
        **dict.fromkeys(("num_experts", "num_experts_per_tok", "intermediate_size")),
    }


# ------------------------------------------------------------------ MiniMax


def _full(config: Config) -> list[bool]:
    """Which layers attend; the others have linear attention."""
    found = config.get("attn_type_list")
    if isinstance(found, list):
        return [bool(one) for one in found]
    named = config.get("layer_types")
    if isinstance(named, list):
        return [one == "full_attention" for one in named]
    raise CheckpointError(f"{config.ref}: its config.json does not say 'attn_type_list'", "complete it from the base")


def _recurrent(config: Config) -> list[bool] | None:
    """Layers without attention, where these are not all but every eighth, which llama.cpp has by itself."""
    found = _full(config)
    return None if found == [(i + 1) % 8 == 0 for i in range(len(found))] else [not one for one in found]


_ALPHAS = ("layernorm_full_attention_alpha", "full_attn_alpha_factor")
_SAME_ALPHAS = tuple(
    Fixed(name, lambda c: float(c.get(*_ALPHAS, default=1)), "weighs all residuals alike in this architecture")
    for name in (
        *("layernorm_linear_attention_alpha", "layernorm_mlp_alpha"),
        *("linear_attn_alpha_factor", "mlp_alpha_factor"),
    )
)
_NO_BETAS = tuple(
    Fixed(name, 1.0, "weighs what a layer adds by 1")
    for name in (
        *("layernorm_full_attention_beta", "layernorm_linear_attention_beta", "layernorm_mlp_beta"),
        *("full_attn_beta_factor", "linear_attn_beta_factor", "mlp_beta_factor"),
    )
)


def _minimax_rope(config: Config) -> int:
    size, share = config.number("head_dim"), config.rope.get("partial_rotary_factor")
    return int(config.get("rotary_dim", default=size) if share is None else size * float(share))


def _minimax_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    layers, alpha = values["block_count"], values["residual_scale"]
    slow = values.get("attention.recurrent_layers", [(i + 1) % 8 != 0 for i in range(layers)])
    return {
        "layer_types": ["linear_attention" if one else "full_attention" for one in slow],
        "num_local_experts": values["expert_count"],
        **dict.fromkeys(("full_attn_alpha_factor", "linear_attn_alpha_factor", "mlp_alpha_factor"), alpha),
        **dict.fromkeys(("full_attn_beta_factor", "linear_attn_beta_factor", "mlp_beta_factor"), 1.0),
        "num_experts": None,
    }


# ------------------------------------------------------------------ MiniMax M3


def _sparse(flat: str, nested: str) -> Any:
    """A number of the indexer, in either spelling of its config."""

    def find(config: Config) -> int:
        found = config.get(flat, default=config.get("sparse_attention_config", default={}).get(nested))
        return int(config.need(flat) if found is None else found)

    return find


def _m3_dense(config: Config) -> int:
    """Layers before the first with experts."""
    found = config.get("moe_layer_freq")
    sparse = [bool(one) for one in found] if isinstance(found, list) else []
    named = config.get("mlp_layer_types")
    sparse = [one == "sparse" for one in named] if isinstance(named, list) else sparse
    return sparse.index(True) if True in sparse else len(sparse)


def _m3_indexed(config: Config) -> list[str]:
    """llama.cpp chooses blocks in every layer with experts, and in no other."""
    lead = _m3_dense(config)
    return ["full_attention"] * lead + ["minimax_m3_sparse"] * (config.number("layers") - lead)


def _m3_shared(config: Config) -> int:
    found = config.get("n_shared_experts")
    return int(
        found if found is not None else config.number("shared_intermediate_size") // config.number("intermediate_size")
    )


def _m3_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    lead, layers, width = (
        values["leading_dense_block_count"],
        values["block_count"],
        values["expert_feed_forward_length"],
    )
    rotated = values["rope.dimension_count"]
    text = {
        **{name: value for name, value in config.items() if name not in ("architectures", "model_type")},
        "model_type": "minimax_m3_vl_text",
        "intermediate_size": width,
        "dense_intermediate_size": values["feed_forward_length"],
        "shared_intermediate_size": width * values["expert_shared_count"],
        "num_local_experts": values["expert_count"],
        "rotary_dim": rotated,
        "mlp_layer_types": ["dense"] * lead + ["sparse"] * (layers - lead),
        "layer_types": ["full_attention"] * lead + ["minimax_m3_sparse"] * (layers - lead),
        "hidden_act": "silu",
        **dict.fromkeys(("num_experts", "scoring_func")),
    }
    text = {name: value for name, value in text.items() if value is not None}
    return {**dict.fromkeys(config), **text, "architectures": ["MiniMaxM3SparseForCausalLM"]}


# ------------------------------------------------------------------ PLaMo 2


def _attends(config: Config) -> list[bool]:
    """Layers that attend; the others have a mixer (``is_mamba`` of its code)."""
    layers, step = config.number("layers"), int(config.get("mamba_step", default=2))
    if not config.get("mamba_enabled", default=True):
        return [True] * layers
    if layers <= step // 2:
        return [index == layers - 1 for index in range(layers)]
    return [index % step == step // 2 for index in range(layers)]


def _plamo2_kv(config: Config) -> list[int]:
    number = int(config.get("num_key_value_heads", default=4))
    return [number if one else 0 for one in _attends(config)]


def _plamo2_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    kv = values["attention.head_count_kv"]
    full = [index for index, one in enumerate(kv) if one]
    step = 2 * full[0] if len(full) > 1 or full != [len(kv) - 1] else 2 * len(kv)
    return {
        "num_key_value_heads": max(kv),
        "hidden_size_per_head": values["attention.key_length"],
        "mamba_step": max(step, 1),
        "mamba_enabled": True,
        "mamba_num_heads": values["ssm.time_step_rank"],
        "rope_theta": values.get("rope.freq_base"),
        "head_dim": None,
        "rope_parameters": None,
    }


_MIXER = "model.layers.layers.{i}."
_PLAMO2 = (
    rule("model.embed_tokens", "token_embd"),
    rule("model.norm.weight", "output_norm.weight", ops=[Add(1.0)]),
    rule("lm_head", "output"),
    *tree(
        _MIXER,
        {
            "attn_norm.weight": "pre_mixer_norm.weight",
            "post_attention_norm": "post_mixer_norm.weight",
            "ffn_norm.weight": "pre_mlp_norm.weight",
            "post_ffw_norm": "post_mlp_norm.weight",
            "attn_q_norm.weight": "mixer.q_weight",
            "attn_k_norm.weight": "mixer.k_weight",
            "attn_qkv": "mixer.qkv_proj",
            "attn_output": "mixer.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
            "ssm_in": "mixer.in_proj",
            "ssm_conv1d": "mixer.conv1d",
            "ssm_x": "mixer.bcdt_proj",
            "ssm_dt": "mixer.dt_proj",
            "ssm_dt.bias": "mixer.dt_bias",
            "ssm_dt_norm": "mixer.dt_norm_weight",
            "ssm_b_norm": "mixer.B_norm_weight",
            "ssm_c_norm": "mixer.C_norm_weight",
            "ssm_a": "mixer.A_log",
            "ssm_d": "mixer.D",
            "ssm_out": "mixer.out_proj",
        },
        {
            "attn_norm.weight": [Add(1.0)],
            "post_attention_norm": [Add(1.0 / 5)],
            "ffn_norm.weight": [Add(1.0)],
            "post_ffw_norm": [Add(1.0 / 5**1.5)],
            "ssm_conv1d": [Squeeze()],
            "ssm_a": [NegExp()],
        },
    ),
)


# ------------------------------------------------------------------ Grok

_GROK_OLD = "transformer.decoder_layer.{i}."


def _grok_check(config: Config) -> None:
    if config.get("rope_type") in ("yarn", "original") and config.get("scaling_factor") is None:
        raise CheckpointError(f"{config.ref}: its config.json does not say 'scaling_factor'", "complete it")


def _grok_yarn(field: str) -> Any:
    def find(config: Config) -> Any:
        return config.get(field) if config.get("rope_type") in ("yarn", "original") else None

    return find


def _old(names: Mapping[str, str], **more: Any) -> tuple[Rule, ...]:
    """The names of the first Grok, which are read and never written."""
    return tuple(replace(one, writes=False) for one in tree(_GROK_OLD, names, **more))


_GROK = (
    *EMBEDDINGS,
    rule("transformer.in_out_embed", "token_embd", writes=False),
    rule("transformer.rms_norm", "output_norm", writes=False),
    *blocks(
        attn_norm="pre_attn_norm",
        attn_output_norm="post_attn_norm",
        ffn_norm="pre_moe_norm",
        post_ffw_norm="post_moe_norm",
    ),
    *attention(),
    *MLP,
    *w123(),
    *_old(
        {
            "attn_norm": "rms_norm",
            "attn_output_norm": "rms_norm_1",
            "ffn_norm": "rms_norm_2",
            "layer_output_norm": "rms_norm_3",
            "attn_q": "multi_head_attention.query",
            "attn_k": "multi_head_attention.key",
            "attn_v": "multi_head_attention.value",
            "attn_output": "multi_head_attention.linear",
            "ffn_gate_inp": "router",
            "ffn_gate_exps": "moe.{e}.linear",
            "ffn_down_exps": "moe.{e}.linear_1",
            "ffn_up_exps": "moe.{e}.linear_v",
        },
        ops=dict.fromkeys(("ffn_gate_exps", "ffn_down_exps", "ffn_up_exps"), (Stack(),)),
    ),
)


def _sarvam() -> ArchSpec:
    """Ling's second generation with all of a head rotated; its bias of experts is any constant beside llama.cpp's."""
    row = next(one for one in remote.SPECS if one.model_type == "bailing_moe_v2")
    return replace(
        row,
        classes=("SarvamMoEForCausalLM", "modeling_sarvam_moe.SarvamMoEForCausalLM"),
        model_type="sarvam_moe",
        keys=(*row.keys, ROPE_DIM),
        when=lambda base: base.number("rope.dimension_count") == base.number("attention.key_length"),
    )


SPECS = (
    ArchSpec(
        "arctic",
        ("ArcticForCausalLM",),
        "arctic",
        (
            *EMBEDDINGS,
            *blocks(
                attn_norm="input_layernorm",
                ffn_norm="residual_layernorm",
                ffn_norm_exps="post_attention_layernorm",
                ffn_gate="residual_mlp.w1",
                ffn_up="residual_mlp.w3",
                ffn_down="residual_mlp.w2",
            ),
            *attention(interleave=True),
            *w123(),
        ),
        (VOCAB_SIZE, ROPE_DIM),
        fixed=(
            SILU,
            Fixed("moe_layer_frequency", 1, "has experts in every layer of this architecture"),
            Fixed("parallel_attn_mlp_res", True, "has experts beside attention and its own network", default=False),
        ),
        back=lambda values, config, base: {
            "num_local_experts": values["expert_count"],
            "moe_layer_frequency": 1,
            "parallel_attn_mlp_res": True,
            "use_residual": True,
            "num_experts": None,
        },
    ),
    ArchSpec(
        "grok",
        ("Grok1ForCausalLM", "GrokForCausalLM"),
        "grok-1",
        _GROK,
        (
            Key("attn_logit_softcapping", "attn_logit_softcapping", 30.0),
            Key("router_logit_softcapping", "router_logit_softcapping", 30.0),
            Key("final_logit_softcapping", "final_logit_softcapping"),
            EXPERT_WIDTH,
            Key("rope.scaling.type", lambda c: "yarn" if c.get("rope_type") in ("yarn", "original") else None),
            Key("rope.scaling.factor", _grok_yarn("scaling_factor")),
            Key("rope.scaling.original_context_length", _grok_yarn("original_max_position_embeddings")),
            Key("rope.scaling.yarn_ext_factor", _grok_yarn("extrapolation_factor")),
            Key("rope.scaling.yarn_attn_factor", _grok_yarn("attn_factor")),
            Key("rope.scaling.yarn_beta_fast", _grok_yarn("beta_fast")),
            Key("rope.scaling.yarn_beta_slow", _grok_yarn("beta_slow")),
            Key("attention.temperature_length", "attn_temperature_len"),
            Key(
                "attention.output_scale",
                lambda c: c.get("attn_output_multiplier", default=c.number("head_dim") ** -0.5),
                field="attn_output_multiplier",
            ),
            Key("embedding_scale", "embedding_multiplier_scale", needed=True),
            Key("logit_scale", "output_multiplier_scale", needed=True),
        ),
        uneven=True,
        check=_grok_check,
        types=("grok", "git"),
        fixed=(Fixed("hidden_act", "gelu", "computes gelu in this architecture"),),
        back=lambda values, config, base: {
            "hidden_act": "gelu",
            "num_local_experts": values["expert_count"],
            "num_experts": None,
            **(
                {
                    "rope_type": "yarn",
                    "scaling_factor": values["rope.scaling.factor"],
                    "original_max_position_embeddings": values["rope.scaling.original_context_length"],
                    "extrapolation_factor": values["rope.scaling.yarn_ext_factor"],
                    "attn_factor": values["rope.scaling.yarn_attn_factor"],
                    "beta_fast": values["rope.scaling.yarn_beta_fast"],
                    "beta_slow": values["rope.scaling.yarn_beta_slow"],
                    "rope_parameters": {"rope_type": "default", "rope_theta": values["rope.freq_base"]},
                }
                if values.get("rope.scaling.type") == "yarn"
                else {}
            ),
        },
    ),
    ArchSpec(
        "grovemoe",
        ("GroveMoeForCausalLM", "modeling_grove_moe.GroveMoeForCausalLM"),
        "grove_moe",
        (
            *EMBEDDINGS,
            *NORMS,
            *attention(),
            *QK_NORMS,
            *experts(),
            *(
                block(f"mlp.chunk_experts.{{e}}.{name}_proj", f"ffn_{name}_chexps", ops=[Stack()])
                for name in ("gate", "up", "down")
            ),
        ),
        (
            EXPERT_WIDTH,
            # Its code has these built in.
            Key("expert_chunk_feed_forward_length", lambda c: int(c.get("head_dim", default=128) or 128)),
            constant("experts_per_group", 2),
            constant("expert_group_scale", 0.05),
        ),
        drops=(r"\.expert_bias$",),
        fixed=(SILU, _NORMED, Fixed("attention_bias", False, "has no such biases in this architecture")),
    ),
    ArchSpec(
        "smallthinker",
        ("SmallThinkerForCausalLM",),
        "smallthinker",
        (
            *EMBEDDINGS,
            *NORMS,
            *attention(),
            *experts("block_sparse_moe.", gate="gate", up="up", down="down", router="primary_router"),
        ),
        (
            Key("expert_count", ("moe_num_primary_experts", "num_experts"), needed=True),
            Key("expert_used_count", ("moe_num_active_primary_experts", "num_experts_per_tok"), needed=True),
            Key("expert_feed_forward_length", "moe_ffn_hidden_size", needed=True),
            Key("feed_forward_length", "moe_ffn_hidden_size", needed=True),
            Key(
                "expert_gating_func",
                lambda c: GATING["softmax" if c.get("moe_primary_router_apply_softmax") else "sigmoid"],
            ),
            Key("attention.sliding_window", lambda c: c.get("sliding_window_size") if _windowed(c) else None),
        ),
        fixed=(
            Fixed("sliding_window_layout", _smallthinker_layers, "has a window in all but every fourth layer"),
            Fixed("rope_layout", _smallthinker_rope, "leaves the positions out where there is no window"),
            Fixed(
                "sliding_window_size",
                4096,
                "has windows of 4096 tokens in this architecture",
                when=_windowed,
                limit=lambda c: f"texts of more than {min(4096, int(c.get('sliding_window_size')))} tokens",
            ),
            Fixed("moe_enable_secondary_experts", False, "has no secondary experts"),
            _NORMED,
        ),
        back=_smallthinker_back,
    ),
    ArchSpec(
        "maple",
        ("MapleForCausalLM",),
        "maple",
        (*EMBEDDINGS, *NORMS, *attention(), *QK_NORMS, *experts()),
        (
            VOCAB_SIZE,
            Key(
                "rope.dimension_count",
                lambda c: int(c.number("head_dim") * float(c.rope.get("partial_rotary_factor", 1.0))),
            ),
            Key("attention.sliding_window", "sliding_window", needed=True),
            Key("attention.sliding_window_pattern", window_pattern),
            EXPERT_WIDTH,
            # What its code clips the experts' gates and values at.
            Key("swiglu_clamp_exp", lambda c: [7.0] * c.number("layers")),
        ),
        own_output=True,
        fixed=(
            SILU,
            _NORMED,
            Fixed("num_shared_experts", 0, "has no shared experts in this architecture"),
            Fixed("nope_on_global_attention", True, "leaves the positions out without a window", default=False),
        ),
        back=lambda values, config, base: {**kinds(values), "norm_topk_prob": True, "nope_on_global_attention": True},
    ),
    ArchSpec(
        "llada-moe",
        ("LLaDAMoEModelLM", "LLaDAMoEModel"),
        "llada",
        (*EMBEDDINGS, *NORMS, *attention(), *QK_NORMS, *experts()),
        (
            Key("expert_feed_forward_length", "expert_intermediate_size"),
            constant("attention.causal", False),
            constant("diffusion.shift_logits", False),
        ),
        types=("llada_moe",),
        fixed=(
            SILU,
            Fixed("norm_topk_prob", False, "takes the weights of the chosen experts as they are", default=False),
        ),
        back=lambda values, config, base: {"model_type": "llada_moe", "qk_layernorm": True},
    ),
    _sarvam(),
    ArchSpec(
        "minimax-01",
        ("MiniMaxForCausalLM", "MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM"),
        "minimax",
        (
            *EMBEDDINGS,
            *NORMS,
            replace(block("self_attn.out_proj", "attn_output"), layers=lambda c, layer: not _full(c)[layer]),
            *attention(),
            *blocks(
                attn_qkv="self_attn.qkv_proj",
                attn_gate="self_attn.output_gate",
                attn_norm_2="self_attn.norm",
            ),
            *w123(),
            *(one for one in w123("mlp.") if not one.writes or one.hf.endswith("mlp.gate")),
        ),
        (
            Key("residual_scale", _ALPHAS, 1.0, field="full_attn_alpha_factor"),
            Key("rope.dimension_count", _minimax_rope),
            Key("attention.recurrent_layers", _recurrent),
        ),
        uneven=True,
        types=("minimax_text_01", "minimax_m1"),
        drops=(r"\.(slope_rate|(query|key|diagonal)_decay)$",),  # computed from the number of heads
        fixed=(
            SILU,
            *_SAME_ALPHAS,
            *_NO_BETAS,
            Fixed(
                "rms_norm_eps",
                1e-6,
                "has one epsilon for all norms, and that after linear attention has 1e-6",
                limit=lambda c: "linear attention of a size near that epsilon's root",
            ),
            Fixed("postnorm", True, "adds what was normalised", default=True),
            Fixed("shared_intermediate_size", 0, "has no shared experts in this architecture"),
        ),
        back=_minimax_back,
    ),
    ArchSpec(
        "minimax-m3",
        ("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration"),
        "minimax_m3_vl_text",
        plus_one(
            (
                *EMBEDDINGS,
                *NORMS,
                *attention(),
                *QK_NORMS,
                *MLP,
                *blocks(
                    **{
                        "indexer.q_proj": "self_attn.index_q_proj",
                        "indexer.k_proj": "self_attn.index_k_proj",
                        "indexer.q_norm": "self_attn.index_q_norm",
                        "indexer.k_norm": "self_attn.index_k_norm",
                    }
                ),
                *w123(),
                *shared_expert("block_sparse_moe.shared_experts"),
                block("block_sparse_moe.e_score_correction_bias", "exp_probs_b.bias"),
            )
        ),
        (
            Key("expert_feed_forward_length", "intermediate_size", needed=True),
            Key("rope.dimension_count", _minimax_rope),
            Key("expert_gating_func", lambda c: GATING["sigmoid"]),
            Key("expert_shared_count", _m3_shared),
            Key("expert_weights_scale", "routed_scaling_factor", needed=True),
            constant("expert_weights_norm", True),
            Key(
                "attention.indexer.head_count",
                _sparse("index_n_heads", "sparse_num_index_heads"),
                field="index_n_heads",
            ),
            Key("attention.indexer.key_length", _sparse("index_head_dim", "sparse_index_dim"), field="index_head_dim"),
            Key(
                "attention.indexer.top_k", _sparse("index_topk_blocks", "sparse_topk_blocks"), field="index_topk_blocks"
            ),
            Key(
                "attention.indexer.block_size",
                _sparse("index_block_size", "sparse_block_size"),
                field="index_block_size",
            ),
            Key(
                "attention.indexer.local_blocks",
                _sparse("index_local_blocks", "sparse_local_block"),
                field="index_local_blocks",
            ),
            Key("leading_dense_block_count", _m3_dense),
        ),
        uneven=True,
        own_output=True,
        types=("minimax_m3_vl", "minimax_m3"),
        drops=(r"^(vision_tower|multi_modal_projector|patch_merge_mlp)\.",),
        fixed=(
            SILU,
            Fixed("layer_types", _m3_indexed, "chooses blocks of tokens in all layers with experts, and in no other"),
            Fixed("swiglu_alpha", 1.702, "has 1.702 there"),
            Fixed("swiglu_limit", 7.0, "clips at 7"),
        ),
        back=_m3_back,
    ),
    ArchSpec(
        "plamo2",
        ("Plamo2ForCausalLM", "PLaMo2ForCausalLM"),
        "plamo2",
        _PLAMO2,
        (
            VOCAB_SIZE,
            Key("attention.head_count_kv", _plamo2_kv),
            # llama.cpp's own converter writes 0 for layers with a mixer, and the runtime then takes 0 as the size of a
            # head and never answers; it tells mixers by their key and value heads.
            Key("attention.head_count", "num_attention_heads", 32),
            Key("context_length", "max_position_embeddings", 2048),
            Key("embedding_length", "hidden_size", 4096),
            Key("attention.key_length", "hidden_size_per_head", 128),
            Key("attention.value_length", "hidden_size_per_head", 128),
            LAYERS,
            Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", 1e-6),
            Key("rope.freq_base", lambda c: float(c.rope.get("rope_theta", 10000.0))),
            Key("ssm.state_size", "mamba_d_state", 64),
            Key("ssm.conv_kernel", "mamba_d_conv", 4),
            Key("ssm.time_step_rank", "mamba_num_heads", 64),
            Key(
                "ssm.inner_size",
                lambda c: int(c.get("mamba_num_heads", default=64)) * int(c.get("hidden_size_per_head", default=128)),
            ),
            constant("ssm.group_count", 0),
            Key("feed_forward_length", "intermediate_size", 13312),
        ),
        common=False,
        uneven=True,
        check=lambda c: _plamo2_check(c),
        back=_plamo2_back,
    ),
)


def _plamo2_check(config: Config) -> None:
    if not any(not one for one in _attends(config)):
        raise CheckpointError(f"{config.ref}: llama.cpp's plamo2 has mixers, and this one has none", "run its own code")
