"""Rows: decoders with experts."""

from __future__ import annotations

from typing import Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.hyper import GATING
from adapterkit.gguf.arch.ops import (
    Alternate,
    AlternateLast,
    Each,
    EitherSide,
    HeadSplit,
    Interleave,
    Split,
    Turn,
    TurnedHalves,
)
from adapterkit.gguf.arch.rope import NTK_ALPHA, original_context
from adapterkit.gguf.arch.shared import (
    DEEPSTACK,
    EMBEDDINGS,
    EXPERT_WIDTH,
    LLAMA3,
    LONG_ATTENTION,
    LONGROPE,
    MLP,
    NORMS,
    PARTIAL_ROPE,
    QK_NORMS,
    ROPE_DIM,
    ROPE_TENSORS,
    VOCAB_SIZE,
    attention,
    constant,
    experts,
    of_sections,
    shared_expert,
    text_of,
    unusual_pattern,
)
from adapterkit.gguf.arch.spec import ArchSpec, Key, block, blocks, rule

_SPARSE = experts("block_sparse_moe.", gate="w1", up="w3", down="w2")
_CORRECTION = block("mlp.gate.e_score_correction_bias", "exp_probs_b.bias")
_POST_NORMS = blocks(attn_norm="input_layernorm", post_attention_norm="post_attention_layernorm")
_MULTIPLIERS = (
    Key("attention.scale", "attention_multiplier"),
    Key("embedding_scale", "embedding_multiplier"),
    Key("residual_scale", "residual_multiplier"),
    Key("logit_scale", "logits_scaling"),
)
# Latent attention: keys on their side, so that they can be multiplied into the query, and values, by head.
SPLIT_KV = (HeadSplit("kv_heads", ("qk_nope_head_dim", "v_head_dim")), Each((Turn(), None)))
GRANITE_EXPERTS = (
    block("block_sparse_moe.router.layer", "ffn_gate_inp"),
    block("block_sparse_moe.input_linear", "ffn_gate_exps", "ffn_up_exps", ops=[Split()]),
    block("block_sparse_moe.output_linear", "ffn_down_exps"),
    block("shared_mlp.input_linear", "ffn_gate_shexp", "ffn_up_shexp", ops=[Split()]),
    block("shared_mlp.output_linear", "ffn_down_shexp"),
)


