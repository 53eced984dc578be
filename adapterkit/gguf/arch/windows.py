"""Rows: decoders of layers with a window between layers that see all, most of them with experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.hybrid import LFM2, lfm2_kv
from adapterkit.gguf.arch.hyper import GATING
from adapterkit.gguf.arch.ops import Split, Stack
from adapterkit.gguf.arch.shared import (
    EMBEDDINGS,
    EXPERT_WIDTH,
    MLP,
    NO_SCALING,
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
from adapterkit.gguf.arch.spec import ArchSpec, Key, block, blocks

if TYPE_CHECKING:
    from collections.abc import Mapping

SIGMOID = constant("expert_gating_func", GATING["sigmoid"])
WINDOW = Key("attention.sliding_window", "sliding_window")
_CORRECTION = block("mlp.gate.e_score_correction_bias", "exp_probs_b.bias")


def kinds(values: Mapping[str, Any], every: int = 0, first: bool = False) -> dict[str, Any]:
    """``layer_types`` and ``sliding_window`` by the pattern of a file."""
    found = values.get("attention.sliding_window_pattern")
    if not isinstance(found, list):
        return {"sliding_window": values.get("attention.sliding_window")}
    return {
        "layer_types": ["sliding_attention" if one else "full_attention" for one in found],
        "sliding_window": values.get("attention.sliding_window"),
    }


def dense_lead(config: Config) -> int:
    """Layers before the first with experts.

    Raises:
        CheckpointError: there is a dense layer after one with experts.
    """
    found = config.get("first_k_dense_replace", "num_dense_layers", "first_last_k_dense_replace")
    given = config.get("mlp_layer_types")
    if isinstance(given, list):
        lead = next((i for i, kind in enumerate(given) if kind != "dense"), len(given))
        if "dense" in given[lead:]:
            raise CheckpointError(
                f"{config.ref}: llama.cpp has dense layers before those with experts, and this one between them",
                "run it with transformers",
            )
        return lead
    return 0 if found is None else int(found)


LEAD = Key("leading_dense_block_count", dense_lead, field="first_k_dense_replace")


def lead_back(values: Mapping[str, Any]) -> dict[str, Any]:
    """``mlp_layer_types`` by the number of dense layers."""
    lead = values.get("leading_dense_block_count", 0)
    return {"mlp_layer_types": ["dense"] * lead + ["sparse"] * (values["block_count"] - lead)}


def _pattern(config: Config) -> list[bool] | None:
    return window_pattern(config) if config.get("sliding_window") is not None else None


PATTERN = Key("attention.sliding_window_pattern", _pattern)


# ------------------------------------------------------------------ checks


def _mup(config: Config) -> None:
    if not config.get("mup_enabled", default=False):
        raise CheckpointError(
            f"{config.ref}: llama.cpp's afmoe multiplies the embedding with the root of its width, and this one does "
            "not (mup_enabled)",
            "run it with transformers",
        )


def _averaged(config: Config) -> None:
    if config.get("num_shared_experts", default=0) and (
        config.get("shared_expert_combination_strategy", default="average") != "average"
    ):
        raise CheckpointError(
            f"{config.ref}: llama.cpp's cohere2moe takes the average of routed and shared experts", "run it elsewhere"
        )


def _cohere_normed(config: Config) -> bool:
    """Softmax is taken over the chosen experts alone, whatever the field says."""
    if config.get("expert_selection_fn", default="softmax") == "softmax":
        return True
    return bool(config.get("norm_topk_prob", default=True))


def _one_base(config: Config) -> None:
    local = config.rope_by_kind.get("sliding_attention")
    theirs = local.get("rope_theta") if isinstance(local, dict) else None
    if theirs is not None and theirs != config.rope.get("rope_theta") and any(window_pattern(config) or ()):
        raise CheckpointError(
            f"{config.ref}: llama.cpp's mellum has one rotary base for all layers, and this one has two (rope_parameters)",
            "run it with transformers",
        )
    if config.get("norm_topk_prob", default=True) is False:
        raise CheckpointError(f"{config.ref}: llama.cpp's mellum makes the weights of experts add up to 1", "")


def _same_theta(config: Config) -> None:
    thetas = config.get("layer_rope_theta")
    if isinstance(thetas, list) and len({one for one in thetas if one}) > 1:
        raise CheckpointError(
            f"{config.ref}: its layers have rotary embeddings of different bases (layer_rope_theta), and in GGUF there "
            "is one",
            "run it with transformers",
        )


def _no_heads_apart(config: Config) -> None:
    for one, other in (
        ("swa_head_dim", "head_dim"),
        ("swa_num_attention_heads", "num_attention_heads"),
        ("swa_v_head_dim", "v_head_dim"),
    ):
        mine = config.get(one)
        if mine is not None and mine != config.get(other):
            raise CheckpointError(
                f"{config.ref}: '{one}' is {mine} and '{other}' {config.get(other)}; GGUF has one number for both",
                "run it with transformers",
            )
    _flat_groups(config)
    if config.get("norm_topk_prob", default=True) is False:
        raise CheckpointError(f"{config.ref}: llama.cpp's mimo2 makes the weights of experts add up to 1", "")
    if float(config.get("routed_scaling_factor", default=1.0) or 1.0) != 1.0:
        raise CheckpointError(f"{config.ref}: llama.cpp's mimo2 has no 'routed_scaling_factor'", "run it elsewhere")


def _flat_groups(config: Config) -> None:
    if int(config.get("n_group", default=1) or 1) != 1:
        raise CheckpointError(
            f"{config.ref}: llama.cpp chooses experts of this architecture without groups (n_group)", "run it elsewhere"
        )


# ------------------------------------------------------------------ back


def _afmoe_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {
        **kinds(values),
        "num_dense_layers": values.get("leading_dense_block_count", 0),
        "first_k_dense_replace": None,
        "mup_enabled": True,
        "scoring_func": None,
    }


def _cohere_moe_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    words = {number: word for word, number in GATING.items()}
    return {
        **kinds(values),
        **lead_back(values),
        "intermediate_size": values["expert_feed_forward_length"],
        "prefix_dense_intermediate_size": values["feed_forward_length"],
        "expert_selection_fn": words[values.get("expert_gating_func", GATING["sigmoid"])],
        "scoring_func": None,
        "norm_topk_prob": bool(values.get("expert_weights_norm", False)),
    }


def _exaone_moe_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {**kinds(values), **lead_back(values), "topk_group": 1, "n_group": 1}


def _granite_swa_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    ropes = values.get("attention.rope_pattern")
    theta = values.get("rope.freq_base", 10000.0)
    found = {
        **kinds(values),
        "attention_multiplier": values.get("attention.scale", 1.0),
        "layer_rope_theta": [theta if one else 0.0 for one in ropes] if ropes else None,
        "num_experts": None,
    }
    if "expert_count" in values:
        found |= {
            "num_local_experts": values["expert_count"],
            "shared_intermediate_size": values.get("expert_shared_feed_forward_length", 0),
        }
    return found


def _hy_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    lead = next((i for i in range(values["block_count"]) if f"blk.{i}.ffn_gate_inp.weight" in base), 0)
    return {
        "mlp_layer_types": ["dense"] * lead + ["sparse"] * (values["block_count"] - lead),
        "first_k_dense_replace": lead,
        "num_shared_experts": values["expert_shared_feed_forward_length"] // values["expert_feed_forward_length"],
        "route_norm": True,
        "scoring_func": None,
    }


def _lfm2_moe_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {
        "layer_types": ["full_attention" if one else "conv" for one in values["attention.head_count_kv"]],
        "num_dense_layers": values.get("leading_dense_block_count", 0),
        "first_k_dense_replace": None,
        "use_expert_bias": any(name.endswith("exp_probs_b.bias") for name in base),
        "scoring_func": None,
        "norm_topk_prob": True,
        "head_dim": None,
    }


def _mellum_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    found = kinds(values)
    found.setdefault("layer_types", ["full_attention"] * values["block_count"])
    return {
        **found,
        "num_local_experts": values["expert_count"],
        "num_experts": None,
        "norm_topk_prob": True,
        "mlp_layer_types": ["sparse"] * values["block_count"],
    }


def _laguna_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    heads, size = values["attention.head_count"], values["attention.key_length"]
    heads = heads if isinstance(heads, list) else [heads] * values["block_count"]
    gate = base["blk.0.attn_gate.weight"].shape[0]
    found = kinds(values)
    found.setdefault("layer_types", ["full_attention"] * values["block_count"])
    rope = dict(config.get("rope_parameters", {}))
    full = dict(rope.get("full_attention", rope))
    full["partial_rotary_factor"] = values["rope.dimension_count"] / size
    local = dict(rope.get("sliding_attention", {"rope_type": "default", "rope_theta": full.get("rope_theta")}))
    local["partial_rotary_factor"] = values.get("rope.dimension_count_swa", size) / size
    return {
        **found,
        **lead_back(values),
        "num_attention_heads": heads[0],
        "num_attention_heads_per_layer": heads if len(set(heads)) > 1 else None,
        "gating": True if gate == heads[0] else "per-element",
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "first_k_dense_replace": None,
        "scoring_func": None,
    }


def _minimax_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters", {}))
    rope["partial_rotary_factor"] = values["rope.dimension_count"] / values["attention.key_length"]
    return {
        "intermediate_size": values["expert_feed_forward_length"],
        "num_local_experts": values["expert_count"],
        "num_experts": None,
        "rope_parameters": rope,
        "rotary_dim": values["rope.dimension_count"],
        "use_qk_norm": True,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
    }


def _mimo_kinds(config: Config) -> list[bool]:
    hybrid = config.get("hybrid_layer_pattern")
    if isinstance(hybrid, list):
        return [one == 1 for one in hybrid]
    return window_pattern(config) or [False] * config.number("layers")


def _mimo_kv(config: Config) -> list[int]:
    """Key and value heads of each layer: those with a window have twice as many, unless the config says how many."""
    full = config.number("kv_heads")
    local = int(config.get("swa_num_key_value_heads", default=2 * full))
    return [local if slides else full for slides in _mimo_kinds(config)]


def _mimo_window(config: Config) -> int:
    """Tokens that are seen, the own one among them; the published config gives those before it a field of their own."""
    before = config.get("sliding_window_size")
    return config.number("sliding_window") if before is None else int(before) + 1


def _mimo_rope(config: Config) -> int:
    return int(float(config.rope.get("partial_rotary_factor", 1.0)) * config.number("head_dim"))


def _mimo_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    found = kinds(values)
    heads = values["attention.head_count_kv"]
    heads = heads if isinstance(heads, list) else [heads] * values["block_count"]
    slides = values["attention.sliding_window_pattern"]
    local = next((n for n, one in zip(heads, slides, strict=True) if one), heads[0])
    full = next((n for n, one in zip(heads, slides, strict=True) if not one), heads[0])
    share = values["rope.dimension_count"] / values["attention.key_length"]
    rope = config.get("rope_parameters", {})
    whole = {**rope.get("full_attention", rope), "partial_rotary_factor": share}
    inner = {**rope.get("sliding_attention", whole), "partial_rotary_factor": share}
    sparse = [f"blk.{i}.ffn_gate_inp.weight" in base for i in range(values["block_count"])]
    return {
        **found,
        "rope_parameters": {"full_attention": whole, "sliding_attention": inner},
        "num_key_value_heads": full,
        "swa_num_key_value_heads": local if local != 2 * full and any(slides) else None,
        "n_routed_experts": values["expert_count"],
        "num_experts": None,
        "v_head_dim": values["attention.value_length"],
        "mlp_layer_types": ["sparse" if one else "dense" for one in sparse],
        "norm_topk_prob": True,
        "attention_value_scale": values.get("attention.value_scale"),
        "scoring_func": "sigmoid",
    }


def _solar_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {"n_routed_experts": values["expert_count"], "num_experts": None, "topk_group": 1, "n_group": 1}


def _ropes(config: Config) -> list[bool] | None:
    given = config.get("no_rope_layers")
    if isinstance(given, list):
        return [bool(one) for one in given]
    thetas = config.get("layer_rope_theta")
    return [bool(one) for one in thetas] if isinstance(thetas, list) and not all(thetas) else None


_GRANITE_SWA = (
    *EMBEDDINGS,
    *NORMS,
    *attention(interleave=True),
    *MLP,
    block("self_attn.sinks", "attn_sinks.weight"),
)
_GRANITE_SWA_KEYS = (
    VOCAB_SIZE,
    ROPE_DIM,
    Key("attention.scale", "attention_multiplier", 1.0),
    Key("embedding_scale", "embedding_multiplier"),
    Key("residual_scale", "residual_multiplier"),
    Key("logit_scale", "logits_scaling", 1.0),
    Key("attention.sliding_window", "sliding_window", 128),
    Key(
        "attention.sliding_window_pattern",
        lambda c: window_pattern(c) or [i % 4 != 0 for i in range(c.number("layers"))],
    ),
    Key("attention.rope_pattern", _ropes),
)

SPECS = (
    ArchSpec(
        "afmoe",
        ("AfmoeForCausalLM",),
        "afmoe",
        (
            *EMBEDDINGS,
            *attention(),
            *QK_NORMS,
            *MLP,
            *blocks(
                attn_gate="self_attn.gate_proj",
                attn_norm="input_layernorm",
                post_attention_norm="post_attention_layernorm",
                ffn_norm="pre_mlp_layernorm",
                post_ffw_norm="post_mlp_layernorm",
            ),
            *experts(router="router.gate"),
            *shared_expert("mlp.shared_experts"),
            block("mlp.expert_bias", "exp_probs_b.bias"),
        ),
        (
            VOCAB_SIZE,
            ROPE_DIM,
            Key("expert_shared_count", "num_shared_experts"),
            EXPERT_WIDTH,
            Key("leading_dense_block_count", "num_dense_layers"),
            Key("expert_weights_norm", "route_norm", True),
            Key("expert_weights_scale", "route_scale"),
            WINDOW,
            PATTERN,
        ),
        check=_mup,
        back=_afmoe_back,
    ),
    ArchSpec(
        "cohere2moe",
        ("Cohere2MoeForCausalLM",),
        "cohere2_moe",
        (
            *EMBEDDINGS,
            block("input_layernorm", "attn_norm"),
            *attention(),
            *MLP,
            *experts(),
            *shared_expert("mlp.shared_experts"),
        ),
        (
            Key("logit_scale", "logit_scale", needed=True),
            Key("attention.sliding_window", "sliding_window", needed=True),
            PATTERN,
            VOCAB_SIZE,
            Key("expert_feed_forward_length", "intermediate_size", needed=True),
            Key(
                "feed_forward_length",
                lambda c: c.get("prefix_dense_intermediate_size", default=c.number("intermediate_size")),
            ),
            Key("leading_dense_block_count", dense_lead, field="first_k_dense_replace"),
            Key("expert_weights_norm", _cohere_normed, field="norm_topk_prob"),
            Key("expert_shared_count", lambda c: c.get("num_shared_experts") or None, field="num_shared_experts"),
            Key(
                "expert_shared_feed_forward_length",
                lambda c: (
                    c.number("intermediate_size") * c.number("num_shared_experts")
                    if c.get("num_shared_experts")
                    else None
                ),
            ),
            Key("expert_gating_func", lambda c: GATING[c.get("expert_selection_fn", default="softmax")]),
            ROPE_DIM,
            NO_SCALING,
        ),
        check=_averaged,
        back=_cohere_moe_back,
    ),
    ArchSpec(
        "exaone-moe",
        ("ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM"),
        "exaone_moe",
        (
            *EMBEDDINGS,
            *NORMS,
            *attention(),
            *QK_NORMS,
            *MLP,
            *experts(),
            *shared_expert("mlp.shared_experts"),
            block("mlp.e_score_correction_bias", "exp_probs_b.bias"),
        ),
        (
            VOCAB_SIZE,
            Key("attention.sliding_window", "sliding_window", needed=True),
            PATTERN,
            EXPERT_WIDTH,
            Key("expert_shared_count", "num_shared_experts", needed=True),
            Key(
                "expert_shared_feed_forward_length",
                lambda c: c.number("moe_intermediate_size") * c.number("num_shared_experts"),
            ),
            Key("expert_weights_scale", "routed_scaling_factor", needed=True),
            Key("expert_weights_norm", "norm_topk_prob", needed=True),
            LEAD,
            SIGMOID,
            NO_SCALING,
        ),
        drops=(r"^mtp\.",),
        own_output=True,
        back=_exaone_moe_back,
    ),
    ArchSpec(
        "granite_swa",
        ("GraniteSWAForCausalLM",),
        "granite_swa",
        _GRANITE_SWA,
        _GRANITE_SWA_KEYS,
        leave=("attention.key_length", "attention.value_length"),
        check=_same_theta,
        experts=False,
        back=_granite_swa_back,
    ),
    ArchSpec(
        "granite_swa",
        ("GraniteMoeSWAForCausalLM",),
        "granitemoe_swa",
        (
            *_GRANITE_SWA,
            block("block_sparse_moe.router", "ffn_gate_inp"),
            block("block_sparse_moe.experts.gate_up_proj", "ffn_gate_up_exps.weight"),
            block("block_sparse_moe.experts.down_proj", "ffn_down_exps.weight"),
            block("block_sparse_moe.router.layer", "ffn_gate_inp", writes=False),
            block("block_sparse_moe.input_linear", "ffn_gate_up_exps", writes=False),
            block("block_sparse_moe.output_linear", "ffn_down_exps", writes=False),
            *blocks(ffn_up_shexp="shared_mlp.input_linear", ffn_down_shexp="shared_mlp.output_linear"),
        ),
        (
            *_GRANITE_SWA_KEYS,
            Key("expert_shared_feed_forward_length", lambda c: c.get("shared_intermediate_size") or None),
        ),
        leave=("attention.key_length", "attention.value_length"),
        check=_same_theta,
        experts=True,
        back=_granite_swa_back,
    ),
    ArchSpec(
        "hy_v3",
        ("HYV3ForCausalLM",),
        "hy_v3",
        (
            *EMBEDDINGS,
            *NORMS,
            *attention(),
            *QK_NORMS,
            *MLP,
            *experts(router="router.gate"),
            *shared_expert("mlp.shared_mlp"),
            # llama.cpp reads this one without a suffix.
            block("mlp.expert_bias", "exp_probs_b"),
        ),
        (
            EXPERT_WIDTH,
            Key(
                "expert_shared_feed_forward_length",
                lambda c: c.number("moe_intermediate_size") * int(c.get("num_shared_experts", default=1)),
            ),
            Key("expert_weights_norm", "route_norm", True),
            Key("expert_weights_scale", "router_scaling_factor", 1.0),
            SIGMOID,
        ),
        uneven=True,
        back=_hy_back,
    ),
    ArchSpec(
        "lfm2moe",
        ("Lfm2MoeForCausalLM",),
        "lfm2_moe",
        (
            *LFM2,
            block("feed_forward.gate", "ffn_gate_inp"),
            block("feed_forward.expert_bias", "exp_probs_b.bias"),
            block("feed_forward.experts.{e}.w1", "ffn_gate_exps", ops=[Stack()]),
            block("feed_forward.experts.{e}.w3", "ffn_up_exps", ops=[Stack()]),
            block("feed_forward.experts.{e}.w2", "ffn_down_exps", ops=[Stack()]),
            block(
                "feed_forward.experts.gate_up_proj",
                "ffn_gate_exps.weight",
                "ffn_up_exps.weight",
                ops=[Split()],
                writes=False,
            ),
            block("feed_forward.experts.down_proj", "ffn_down_exps.weight", writes=False),
        ),
        (
            Key("attention.head_count_kv", lfm2_kv),
            EXPERT_WIDTH,
            Key("leading_dense_block_count", "num_dense_layers"),
            SIGMOID,
            VOCAB_SIZE,
            Key("shortconv.l_cache", "conv_L_cache", needed=True),
            Key("attention.layer_norm_rms_epsilon", "norm_eps", needed=True),
        ),
        needs=("token_embd.weight", "token_embd_norm.weight"),
        uneven=True,
        back=_lfm2_moe_back,
    ),
    ArchSpec(
        "mellum",
        ("MellumForCausalLM",),
        "mellum",
        (*EMBEDDINGS, *NORMS, *attention(), *QK_NORMS, *experts()),
        (EXPERT_WIDTH, WINDOW, PATTERN),
        own_output=True,
        check=_one_base,
        back=_mellum_back,
    ),
    ArchSpec(
        "laguna",
        ("LagunaForCausalLM",),
        "laguna",
        (
            *EMBEDDINGS,
            *NORMS,
            *attention(),
            *QK_NORMS,
            *MLP,
            block("self_attn.g_proj", "attn_gate"),
            *experts(),
            *shared_expert("mlp.shared_expert"),
            block("mlp.experts.e_score_correction_bias", "exp_probs_b.bias"),
        ),
        (
            VOCAB_SIZE,
            Key(
                "attention.head_count",
                lambda c: c.get("num_attention_heads_per_layer") or [c.number("heads")] * c.number("layers"),
            ),
            Key("attention.sliding_window", lambda c: c.get("sliding_window") or None, field="sliding_window"),
            PATTERN,
            EXPERT_WIDTH,
            Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size", needed=True),
            constant("expert_weights_norm", True),
            Key("expert_weights_scale", "moe_routed_scaling_factor", needed=True),
            SIGMOID,
            Key("leading_dense_block_count", dense_lead, field="first_k_dense_replace"),
            Key(
                "rope.dimension_count",
                lambda c: int(c.number("head_dim") * float(c.rope.get("partial_rotary_factor", 1.0))),
            ),
            Key(
                "rope.dimension_count_swa",
                lambda c: (
                    int(
                        c.number("head_dim")
                        * float(c.rope_by_kind.get("sliding_attention", {}).get("partial_rotary_factor", 1.0))
                    )
                    if "sliding_attention" in c.rope_by_kind
                    else None
                ),
            ),
        ),
        uneven=True,
        back=_laguna_back,
    ),
    ArchSpec(
        "minimax-m2",
        ("MiniMaxM2ForCausalLM",),
        "minimax_m2",
        (
            *EMBEDDINGS,
            *NORMS,
            *attention(),
            *QK_NORMS,
            *experts("block_sparse_moe.", gate="w1", up="w3", down="w2"),
            block("block_sparse_moe.e_score_correction_bias", "exp_probs_b.bias"),
        ),
        (
            Key("expert_feed_forward_length", "intermediate_size", needed=True),
            Key(
                "rope.dimension_count",
                lambda c: c.get(
                    "rotary_dim",
                    default=int(c.number("head_dim") * float(c.rope.get("partial_rotary_factor", 1.0))),
                ),
            ),
            SIGMOID,
        ),
        own_output=True,
        back=_minimax_back,
    ),
    ArchSpec(
        "mimo2",
        ("MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM"),
        "mimo_v2_flash",
        (
            *EMBEDDINGS,
            *NORMS,
            *attention(),
            *MLP,
            *experts(),
            _CORRECTION,
            block("self_attn.attention_sink_bias", "attn_sinks.weight"),
            block("self_attn.qkv_proj", "attn_qkv", writes=False),
        ),
        (
            Key("attention.head_count_kv", _mimo_kv),
            Key("attention.sliding_window", _mimo_window, field="sliding_window"),
            Key("attention.sliding_window_pattern", _mimo_kinds),
            Key("attention.value_length", "v_head_dim", needed=True),
            Key("expert_count", "n_routed_experts", needed=True),
            EXPERT_WIDTH,
            Key("rope.dimension_count", _mimo_rope),
            Key("attention.layer_norm_rms_epsilon", ("layernorm_epsilon", "rms_norm_eps"), 1e-5, field="rms_norm_eps"),
            Key("attention.value_scale", "attention_value_scale"),
            SIGMOID,
        ),
        types=("mimo_v2",),
        drops=(r"^model\.mtp\.", r"^mtp\."),
        uneven=True,
        own_output=True,
        check=_no_heads_apart,
        back=_mimo_back,
    ),
    ArchSpec(
        "glm4moe",
        ("SolarOpenForCausalLM",),
        "solar_open",
        (
            *EMBEDDINGS,
            *blocks(attn_norm="input_layernorm", post_attention_norm="post_attention_layernorm"),
            *attention(),
            *MLP,
            *experts(),
            *shared_expert("mlp.shared_experts"),
            _CORRECTION,
        ),
        (
            Key(
                "rope.dimension_count",
                lambda c: int(float(c.rope.get("partial_rotary_factor", 1.0)) * c.number("head_dim")),
            ),
            Key("expert_count", "n_routed_experts", needed=True),
            EXPERT_WIDTH,
            Key("expert_shared_count", "n_shared_experts", needed=True),
            Key("leading_dense_block_count", "first_k_dense_replace", 0),
            SIGMOID,
            Key("expert_weights_scale", "routed_scaling_factor"),
            Key("expert_weights_norm", "norm_topk_prob"),
        ),
        when=lambda base: base.number("rope.dimension_count") == base.number("attention.key_length"),
        back=_solar_back,
    ),
)
