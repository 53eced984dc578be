"""Rows: decoders with latent attention (MLA) beside those of `moe`: GLM-4.7-Flash, Youtu, MiniCPM3, Kimi Linear."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.arch import moe
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.hyper import GATING
from adapterkit.gguf.arch.ops import NegExp, Shaped
from adapterkit.gguf.arch.shared import (
    EMBEDDINGS,
    EXPERT_WIDTH,
    LONGROPE,
    MLP,
    NORMS,
    VOCAB_SIZE,
    experts,
    shared_expert,
)
from adapterkit.gguf.arch.spec import ArchSpec, Key, block, blocks
from adapterkit.gguf.arch.windows import LEAD, SIGMOID, lead_back

if TYPE_CHECKING:
    from collections.abc import Mapping


def latent_back(values: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of heads in a file with latent attention."""
    rope = values["rope.dimension_count"]
    return {
        "num_key_value_heads": values["attention.head_count"],
        "qk_rope_head_dim": rope,
        "kv_lora_rank": values["attention.kv_lora_rank"],
        "q_lora_rank": values.get("attention.q_lora_rank"),
        "qk_nope_head_dim": values["attention.key_length_mla"] - rope,
        "v_head_dim": values["attention.value_length_mla"],
    }


def _released_minicpm3(config: Config) -> None:
    for name, wanted in (("scale_emb", 12), ("dim_model_base", 256), ("scale_depth", 1.4)):
        found = config.get(name)
        if found is not None and float(found) != wanted:
            raise CheckpointError(
                f"{config.ref}: llama.cpp's minicpm3 has {wanted} for '{name}', and this one {found}",
                "run it with transformers",
            )


def _minicpm3_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    rope = values["rope.dimension_count"]
    return {
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": values["attention.key_length"] - rope,
        "v_head_dim": values["attention.value_length"],
        "head_dim": rope,
        "scale_emb": 12,
        "dim_model_base": 256,
        "scale_depth": 1.4,
        "original_max_position_embeddings": None,
    }


# ------------------------------------------------------------------ Kimi Linear


def _kimi_layers(config: Config) -> list[bool]:
    """Which layers attend, and do not mix linearly."""
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return [kind == "full_attention" for kind in kinds]
    full = config.get("linear_attn_config", default={}).get("full_attn_layers")
    if not isinstance(full, list):
        raise CheckpointError(f"{config.ref}: its config does not say 'linear_attn_config'", "complete it")
    return [i + 1 in full for i in range(config.number("layers"))]


def _kimi(field: str, nested: str) -> Any:
    def find(config: Config) -> Any:
        part = config.get("linear_attn_config", default={})
        return config.get(field, default=part.get(nested))

    return find


def _kimi_check(config: Config) -> None:
    heads = config.get("linear_num_heads", default=config.get("linear_attn_config", default={}).get("num_heads"))
    if heads is not None and heads != config.number("heads"):
        raise CheckpointError(
            f"{config.ref}: llama.cpp's kimi-linear has as many linear heads as heads that attend", "run it elsewhere"
        )
    if not config.get("moe_renormalize", default=True):
        raise CheckpointError(f"{config.ref}: llama.cpp's kimi-linear makes weights of experts add up to 1", "")
    if int(config.get("num_expert_group", default=1) or 1) != 1:
        raise CheckpointError(f"{config.ref}: llama.cpp's kimi-linear chooses experts without groups", "")


def _kimi_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {
        **latent_back(values),
        **lead_back(values),
        "layer_types": ["full_attention" if n else "linear_attention" for n in values["attention.head_count_kv"]],
        "model_max_length": values["context_length"],
        "max_position_embeddings": None,
        "linear_head_dim": values["kda.head_dim"],
        "linear_num_heads": values["attention.head_count"],
        "moe_renormalize": True,
        "num_experts_per_token": values["expert_used_count"],
        "num_experts_per_tok": None,
        "head_dim": None,
        "scoring_func": None,
        "first_k_dense_replace": None,
    }


def _glm_lite_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {
        **latent_back(values),
        **lead_back(values),
        "n_routed_experts": values["expert_count"],
        "num_experts": None,
        "head_dim": None,
        "scoring_func": None,
        "first_k_dense_replace": None,
        "norm_topk_prob": bool(values.get("expert_weights_norm", False)),
    }


def _youtu_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {**latent_back(values), "head_dim": values["rope.dimension_count"], "moe_intermediate_size": None}


_DEEPSEEK = next(spec for spec in moe.SPECS if spec.arch == "deepseek2")
_GLM_VOCAB = 154880  # of GLM-4.5 and what came of it