def _dense_first(config: Config) -> int:
    """Layers before the first with experts."""
    found = config.get("first_k_dense_replace")
    if found is not None:
        return int(found)
    kinds = config.get("mlp_layer_types")
    if isinstance(kinds, list):
        return next((i for i, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    return 0 if config.get("n_routed_experts", "num_experts") is not None else config.number("layers")


def _scoring(config: Config) -> int | None:
    """How experts are chosen; where the config has no word for it, V3 and what came of it by sigmoid."""
    found = config.get("scoring_func")
    if found is not None:
        return GATING.get(str(found))
    return GATING["sigmoid"] if config.model_type in ("deepseek_v3", "kimi_k2") else None


def _normed(config: Config) -> bool | None:
    found = config.get("norm_topk_prob", default=config.model_type == "deepseek_v3")
    return True if found else None


def _yarn_log(config: Config) -> float | None:
    found = config.rope.get("mscale_all_dim")
    return None if found is None else 0.1 * float(found)


def _all_same(name: str) -> Any:
    """A number that is given for every layer, and must be the same for all."""

    def find(config: Config) -> int | None:
        value = config.get(name)
        if isinstance(value, list):
            if len(set(value)) > 1:
                raise CheckpointError(f"{config.ref}: '{name}' differs between layers, which GGUF cannot say", "")
            value = value[0] if value else None
        return None if value is None else int(value)

    return find


def _llama4_window(config: Config) -> int | None:
    kinds = config.get("layer_types")
    return 0 if isinstance(kinds, list) and set(kinds) == {"full_attention"} else None


def _glm_rope(config: Config) -> int:
    return int(float(config.rope.get("partial_rotary_factor", 0.5)) * config.number("head_dim"))


def _ernie_shared(config: Config) -> int | None:
    count = config.get("moe_num_shared_experts")
    return int(count) * config.number("moe_intermediate_size") if count else None


def _no_groups(config: Config) -> None:
    if config.number("kv_heads") != config.number("heads"):
        raise CheckpointError(
            f"{config.ref}: llama.cpp's olmoe has as many key and value heads as heads", "run it with transformers"
        )


def _lite(config: Config) -> None:
    """llama.cpp knows a model without a low-rank q by its number of layers."""
    layers = config.number("layers")
    known = layers in (26, 27) or (layers == 48 and config.get("vocab_size") == 128256)
    if config.get("q_lora_rank") is not None and known:
        raise CheckpointError(
            f"{config.ref}: llama.cpp reads no q_lora_rank of a deepseek2 of {layers} layers, and loads no such file",
            "run it with transformers",
        )
    if config.get("q_lora_rank") is None and not known:
        raise CheckpointError(
            f"{config.ref}: llama.cpp reads a deepseek2 without q_lora_rank only when it has 26 or 27 layers",
            "run it with transformers",
        )


def _no_head_norm(config: Config) -> None:
    if config.get("norm_head"):
        raise CheckpointError(
            f"{config.ref}: its output layer is normalised when it is loaded (norm_head)", "take a published GGUF"
        )


SPECS = (
    ArchSpec(
        "llama",
        ("MixtralForCausalLM",),
        "mixtral",
        (*EMBEDDINGS, *NORMS, *attention(interleave=True), *_SPARSE),
        (VOCAB_SIZE, ROPE_DIM),
        factors=ROPE_TENSORS,
        experts=True,
    ),
    ArchSpec(
        "qwen2moe",
        ("Qwen2MoeForCausalLM",),
        "qwen2_moe",
        (*EMBEDDINGS, *NORMS, *attention(), *MLP, *experts(), *shared_expert("mlp.shared_expert", plain=False)),
        (EXPERT_WIDTH, Key("expert_shared_feed_forward_length", "shared_expert_intermediate_size")),
        own_output=True,
    ),
    ArchSpec(
        "qwen3moe",
        ("Qwen3MoeForCausalLM",),
        "qwen3_moe",
        (*EMBEDDINGS, *NORMS, *attention(), *QK_NORMS, *MLP, *experts()),
        (EXPERT_WIDTH,),
        defaults={"norm_topk_prob": True},
        variant=lambda c: of_sections(c, "qwen3_omni_moe"),
    ),
    ArchSpec(
        "qwen3vlmoe",
        ("Qwen3VLMoeForConditionalGeneration",),
        "qwen3_vl_moe",
        (
            *EMBEDDINGS,
            *NORMS,
            *attention(),
            *QK_NORMS,
            *MLP,
            # They lie on their side in what is published; the way back writes them one by one, as Qwen3-MoE has them.
            block(
                "mlp.experts.gate_up_proj",
                "ffn_gate_exps.weight",
                "ffn_up_exps.weight",
                ops=[EitherSide("gate_up_rows", "hidden", (Split(),), (Turn(), TurnedHalves()))],
                writes=False,
            ),
            block(
                "mlp.experts.down_proj",
                "ffn_down_exps.weight",
                ops=[EitherSide("hidden", "moe_intermediate_size", (), (Turn(),))],
                writes=False,
            ),
            *experts(),
        ),
        (
            EXPERT_WIDTH,
            DEEPSTACK,
        ),
        types=("qwen3_vl_moe_text",),
        defaults={"norm_topk_prob": True},
        back=text_of("qwen3_moe", "Qwen3MoeForCausalLM"),
    ),
    ArchSpec(
        "phimoe",
        ("PhimoeForCausalLM", "PhiMoEForCausalLM"),
        "phimoe",
        (*EMBEDDINGS, *NORMS, *attention(), *_SPARSE),
        (
            Key("context_length", "context", field="max_position_embeddings"),
            Key("rope.scaling.original_context_length", lambda c: original_context(c)),
            Key("embedding_length", "hidden", field="hidden_size"),
            Key("feed_forward_length", "intermediate_size", needed=True),
            Key("block_count", lambda c: c.number("layers")),
            Key("attention.head_count", "heads", field="num_attention_heads"),
            Key("attention.head_count_kv", lambda c: c.number("kv_heads"), field="num_key_value_heads"),
            Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", needed=True),
            PARTIAL_ROPE,
            Key("rope.freq_base", lambda c: c.rope.get("rope_theta")),
            Key("attention.sliding_window", lambda c: int(c.get("sliding_window", default=0))),
            LONG_ATTENTION,
            Key("expert_used_count", ("num_experts_per_tok", "num_experts_per_token")),
            Key("expert_count", ("num_local_experts", "num_experts")),
        ),
        common=False,
        factors=LONGROPE,
        own_output=True,
        note="llama.cpp takes the shares of PhiMoE's experts by a plain softmax and norms by their root mean square, where the "
        "model has a sparse mixer and layer norms: scores differ",
    ),
    ArchSpec(
        "olmoe",
        ("OlmoeForCausalLM",),
        "olmoe",
        (*EMBEDDINGS, *NORMS, *attention(), *QK_NORMS, *experts()),
        (Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", 1e-5),),
        check=_no_groups,
        own_output=True,
    ),
    ArchSpec(
        "granitemoe",
        ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
        "granitemoe",
        (*EMBEDDINGS, *NORMS, *attention(interleave=True), *GRANITE_EXPERTS),
        (
            VOCAB_SIZE,
            ROPE_DIM,
            *_MULTIPLIERS,
            Key("expert_shared_feed_forward_length", lambda c: c.get("shared_intermediate_size") or None),
        ),
        leave=("attention.key_length", "attention.value_length"),
        factors=ROPE_TENSORS,
        types=("granitemoeshared",),
    ),
    ArchSpec(
        "deepseek2",
        (
            "DeepseekV2ForCausalLM",
            "DeepseekV3ForCausalLM",
            "KimiVLForConditionalGeneration",
            "KimiK25ForConditionalGeneration",
        ),
        "deepseek_v2",
        (
            *EMBEDDINGS,
            *NORMS,
            *MLP,
            *experts(),
            *shared_expert("mlp.shared_experts"),
            _CORRECTION,
            *blocks(
                attn_q="self_attn.q_proj",
                attn_q_a="self_attn.q_a_proj",
                attn_q_a_norm="self_attn.q_a_layernorm",
                attn_q_b="self_attn.q_b_proj",
                attn_kv_a_mqa="self_attn.kv_a_proj_with_mqa",
                attn_kv_a_norm="self_attn.kv_a_layernorm",
                attn_output="self_attn.o_proj",
            ),
            block("self_attn.kv_b_proj", "attn_k_b", "attn_v_b", ops=SPLIT_KV),
        ),
        (
            constant("attention.head_count_kv", 1),
            Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", 1e-6),
            Key("leading_dense_block_count", _dense_first, field="first_k_dense_replace"),
            VOCAB_SIZE,
            Key("attention.q_lora_rank", "q_lora_rank"),
            Key("attention.kv_lora_rank", "kv_lora_rank", 512),
            Key("attention.key_length", lambda c: c.number("kv_lora_rank") + c.number("qk_rope_head_dim")),
            Key("attention.value_length", lambda c: c.number("kv_lora_rank")),
            Key("attention.key_length_mla", lambda c: c.number("qk_nope_head_dim") + c.number("qk_rope_head_dim")),
            Key("attention.value_length_mla", "v_head_dim", needed=True),
            Key("expert_feed_forward_length", ("moe_intermediate_size", "intermediate_size")),
            Key("expert_count", "n_routed_experts"),
            Key("expert_shared_count", "n_shared_experts", 0),
            Key("expert_weights_scale", "routed_scaling_factor"),
            Key("expert_weights_norm", _normed, field="norm_topk_prob"),
            Key("expert_gating_func", _scoring),
            Key("rope.dimension_count", "qk_rope_head_dim", needed=True),
            Key("rope.scaling.yarn_log_multiplier", _yarn_log),
        ),
        types=("deepseek_v3", "kimi_k2"),
        check=_lite,
    ),
    ArchSpec(
        "glm4moe",
        ("Glm4MoeForCausalLM", "Glm4vMoeForConditionalGeneration"),
        "glm4_moe",
        (
            *EMBEDDINGS,
            *_POST_NORMS,
            *attention(),
            *QK_NORMS,
            *MLP,
            *experts(),
            *shared_expert("mlp.shared_experts"),
            _CORRECTION,
        ),
        (
            Key("rope.dimension_count", _glm_rope),
            Key("expert_count", "n_routed_experts"),
            EXPERT_WIDTH,
            Key("expert_shared_count", "n_shared_experts"),
            Key("leading_dense_block_count", _dense_first, field="first_k_dense_replace"),
            constant("expert_gating_func", GATING["sigmoid"]),
            Key("expert_weights_scale", "routed_scaling_factor"),
            Key("expert_weights_norm", "norm_topk_prob"),
        ),
        uneven=True,
        types=("glm4v_moe_text",),
    ),
    ArchSpec(
        "gpt-oss",
        ("GptOssForCausalLM",),
        "gpt_oss",
        (
            *EMBEDDINGS,
            *_POST_NORMS,
            *attention(),
            block("self_attn.sinks", "attn_sinks.weight"),
            block("mlp.router", "ffn_gate_inp"),
            block("mlp.experts.gate_up_proj", "ffn_gate_exps.weight", "ffn_up_exps.weight", ops=[Turn(), Alternate()]),
            block("mlp.experts.gate_up_proj_bias", "ffn_gate_exps.bias", "ffn_up_exps.bias", ops=[AlternateLast()]),
            block("mlp.experts.down_proj", "ffn_down_exps.weight", ops=[Turn()]),
            block("mlp.experts.down_proj_bias", "ffn_down_exps.bias"),
        ),
        (
            Key("attention.sliding_window", "sliding_window", needed=True),
            unusual_pattern(2),
            Key("expert_feed_forward_length", "intermediate_size", needed=True),
        ),
        own_output=True,
    ),
    ArchSpec(
        "llama4",
        ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
        "llama4_text",
        (
            *EMBEDDINGS,
            *NORMS,
            *attention(),
            *blocks(
                ffn_gate="feed_forward.gate_proj", ffn_up="feed_forward.up_proj", ffn_down="feed_forward.down_proj"
            ),
            block("feed_forward.router", "ffn_gate_inp"),
            block(
                "feed_forward.experts.gate_up_proj",
                "ffn_gate_exps.weight",
                "ffn_up_exps.weight",
                ops=[Turn(), TurnedHalves()],
            ),
            block("feed_forward.experts.down_proj", "ffn_down_exps.weight", ops=[Turn()]),
            *shared_expert("feed_forward.shared_expert"),
        ),
        (
            Key("feed_forward_length", "intermediate_size_mlp", needed=True),
            VOCAB_SIZE,
            ROPE_DIM,
            Key("interleave_moe_layer_step", "interleave_moe_layer_step", needed=True),
            Key("expert_feed_forward_length", "intermediate_size", needed=True),
            Key("attention.sliding_window", _llama4_window),
        ),
        factors=(LLAMA3,),
        types=("llama4",),
    ),
    ArchSpec(
        "ernie4_5-moe",
        ("Ernie4_5_MoeForCausalLM",),
        "ernie4_5_moe",
        (
            *EMBEDDINGS,
            *NORMS,
            *attention(),
            *MLP,
            *experts(),
            *shared_expert("mlp.shared_experts"),
            block("mlp.moe_statics.e_score_correction_bias", "exp_probs_b.bias"),
        ),
        (
            Key("expert_count", "moe_num_experts"),
            Key("expert_used_count", "moe_k"),
            Key("interleave_moe_layer_step", "moe_layer_interval"),
            Key("leading_dense_block_count", "moe_layer_start_index"),
            EXPERT_WIDTH,
            Key("expert_shared_count", "moe_num_shared_experts"),
            Key("expert_shared_feed_forward_length", _ernie_shared),
        ),
        drops=(r"\.mtp_",),
        vocab="spm",
    ),
    ArchSpec(
        "hunyuan-moe",
        ("HunYuanMoEV1ForCausalLM",),
        "hunyuan_v1_moe",
        (
            *EMBEDDINGS,
            *NORMS,
            *attention(),
            *blocks(attn_q_norm="self_attn.query_layernorm", attn_k_norm="self_attn.key_layernorm"),
            *experts(router="gate.wg"),
            *shared_expert("mlp.shared_mlp"),
        ),
        (
            Key("expert_shared_feed_forward_length", "intermediate_size"),
            Key(
                "expert_feed_forward_length",
                lambda c: _all_same("moe_intermediate_size")(c) or c.number("intermediate_size"),
            ),
            Key("expert_used_count", _all_same("moe_topk")),
            NTK_ALPHA,
            Key("expert_shared_count", _all_same("num_shared_expert")),
        ),
    ),
    ArchSpec(
        "deepseek",
        ("DeepseekForCausalLM",),
        "deepseek",
        (
            *EMBEDDINGS,
            *NORMS,
            *attention(interleave=True),
            *MLP,
            *experts(),
            *shared_expert("mlp.shared_experts"),
        ),
        (
            ROPE_DIM,
            constant("rope.scaling.type", "none"),
            Key("leading_dense_block_count", "first_k_dense_replace", needed=True),
            VOCAB_SIZE,
            EXPERT_WIDTH,
            constant("expert_weights_scale", 1.0),
            Key("expert_count", "n_routed_experts", needed=True),
            Key("expert_shared_count", "n_shared_experts", needed=True),
        ),
    ),
    ArchSpec(
        "dots1",
        ("Dots1ForCausalLM",),
        "dots1",
        (
            *EMBEDDINGS,
            *NORMS,
            *attention(),
            *QK_NORMS,
            *MLP,
            *experts(),
            *shared_expert("mlp.shared_experts"),
            _CORRECTION,
        ),
        (
            EXPERT_WIDTH,
            Key("leading_dense_block_count", "first_k_dense_replace", needed=True),
            Key("expert_shared_count", "n_shared_experts", needed=True),
            Key("expert_weights_scale", "routed_scaling_factor", needed=True),
            Key("expert_weights_norm", "norm_topk_prob", needed=True),
            Key("expert_gating_func", lambda c: GATING.get(c.get("scoring_func"), GATING["sigmoid"])),
        ),
    ),
    ArchSpec(
        "bailingmoe",
        ("BailingMoeForCausalLM",),
        "bailing_moe",
        (
            rule("model.word_embeddings", "token_embd"),
            rule("model.norm", "output_norm"),
            rule("lm_head", "output"),
            *NORMS,
            block(
                "attention.query_key_value",
                "attn_q",
                "attn_k",
                "attn_v",
                ops=[
                    Split(("q_rows", "kv_rows", "kv_rows")),
                    Each((Interleave("heads"), Interleave("kv_heads"), None)),
                ],
            ),
            block("attention.dense", "attn_output"),
            *MLP,
            *experts(),
            *shared_expert("mlp.shared_experts"),
        ),
        (
            ROPE_DIM,
            Key("leading_dense_block_count", "first_k_dense_replace", needed=True),
            VOCAB_SIZE,
            EXPERT_WIDTH,
            constant("expert_weights_scale", 1.0),
            Key("expert_shared_count", "num_shared_experts", needed=True),
            Key("expert_weights_norm", "norm_topk_prob", needed=True),
        ),
        check=_no_head_norm,
    ),
)
