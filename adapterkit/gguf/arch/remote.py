"""Rows: decoders with code in their own repository: ChatGLM, Qwen (1), Ling (BailingMoeV2), DeciLM, openPangu, Dream and RND1.

Names and keys are those of llama.cpp's converter."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.hyper import GATING
from adapterkit.gguf.arch.ops import Interleave
from adapterkit.gguf.arch.shared import (
    EMBEDDINGS,
    EXPERT_WIDTH,
    LLAMA3,
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
from adapterkit.gguf.arch.spec import ArchSpec, Key, Rule, block, blocks, rule

if TYPE_CHECKING:
    from collections.abc import Mapping

_LAYERS = Key("block_count", lambda c: c.number("layers"))


def _tree(layer: str, names: Mapping[str, str]) -> tuple[Rule, ...]:
    return tuple(rule(f"{layer}{hf}", f"blk.{{i}}.{gguf}") for gguf, hf in names.items())


# ------------------------------------------------------------------ ChatGLM


def _chatglm_base(config: Config) -> float:
    return 10000.0 * float(config.get("rope_ratio", default=1.0))


def _chatglm_kv(config: Config) -> int:
    grouped = config.get("multi_query_attention", default=True)
    return int(config.get("multi_query_group_num", default=0)) if grouped else config.number("heads")


def _chatglm_check(config: Config) -> None:
    for name, wanted in (("rmsnorm", True), ("post_layer_norm", True), ("add_bias_linear", False)):
        found = config.get(name)
        if found is not None and found is not wanted:
            raise CheckpointError(f"{config.ref}: llama.cpp's chatglm has {name}={wanted}, and this one {found}", "")
    if config.get("apply_residual_connection_post_layernorm"):
        raise CheckpointError(f"{config.ref}: llama.cpp's chatglm adds what was not normalised", "run its own code")


# ------------------------------------------------------------------ DeciLM


def _deci(config: Config) -> tuple[list[int], list[int], list[int]]:
    """Heads, key and value heads, and feed-forward widths of each layer; 0 where a layer has none.

    Raises:
        CheckpointError: a layer's entry says less.
    """
    heads, width, layers = config.number("heads"), config.number("hidden"), config.number("layers")
    given = config.get("block_configs")
    if not isinstance(given, list):
        kv = config.get("num_key_value_heads_per_layer", default=[config.number("kv_heads")] * layers)
        return [heads] * layers, [int(one) for one in kv], [config.number("intermediate_size")] * layers
    found: tuple[list[int], list[int], list[int]] = ([], [], [])
    for index, one in enumerate(given):
        try:
            attends, feeds = one["attention"], one["ffn"]
            group = attends.get("n_heads_in_group")
            linear = bool(attends.get("replace_with_linear"))
            found[0].append(heads if group or linear else 0)
            found[1].append(heads // int(group) if group else 0)
            if feeds.get("replace_with_linear"):
                raise CheckpointError(f"{config.ref}: llama.cpp has no linear layer in the place of an ffn", "")
            found[2].append(_deci_width(feeds, width))
        except (KeyError, TypeError, AttributeError, ZeroDivisionError):
            raise CheckpointError(
                f"{config.ref}: entry {index} of 'block_configs' does not say what layer {index} is",
                "complete config.json",
            ) from None
    return found


def _deci_width(feeds: Mapping[str, Any], width: int) -> int:
    """``ffn_mult`` of two thirds of four times the width, up to a multiple of 256."""
    if feeds.get("no_op"):
        return 0
    if feeds.get("intermediate_size"):
        return int(feeds["intermediate_size"])
    factor = feeds.get("ffn_mult")
    size = int(2 * float(factor) * width / 3) if factor else 0
    return size if size % 256 == 0 else size + 256 - size % 256


def _deci_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    heads, kv, widths = (
        values[name] if isinstance(values[name], list) else [values[name]] * values["block_count"]
        for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    )
    given = [
        {
            "attention": {
                "n_heads_in_group": h // k if k else None,
                "replace_with_linear": bool(h and not k),
                "no_op": not h,
            },
            "ffn": {"intermediate_size": w or None, "no_op": not w, "replace_with_linear": False},
        }
        for h, k, w in zip(heads, kv, widths, strict=True)
    ]
    return {
        "block_configs": given,
        "num_attention_heads": max(heads),
        "num_key_value_heads": None,
        "intermediate_size": None,
    }


# ------------------------------------------------------------------ BailingMoeV2


def _bailing_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    rope = dict(config.get("rope_parameters", {}))
    rope["partial_rotary_factor"] = values["rope.dimension_count"] / values["attention.key_length"]
    return {
        "rope_parameters": rope,
        "score_function": "sigmoid",
        "scoring_func": None,
        "moe_router_enable_expert_bias": any(name.endswith("exp_probs_b.bias") for name in base),
        "moe_shared_expert_intermediate_size": values["expert_shared_feed_forward_length"],
    }


def _bailing_check(config: Config) -> None:
    if config.get("use_qkv_bias") or config.get("use_bias"):
        raise CheckpointError(f"{config.ref}: llama.cpp's bailingmoe2 has no biases in attention", "run its own code")
    if config.get("use_qk_norm", default=True) is False:
        raise CheckpointError(f"{config.ref}: llama.cpp's bailingmoe2 normalises queries and keys", "run its own code")


_DECI_RULES = (
    *EMBEDDINGS,
    *NORMS,
    *(
        replace(one, ops=tuple(Interleave(size="head_dim") for _ in one.ops)) if one.ops else one
        for one in attention(interleave=True)
    ),
    block("self_attn.linear_attn", "attn_output", writes=False),
    *MLP,
)

SPECS = (
    ArchSpec(
        "chatglm",
        ("ChatGLMModel", "ChatGLMForConditionalGeneration"),
        "chatglm",
        (
            rule("embedding.word_embeddings", "token_embd"),
            rule("encoder.final_layernorm", "output_norm"),
            rule("output_layer", "output"),
            *_tree(
                "encoder.layers.{i}.",
                {
                    "attn_norm": "input_layernorm",
                    "attn_qkv": "self_attention.query_key_value",
                    "attn_output": "self_attention.dense",
                    "ffn_norm": "post_attention_layernorm",
                    "ffn_up": "mlp.dense_h_to_4h",
                    "ffn_down": "mlp.dense_4h_to_h",
                },
            ),
        ),
        (
            Key("context_length", ("seq_length", "max_position_embeddings"), field="seq_length"),
            Key("embedding_length", "hidden_size", needed=True),
            Key("feed_forward_length", ("ffn_hidden_size", "intermediate_size"), field="ffn_hidden_size"),
            _LAYERS,
            Key("attention.head_count", "num_attention_heads", needed=True),
            Key("attention.head_count_kv", _chatglm_kv, field="multi_query_group_num"),
            Key("attention.layer_norm_rms_epsilon", "layernorm_epsilon", 1e-5),
            Key(
                "rope.dimension_count",
                lambda c: int(
                    int(c.get("attention_dim", "kv_channels", default=c.number("head_dim")))
                    * float(c.rope.get("partial_rotary_factor", 0.5))
                ),
            ),
            Key("rope.freq_base", _chatglm_base),
        ),
        common=False,
        prefixes=("transformer.",),
        root="transformer.",
        drops=(r"rotary_pos_emb\.inv_freq$", r"^transformer\.vision\."),
        check=_chatglm_check,
        when=lambda base: "blk.0.attn_qkv.weight" in base,
        back=lambda values, config, base: {
            "num_layers": values["block_count"],
            "num_hidden_layers": None,
            "multi_query_attention": True,
            "rope_ratio": values["rope.freq_base"] / 10000.0,
            "kv_channels": values["embedding_length"] // values["attention.head_count"],
            "num_key_value_heads": None,
            "rope_parameters": None,
            "padded_vocab_size": config.get("vocab_size"),
        },
    ),
    ArchSpec(
        "qwen",
        ("QWenLMHeadModel",),
        "qwen",
        (
            rule("wte", "token_embd"),
            rule("ln_f", "output_norm"),
            rule("lm_head", "output"),
            *_tree(
                "h.{i}.",
                {
                    "attn_norm": "ln_1",
                    "attn_qkv": "attn.c_attn",
                    "attn_output": "attn.c_proj",
                    "ffn_norm": "ln_2",
                    "ffn_up": "mlp.w1",
                    "ffn_gate": "mlp.w2",
                    "ffn_down": "mlp.c_proj",
                },
            ),
        ),
        (
            Key("context_length", ("seq_length", "max_position_embeddings"), field="seq_length"),
            _LAYERS,
            Key("embedding_length", "hidden_size", needed=True),
            Key("feed_forward_length", "intermediate_size", needed=True),
            Key("rope.freq_base", lambda c: c.rope.get("rope_theta")),
            Key("rope.dimension_count", lambda c: c.number("head_dim")),
            Key("attention.head_count", "num_attention_heads", needed=True),
            Key("attention.layer_norm_rms_epsilon", "layer_norm_epsilon", 1e-6),
        ),
        common=False,
        prefixes=("transformer.",),
        root="transformer.",
        back=lambda values, config, base: {"rotary_emb_base": values.get("rope.freq_base"), "rope_parameters": None},
    ),
    ArchSpec(
        "bailingmoe2",
        ("BailingMoeV2ForCausalLM",),
        "bailing_moe_v2",
        (
            rule("model.word_embeddings", "token_embd"),
            rule("model.norm", "output_norm"),
            rule("lm_head", "output"),
            *NORMS,
            *blocks(
                attn_qkv="attention.query_key_value",
                attn_output="attention.dense",
                attn_q_norm="attention.query_layernorm",
                attn_k_norm="attention.key_layernorm",
            ),
            *MLP,
            *experts(),
            *shared_expert("mlp.shared_experts"),
            block("mlp.gate.expert_bias", "exp_probs_b.bias"),
        ),
        (
            Key(
                "rope.dimension_count",
                lambda c: int(c.number("head_dim") * float(c.rope.get("partial_rotary_factor", 0.5))),
            ),
            Key("leading_dense_block_count", "first_k_dense_replace", needed=True),
            VOCAB_SIZE,
            EXPERT_WIDTH,
            Key(
                "expert_shared_feed_forward_length",
                lambda c: c.get(
                    "moe_shared_expert_intermediate_size",
                    default=c.number("moe_intermediate_size") * c.number("num_shared_experts"),
                ),
            ),
            Key("expert_weights_scale", "routed_scaling_factor", needed=True),
            Key("expert_shared_count", "num_shared_experts", needed=True),
            Key("expert_weights_norm", "norm_topk_prob", needed=True),
            Key("expert_gating_func", lambda c: GATING[c.get("score_function", default="sigmoid")]),
        ),
        uneven=True,
        check=_bailing_check,
        back=_bailing_back,
    ),
    ArchSpec(
        "deci",
        ("DeciLMForCausalLM",),
        "nemotron-nas",
        _DECI_RULES,
        (
            Key("rope.freq_base", lambda c: c.rope.get("rope_theta")),
            Key("attention.head_count_kv", lambda c: _deci(c)[1]),
            Key("attention.head_count", lambda c: _deci(c)[0]),
            Key("feed_forward_length", lambda c: _deci(c)[2]),
            _LAYERS,
            Key("context_length", "max_position_embeddings", needed=True),
            Key("embedding_length", "hidden_size", needed=True),
            Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", needed=True),
            Key("attention.key_length", lambda c: c.number("head_dim")),
            Key("attention.value_length", lambda c: c.number("head_dim")),
            VOCAB_SIZE,
            ROPE_DIM,
        ),
        common=False,
        factors=(LLAMA3,),
        types=("deci", "deci_lm"),
        uneven=True,
        back=_deci_back,
    ),
    ArchSpec(
        "pangu-embedded",
        ("PanguEmbeddedForCausalLM",),
        "PanguEmbedded",
        (*EMBEDDINGS, *NORMS, *attention(), *MLP),
        (VOCAB_SIZE, ROPE_DIM),
        types=("pangu_embedded",),
    ),
    ArchSpec(
        "dream",
        ("DreamModel",),
        "Dream",
        (*EMBEDDINGS, *NORMS, *attention(), *MLP),
        (constant("attention.causal", False),),
        types=("dream",),
    ),
    ArchSpec(
        "rnd1",
        ("RND1",),
        "rnd1",
        (*EMBEDDINGS, *NORMS, *attention(), *QK_NORMS, *experts()),
        (EXPERT_WIDTH, constant("attention.causal", False)),
    ),
)