# Source: plain ggml_mul_mat in llama.cpp's deepseek2.cpp, minicpm3.cpp and kimi-linear.cpp.
_DEAF_NAMES = ("attn_k_b", "attn_v_b", "attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "output")
_DEAF = tuple(f"{name}.weight" for name in _DEAF_NAMES)
_KIMI_DEAF = (
    *_DEAF,
    *(f"{name}.weight" for name in ("attn_k", "attn_v", "attn_output")),
    *(f"ssm_{name}.weight" for name in ("f_a", "f_b", "g_a", "g_b", "beta", "conv1d_q", "conv1d_k", "conv1d_v")),
)

_INDEXER = blocks(
    **{
        "indexer.attn_q_b": "self_attn.indexer.wq_b",
        "indexer.attn_k": "self_attn.indexer.wk",
        "indexer.k_norm": "self_attn.indexer.k_norm",
        "indexer.proj": "self_attn.indexer.weights_proj",
    }
)
_INDEXED = (
    *(key for key in _DEEPSEEK.keys if key.name not in ("expert_gating_func", "leading_dense_block_count")),
    LEAD,
    SIGMOID,
    Key("attention.indexer.head_count", "index_n_heads", needed=True),
    Key("attention.indexer.key_length", "index_head_dim", needed=True),
    Key("attention.indexer.top_k", "index_topk", needed=True),
)
_NOT_INDEXED = tuple(f"indexer.{name}.weight" for name in ("attn_q_b", "attn_k", "proj"))


def _indexed_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {**_glm_lite_back(values, config, base), "first_k_dense_replace": values["leading_dense_block_count"]}


SPECS = (
    ArchSpec(
        "deepseek32",
        ("DeepseekV32ForCausalLM",),
        "deepseek_v32",
        (*_DEEPSEEK.rules, *_INDEXER),
        _INDEXED,
        uneven=True,
        no_lora=(*_DEAF, *_NOT_INDEXED),
        back=_indexed_back,
    ),
    ArchSpec(
        "glm-dsa",
        ("GlmMoeDsaForCausalLM",),
        "glm_moe_dsa",
        (*_DEEPSEEK.rules, *_INDEXER),
        (
            *_INDEXED,
            Key(
                "attention.indexer.types",
                lambda c: [one == "full" for one in c.get("indexer_types")] if c.get("indexer_types") else None,
            ),
        ),
        uneven=True,
        no_lora=(*_DEAF, *_NOT_INDEXED),
        back=lambda values, config, base: {
            **_indexed_back(values, config, base),
            "indexer_types": ["full" if one else "shared" for one in values["attention.indexer.types"]]
            if "attention.indexer.types" in values
            else None,
        },
    ),
    ArchSpec(
        "deepseek2",
        ("Glm4MoeLiteForCausalLM",),
        "glm4_moe_lite",
        _DEEPSEEK.rules,
        tuple(
            Key("expert_gating_func", lambda c: GATING["sigmoid"])
            if key.name == "expert_gating_func"
            else LEAD
            if key.name == "leading_dense_block_count"
            else key
            for key in _DEEPSEEK.keys
        ),
        check=_DEEPSEEK.check,
        uneven=True,
        when=lambda base: base.number("vocab_size") == _GLM_VOCAB,
        back=_glm_lite_back,
        no_lora=_DEAF,
    ),
    ArchSpec(
        "deepseek2",
        ("YoutuForCausalLM", "YoutuVLForConditionalGeneration"),
        "youtu",
        _DEEPSEEK.rules,
        _DEEPSEEK.keys,
        check=_DEEPSEEK.check,
        when=lambda base: not base.number("expert_count"),
        back=_youtu_back,
        no_lora=_DEAF,
    ),
    ArchSpec(
        "minicpm3",
        ("MiniCPM3ForCausalLM",),
        "minicpm3",
        (
            *EMBEDDINGS,
            *NORMS,
            *MLP,
            *blocks(
                attn_q_a="self_attn.q_a_proj",
                attn_q_a_norm="self_attn.q_a_layernorm",
                attn_q_b="self_attn.q_b_proj",
                attn_kv_a_mqa="self_attn.kv_a_proj_with_mqa",
                attn_kv_a_norm="self_attn.kv_a_layernorm",
                attn_kv_b="self_attn.kv_b_proj",
                attn_output="self_attn.o_proj",
            ),
        ),
        (
            Key("block_count", lambda c: c.number("layers")),
            Key("context_length", "max_position_embeddings", needed=True),
            Key("embedding_length", "hidden_size", needed=True),
            Key("feed_forward_length", "intermediate_size", needed=True),
            Key("attention.head_count", "num_attention_heads", needed=True),
            Key("attention.head_count_kv", "num_key_value_heads", needed=True),
            Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", needed=True),
            Key("rope.freq_base", lambda c: c.rope.get("rope_theta")),
            VOCAB_SIZE,
            Key("attention.q_lora_rank", "q_lora_rank"),
            Key("attention.kv_lora_rank", "kv_lora_rank", needed=True),
            Key("attention.key_length", lambda c: c.number("qk_nope_head_dim") + c.number("qk_rope_head_dim")),
            Key("attention.value_length", "v_head_dim", needed=True),
            Key("rope.dimension_count", "qk_rope_head_dim", needed=True),
        ),
        common=False,
        factors=LONGROPE,
        vocab="spm",
        check=_released_minicpm3,
        back=_minicpm3_back,
        no_lora=_DEAF[:-1],
    ),
    ArchSpec(
        "kimi-linear",
        ("KimiLinearForCausalLM", "KimiLinearModel"),
        "kimi_linear",
        (
            *EMBEDDINGS,
            *NORMS,
            *blocks(
                ffn_gate="block_sparse_moe.gate_proj",
                ffn_up="block_sparse_moe.up_proj",
                ffn_down="block_sparse_moe.down_proj",
            ),
            *(
                block(
                    one.hf.replace("model.layers.{i}.", ""),
                    *(n.replace("blk.{i}.", "") for n in one.gguf),
                    writes=False,
                )
                for one in MLP
            ),
            *experts("block_sparse_moe.", gate="w1", up="w3", down="w2"),
            *shared_expert("block_sparse_moe.shared_experts"),
            block("block_sparse_moe.gate.e_score_correction_bias", "exp_probs_b.bias"),
            *blocks(
                attn_q="self_attn.q_proj",
                attn_k="self_attn.k_proj",
                attn_v="self_attn.v_proj",
                attn_output="self_attn.o_proj",
                attn_kv_a_mqa="self_attn.kv_a_proj_with_mqa",
                attn_kv_a_norm="self_attn.kv_a_layernorm",
                ssm_beta="self_attn.b_proj",
                ssm_f_a="self_attn.f_a_proj",
                ssm_f_b="self_attn.f_b_proj",
                ssm_g_a="self_attn.g_a_proj",
                ssm_g_b="self_attn.g_b_proj",
                ssm_norm="self_attn.o_norm",
            ),
            block(
                "self_attn.kv_b_proj",
                "attn_k_b",
                "attn_v_b",
                ops=moe.SPLIT_KV,
            ),
            *(
                block(
                    f"self_attn.{one}_conv1d.weight",
                    f"ssm_conv1d_{one}.weight",
                    ops=[Shaped((1, "linear_rows", 1, "linear_kernel"), ("linear_rows", 1, "linear_kernel"))],
                )
                for one in "qkv"
            ),
            block("self_attn.A_log", "ssm_a", ops=[Shaped(("heads", 1), (1, 1, "heads", 1)), NegExp()]),
            block("self_attn.dt_bias", "ssm_dt.bias"),
        ),
        (
            Key("context_length", ("model_max_length", "max_position_embeddings"), field="model_max_length"),
            VOCAB_SIZE,
            Key("attention.head_count_kv", lambda c: [int(one) for one in _kimi_layers(c)]),
            Key(
                "ssm.conv_kernel",
                _kimi("linear_conv_kernel_dim", "short_conv_kernel_size"),
                field="linear_conv_kernel_dim",
            ),
            Key("kda.head_dim", _kimi("linear_head_dim", "head_dim"), field="linear_head_dim"),
            Key("attention.q_lora_rank", "q_lora_rank"),
            Key("attention.kv_lora_rank", "kv_lora_rank", needed=True),
            Key("rope.dimension_count", "qk_rope_head_dim", needed=True),
            Key("attention.key_length", lambda c: c.number("kv_lora_rank") + c.number("qk_rope_head_dim")),
            Key("attention.value_length", lambda c: c.number("kv_lora_rank")),
            Key("attention.key_length_mla", lambda c: c.number("qk_nope_head_dim") + c.number("qk_rope_head_dim")),
            Key("attention.value_length_mla", "v_head_dim", needed=True),
            EXPERT_WIDTH,
            Key("expert_shared_count", "num_shared_experts", needed=True),
            LEAD,
            Key("expert_weights_scale", "routed_scaling_factor", needed=True),
            SIGMOID,
        ),
        leave=("rope.freq_base",),
        uneven=True,
        check=_kimi_check,
        back=_kimi_back,
        no_lora=_KIMI_DEAF,
    ),
)
