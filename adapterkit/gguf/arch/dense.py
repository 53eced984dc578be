"""Rows: decoders with one feed-forward network per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError, TargetError
from adapterkit.gguf.arch.dense_modules import RULES as DENSE_RULES
from adapterkit.gguf.arch.ops import ByGroup, Each, Interleave, RotaryHalves, Split, Stack
from adapterkit.gguf.arch.rope import DIVISORS, NTK_ALPHA, divisors, original_context
from adapterkit.gguf.arch.shared import (
    AFTER_NORMS,
    DEEPSTACK,
    EMBEDDINGS,
    FEED_FORWARD,
    FOUR_NORMS,
    FUSED_MLP,
    LLAMA3,
    LONG_ATTENTION,
    LONGROPE,
    MLP,
    NO_SCALING,
    NORMS,
    PARTIAL_ROPE,
    QK_NORMS,
    ROPE_DIM,
    ROPE_TENSORS,
    VOCAB_SIZE,
    attention,
    constant,
    of_sections,
    reranks,
    text_of,
    unusual_pattern,
    window_pattern,
)
from adapterkit.gguf.arch.spec import ArchSpec, ComputedTensor, Key, block, blocks, plus_one, rule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.gguf.arch.config import Config

_LLAMA = (*EMBEDDINGS, *NORMS, *attention(interleave=True), *MLP)
_PLAIN = (*EMBEDDINGS, *NORMS, *attention(), *MLP)
_GRANITE = (
    Key("attention.scale", "attention_multiplier"),
    Key("embedding_scale", "embedding_multiplier"),
    Key("residual_scale", "residual_multiplier"),
    Key("logit_scale", "logits_scaling"),
)
_HEAD_SIZES = (Key("attention.key_length", "head_dim", 256), Key("attention.value_length", "head_dim", 256))
_GEMMA_KEYS = (
    Key("context_length", "context", needed=True),
    Key("embedding_length", "hidden_size", needed=True),
    Key("block_count", lambda c: c.number("layers")),
    Key("feed_forward_length", "intermediate_size", needed=True),
    Key("attention.head_count", "heads", needed=True),
    Key("attention.head_count_kv", lambda c: c.number("kv_heads"), field="num_key_value_heads"),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", needed=True),
    *_HEAD_SIZES,
)


def _no_qk_norm(config: Config) -> None:
    if config.get("use_qk_norm", default=False) and config.number("layers") < 64:
        raise CheckpointError(
            f"{config.ref}: llama.cpp reads norms of q and k only in a command-r of 64 layers",
            "run it with transformers",
        )
    if not config.get("use_qk_norm", default=False) and config.number("layers") >= 64:
        raise CheckpointError(
            f"{config.ref}: llama.cpp wants norms of q and k in a command-r of 64 layers, and loads no file without",
            "run it with transformers",
        )


def _released_baichuan(config: Config) -> None:
    if config.number("layers") not in (32, 40):
        raise CheckpointError(
            f"{config.ref}: llama.cpp tells how a baichuan counts positions by its 32 or 40 layers", "run its own code"
        )


def _window_of_32b(config: Config) -> None:
    if config.get("sliding_window") is not None and config.number("layers") != 64:
        raise CheckpointError(
            f"{config.ref}: llama.cpp gives an exaone4 a sliding window only when it has 64 layers",
            "run it with transformers",
        )
    if config.get("sliding_window") is None and config.number("layers") == 64:
        raise CheckpointError(
            f"{config.ref}: llama.cpp gives an exaone4 of 64 layers a sliding window, and its config has none",
            "run it with transformers",
        )


def _no_cap(config: Config) -> None:
    if config.get("attn_logit_softcapping") is not None:
        raise CheckpointError(f"{config.ref}: llama.cpp's gemma3 has no soft cap on attention", "give a gemma2")


def _both_kinds(config: Config) -> None:
    """llama.cpp stops at an encoder of layers that are all of one kind: it has a mask for each and uses one."""
    _no_cap(config)
    said = window_pattern(config)
    found = said if said is not None else [(i + 1) % 6 != 0 for i in range(config.number("layers"))]
    if len(set(found)) < 2:
        raise TargetError(
            f"{config.ref}: all of its layers are {'sliding' if all(found) else 'full'}_attention, and llama.cpp stops at a "
            "gemma-embedding without both kinds",
            "run it with transformers",
        )


def _gemma3_window(config: Config) -> int | None:
    if config.get("sliding_window_pattern") == 1:
        return None
    found = config.get("sliding_window")
    return None if found is None else int(found)


def _gemma3_kinds(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    from adapterkit.gguf.arch.fields import MORE

    return MORE["gemma3_text"](values, config, base)


def _phi_window(config: Config) -> int:
    return int(config.get("sliding_window", default=0))


def _command_r_context(config: Config) -> int:
    return int(config.need("model_max_length", "max_position_embeddings"))


def _exaone_divisors(config: Config) -> list[float] | None:
    return divisors(config, config.number("head_dim"), 16.0)


def _sliding(config: Config) -> list[bool] | None:
    """Layers with a window, by ``layer_types`` or a pattern such as ``LLLG`` or 4."""
    if config.get("sliding_window") is None:
        return None
    pattern, layers = config.get("sliding_window_pattern"), config.number("layers")
    if config.get("layer_types") is not None:
        return window_pattern(config)
    if isinstance(pattern, str):
        return [pattern[i % len(pattern)] == "L" for i in range(layers)]
    return [(i + 1) % pattern != 0 for i in range(layers)] if isinstance(pattern, int) and pattern > 0 else None


def _olmo3_window(config: Config) -> list[bool] | None:
    if config.get("sliding_window") is None:
        return None
    return window_pattern(config) or [(i + 1) % 4 != 0 for i in range(config.number("layers"))]


def _mistral3_yarn(name: str):  # type: ignore[no-untyped-def]
    def find(config: Config) -> float | None:
        if config.model_type != "ministral3":
            return None
        found = config.rope.get(name)
        if found is None:
            raise CheckpointError(
                f"{config.ref}: a ministral3 without '{name}' in rope_parameters", "complete config.json"
            )
        return float(found)

    return find


def glm_sections_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    """GLM-4 of text alone, whose rotary sections make no difference to text."""
    rope = {**config.get("rope_parameters", {}), "mrope_section": values["rope.dimension_sections"][:3]}
    share = values["rope.dimension_count"] / config.get(
        "head_dim", config["hidden_size"] // config["num_attention_heads"]
    )
    return {
        "model_type": "glm4",
        "architectures": ["Glm4ForCausalLM"],
        "rope_parameters": {**rope, "partial_rotary_factor": share},
    }


SPECS = (
    ArchSpec(
        "llama",
        (
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "LLaMAForCausalLM",
            "InternLM3ForCausalLM",
            "LlamaModel",
            "VLlama3ForCausalLM",
            "IQuestCoderForCausalLM",
        ),
        "llama",
        _LLAMA,
        (VOCAB_SIZE, ROPE_DIM),
        factors=ROPE_TENSORS,
        types=("mistral", "internlm3"),
        experts=False,
        # The text part of PaddleOCR-VL, as `--to hf` writes it.
        variant=lambda c: "paddleocr_vl_text" if "mrope_section" in c.rope_by_kind else None,
    ),
    ArchSpec(
        "mistral3",
        ("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"),
        "ministral3",
        _LLAMA,
        (
            VOCAB_SIZE,
            ROPE_DIM,
            Key("rope.scaling.yarn_log_multiplier", _mistral3_yarn("mscale_all_dim")),
            Key("attention.temperature_scale", _mistral3_yarn("llama_4_scaling_beta")),
        ),
        types=("mistral3",),
        reads_yarn_bounds=True,
    ),
    ArchSpec("smollm3", ("SmolLM3ForCausalLM",), "smollm3", _LLAMA, (VOCAB_SIZE, ROPE_DIM)),
    ArchSpec(
        "granite",
        ("GraniteForCausalLM",),
        "granite",
        (
            *_LLAMA,
            # Granite 4 without Mamba layers and experts is a hybrid's module tree.
            block("shared_mlp.input_linear", "ffn_gate", "ffn_up", ops=[Split()], writes=False),
            block("shared_mlp.output_linear", "ffn_down", writes=False),
        ),
        (
            VOCAB_SIZE,
            ROPE_DIM,
            *_GRANITE,
            Key("feed_forward_length", ("shared_intermediate_size", "intermediate_size"), field="intermediate_size"),
        ),
        leave=("attention.key_length", "attention.value_length"),
        factors=ROPE_TENSORS,
    ),
    ArchSpec(
        "minicpm",
        ("MiniCPMForCausalLM",),
        "minicpm",
        _LLAMA,
        (
            Key("embedding_scale", "scale_emb", needed=True),
            Key("residual_scale", lambda c: c.real("scale_depth") / c.number("layers") ** 0.5),
            Key("logit_scale", lambda c: c.number("hidden") / c.real("dim_model_base")),
        ),
        factors=LONGROPE,
        vocab="spm",
    ),
    ArchSpec(
        "baichuan",
        ("BaichuanForCausalLM", "BaiChuanForCausalLM"),
        "baichuan",
        (
            *EMBEDDINGS,
            *NORMS,
            *MLP,
            block(
                "self_attn.W_pack",
                "attn_q",
                "attn_k",
                "attn_v",
                ops=[Split(parts=3), Each((Interleave("heads"), Interleave("kv_heads"), None))],
            ),
            block("self_attn.o_proj", "attn_output"),
        ),
        (constant("tensor_data_layout", "Meta AI original pth"), ROPE_DIM),
        vocab="spm",
        check=_released_baichuan,
    ),
    ArchSpec(
        "internlm2",
        ("InternLM2ForCausalLM",),
        "internlm2",
        (
            rule("model.tok_embeddings", "token_embd"),
            rule("model.norm", "output_norm"),
            rule("output", "output"),
            *blocks(attn_norm="attention_norm", ffn_norm="ffn_norm", attn_output="attention.wo"),
            *blocks(ffn_gate="feed_forward.w1", ffn_up="feed_forward.w3", ffn_down="feed_forward.w2"),
            block(
                "attention.wqkv",
                "attn_q",
                "attn_k",
                "attn_v",
                ops=[ByGroup("heads", "kv_heads", True, interleave=True)],
            ),
        ),
        vocab="spm",
    ),
    # The text parts of Qwen2-VL and Qwen3-VL, as `--to hf` writes them, have the sections of their rotary dimensions.
    ArchSpec(
        "qwen2",
        ("Qwen2ForCausalLM", "Qwen2Model", "KORMoForCausalLM", "DotsOCRForCausalLM"),
        "qwen2",
        _PLAIN,
        variant=lambda c: of_sections(c, "qwen2_vl"),
    ),
    ArchSpec(
        "qwen3",
        ("Qwen3ForCausalLM", "Qwen3Model", "StepVLForConditionalGeneration"),
        "qwen3",
        (*_PLAIN, *QK_NORMS),
        variant=lambda c: reranks(c) or of_sections(c, "qwen3_vl"),
    ),
    ArchSpec(
        "qwen2vl",
        (
            "Qwen2VLForConditionalGeneration",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2VLModel",
            "Qwen2_5OmniModel",
            "Qwen2_5OmniForConditionalGeneration",
            "Qwen2_5OmniThinkerForConditionalGeneration",
        ),
        "qwen2_vl",
        _PLAIN,
        types=("qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text"),
        back=text_of("qwen2", "Qwen2ForCausalLM"),
    ),
    ArchSpec(
        "qwen3vl",
        ("Qwen3VLForConditionalGeneration",),
        "qwen3_vl",
        (*_PLAIN, *QK_NORMS),
        (DEEPSTACK,),
        types=("qwen3_vl_text",),
        back=text_of("qwen3", "Qwen3ForCausalLM"),
    ),
    ArchSpec(
        "seed_oss",
        ("SeedOssForCausalLM",),
        "seed_oss",
        (
            *EMBEDDINGS,
            *attention(),
            *MLP,
            *blocks(attn_norm="input_layernorm", post_attention_norm="post_attention_layernorm"),
        ),
    ),
    ArchSpec(
        "gemma", ("GemmaForCausalLM",), "gemma", plus_one(_PLAIN), _GEMMA_KEYS, common=False, tied=True, vocab="spm"
    ),
    ArchSpec(
        "gemma2",
        ("Gemma2ForCausalLM",),
        "gemma2",
        plus_one((*EMBEDDINGS, *FOUR_NORMS, *attention(), *MLP)),
        (
            *_GEMMA_KEYS,
            Key("attn_logit_softcapping", "attn_logit_softcapping", needed=True),
            Key("final_logit_softcapping", "final_logit_softcapping", needed=True),
            Key("attention.sliding_window", "sliding_window", needed=True),
            unusual_pattern(2),
        ),
        common=False,
        tied=True,
        vocab="spm",
    ),
    ArchSpec(
        "gemma3",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        "gemma3_text",
        plus_one((*EMBEDDINGS, *FOUR_NORMS, *attention(), *MLP, *QK_NORMS)),
        (
            Key("context_length", "max_position_embeddings", 131072),
            Key("attention.head_count", "num_attention_heads", 8),
            Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", 1e-6),
            *_HEAD_SIZES,
            Key("rope.freq_base", lambda c: float(c.rope.get("rope_theta", 1e6))),
            Key("final_logit_softcapping", "final_logit_softcapping"),
            Key("attention.sliding_window", _gemma3_window, field="sliding_window"),
            unusual_pattern(6),
            Key("attention.head_count_kv", "num_key_value_heads", 4),
        ),
        types=("gemma3",),
        check=_no_cap,
    ),
    # Gemma 3 whose tokens see each other both ways: EmbeddingGemma.
    ArchSpec(
        "gemma-embedding",
        ("Gemma3TextModel",),
        "gemma3_embedding",
        (*plus_one((*EMBEDDINGS, *FOUR_NORMS, *attention(), *MLP, *QK_NORMS)), *DENSE_RULES),
        (
            Key("context_length", "max_position_embeddings", 131072),
            Key("attention.head_count", "num_attention_heads", 8),
            Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", 1e-6),
            *_HEAD_SIZES,
            Key("rope.freq_base", lambda c: float(c.rope.get("rope_theta", 1e6))),
            Key("attention.sliding_window", "sliding_window", needed=True),
            unusual_pattern(6),
            Key("attention.head_count_kv", "num_key_value_heads", 4),
        ),
        variant=lambda c: None if c.get("use_bidirectional_attention", default=False) else "gemma3_text",
        check=_both_kinds,
        defaults={
            "model_type": "gemma3_text",
            "architectures": ["Gemma3TextModel"],
            "use_bidirectional_attention": True,
        },
        back=_gemma3_kinds,
        encoder=True,
    ),
    ArchSpec(
        "phi2",
        ("PhiForCausalLM",),
        "phi",
        (
            rule("model.embed_tokens", "token_embd"),
            rule("model.final_layernorm", "output_norm"),
            rule("lm_head", "output"),
            block("input_layernorm", "attn_norm"),
            *attention(out="dense"),
            *blocks(ffn_up="mlp.fc1", ffn_down="mlp.fc2"),
        ),
        (
            Key("context_length", ("n_positions", "max_position_embeddings"), field="max_position_embeddings"),
            Key("embedding_length", "hidden", field="hidden_size"),
            FEED_FORWARD,
            Key("block_count", lambda c: c.number("layers")),
            Key("attention.head_count", "heads", field="num_attention_heads"),
            Key("attention.head_count_kv", lambda c: c.number("kv_heads"), field="num_key_value_heads"),
            Key("attention.layer_norm_epsilon", ("layer_norm_epsilon", "layer_norm_eps"), field="layer_norm_eps"),
            PARTIAL_ROPE,
        ),
        common=False,
        own_output=True,
    ),
    ArchSpec(
        "phi3",
        ("Phi3ForCausalLM", "Phi4ForCausalLMV", "Phi4MMForCausalLM"),
        "phi3",
        (*EMBEDDINGS, *NORMS, *blocks(attn_qkv="self_attn.qkv_proj", attn_output="self_attn.o_proj"), *FUSED_MLP),
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
            Key("attention.sliding_window", _phi_window, field="sliding_window"),
            LONG_ATTENTION,
        ),
        common=False,
        factors=LONGROPE,
        drops=("embed_tokens_extend",),
    ),
    ArchSpec(
        "starcoder2",
        ("Starcoder2ForCausalLM",),
        "starcoder2",
        (*EMBEDDINGS, *NORMS, *attention(), *blocks(ffn_up="mlp.c_fc", ffn_down="mlp.c_proj")),
    ),
    ArchSpec(
        "stablelm",
        ("StableLmForCausalLM", "StableLMEpochForCausalLM", "LlavaStableLMEpochForCausalLM"),
        "stablelm",
        (
            *_PLAIN,
            block("self_attn.q_layernorm.norms.{e}", "attn_q_norm", ops=[Stack()]),
            block("self_attn.k_layernorm.norms.{e}", "attn_k_norm", ops=[Stack()]),
        ),
        (
            Key("context_length", "max_position_embeddings", needed=True),
            Key("embedding_length", "hidden_size", needed=True),
            Key("block_count", lambda c: c.number("layers")),
            Key("feed_forward_length", "intermediate_size", needed=True),
            PARTIAL_ROPE,
            Key("attention.head_count", "num_attention_heads", needed=True),
            Key("attention.head_count_kv", "num_key_value_heads", needed=True),
            Key("use_parallel_residual", "use_parallel_residual", True),
            Key("attention.layer_norm_epsilon", ("layer_norm_eps", "norm_eps"), field="layer_norm_eps"),
        ),
        common=False,
        own_output=True,
    ),
    ArchSpec(
        "olmo",
        ("OlmoForCausalLM", "OLMoForCausalLM"),
        "olmo",
        (*EMBEDDINGS, *attention(interleave=True), *MLP),
        (constant("attention.layer_norm_epsilon", 1e-5), Key("attention.clamp_kqv", "clip_qkv")),
        needs=("token_embd.weight",),
    ),
    ArchSpec(
        "olmo2",
        ("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        "olmo2",
        (*EMBEDDINGS, *AFTER_NORMS, *attention(), *MLP, *QK_NORMS),
        (
            Key("attention.sliding_window", "sliding_window"),
            Key("attention.sliding_window_pattern", _olmo3_window),
        ),
        types=("olmo3",),
        own_output=True,
    ),
    ArchSpec(
        "command-r",
        ("CohereForCausalLM",),
        "cohere",
        (*EMBEDDINGS, block("input_layernorm", "attn_norm"), *attention(), *MLP, *QK_NORMS),
        (
            Key("context_length", _command_r_context, field="max_position_embeddings"),
            Key("logit_scale", "logit_scale", needed=True),
            NO_SCALING,
        ),
        tied=True,
        check=_no_qk_norm,
    ),
    ArchSpec(
        "cohere2",
        ("Cohere2ForCausalLM",),
        "cohere2",
        (*EMBEDDINGS, block("input_layernorm", "attn_norm"), *attention(), *MLP),
        (
            Key("logit_scale", "logit_scale", needed=True),
            Key("attention.sliding_window", "sliding_window", needed=True),
            unusual_pattern(4),
            VOCAB_SIZE,
            Key(
                "rope.dimension_count",
                lambda c: int(float(c.rope.get("partial_rotary_factor", 1.0)) * c.number("head_dim")),
            ),
            NO_SCALING,
        ),
        tied=True,
    ),
    ArchSpec(
        "glm4",
        ("Glm4ForCausalLM", "Glm4vForConditionalGeneration"),
        "glm4",
        (
            *EMBEDDINGS,
            *attention(),
            *FUSED_MLP,
            *blocks(
                attn_norm="input_layernorm",
                post_attention_norm="post_self_attn_layernorm",
                ffn_norm="post_attention_layernorm",
                post_ffw_norm="post_mlp_layernorm",
            ),
        ),
        (
            Key(
                "rope.dimension_count",
                lambda c: int(float(c.rope.get("partial_rotary_factor", 0.5)) * c.number("head_dim")),
            ),
        ),
        variant=lambda c: "glm4v" if "mrope_section" in c.rope_by_kind else None,
    ),
    ArchSpec(
        "glm4",
        (),
        "glm4v",
        (
            *EMBEDDINGS,
            block("self_attn.q_proj", "attn_q", ops=[RotaryHalves("heads", "glm_rotary")]),
            block("self_attn.k_proj", "attn_k", ops=[RotaryHalves("kv_heads", "glm_rotary")]),
            block("self_attn.v_proj", "attn_v"),
            block("self_attn.o_proj", "attn_output"),
            *FUSED_MLP,
            *blocks(
                attn_norm="input_layernorm",
                post_attention_norm="post_self_attn_layernorm",
                ffn_norm="post_attention_layernorm",
                post_ffw_norm="post_mlp_layernorm",
            ),
        ),
        (
            Key(
                "rope.dimension_count",
                lambda c: int(float(c.rope.get("partial_rotary_factor", 0.5)) * c.number("head_dim")),
            ),
        ),
        types=("glm4v_text",),
        back=glm_sections_back,
        when=lambda base: "glm4.rope.dimension_sections" in base.header.keys,
    ),
    ArchSpec(
        "exaone",
        ("ExaoneForCausalLM",),
        "exaone",
        (
            rule("transformer.wte", "token_embd"),
            rule("transformer.ln_f", "output_norm"),
            rule("lm_head", "output"),
            *(
                rule(f"transformer.h.{{i}}.{hf}", f"blk.{{i}}.{gguf}")
                for hf, gguf in {
                    "ln_1": "attn_norm",
                    "ln_2": "ffn_norm",
                    "attn.attention.q_proj": "attn_q",
                    "attn.attention.k_proj": "attn_k",
                    "attn.attention.v_proj": "attn_v",
                    "attn.attention.out_proj": "attn_output",
                    "mlp.c_fc_0": "ffn_gate",
                    "mlp.c_fc_1": "ffn_up",
                    "mlp.c_proj": "ffn_down",
                }.items()
            ),
        ),
        (PARTIAL_ROPE,),
        factors=(LLAMA3,),
    ),
    ArchSpec(
        "exaone4",
        ("Exaone4ForCausalLM",),
        "exaone4",
        (*EMBEDDINGS, *AFTER_NORMS, *attention(), *MLP, *QK_NORMS),
        (
            VOCAB_SIZE,
            Key("attention.sliding_window", "sliding_window"),
            Key("attention.sliding_window_pattern", _sliding),
        ),
        factors=(ComputedTensor(DIVISORS, _exaone_divisors, True),),
        check=_window_of_32b,
    ),
    ArchSpec(
        "nemotron",
        ("NemotronForCausalLM",),
        "nemotron",
        plus_one((*EMBEDDINGS, *NORMS, *attention(), *blocks(ffn_up="mlp.up_proj", ffn_down="mlp.down_proj"))),
        (
            VOCAB_SIZE,
            Key("attention.layer_norm_epsilon", ("layer_norm_eps", "norm_epsilon", "norm_eps"), field="norm_eps"),
            PARTIAL_ROPE,
            NO_SCALING,
        ),
        vocab="spm",
        own_output=True,
    ),
    ArchSpec(
        "ernie4_5",
        ("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
        "ernie4_5",
        (
            *_PLAIN,
            block(
                "self_attn.qkv_proj",
                "attn_q",
                "attn_k",
                "attn_v",
                ops=[Split(("q_rows", "kv_rows", "kv_rows"))],
                writes=False,
            ),
            block("mlp.up_gate_proj", "ffn_gate", "ffn_up", ops=[Split()], writes=False),
        ),
        vocab="spm",
    ),
    ArchSpec(
        "hunyuan-dense",
        ("HunYuanDenseV1ForCausalLM",),
        "hunyuan_v1_dense",
        (
            *_PLAIN,
            *blocks(attn_q_norm="self_attn.query_layernorm", attn_k_norm="self_attn.key_layernorm"),
        ),
        (NTK_ALPHA,),
        leave=("expert_count", "expert_used_count"),
    ),
    ArchSpec(
        "arcee",
        ("ArceeForCausalLM",),
        "arcee",
        (
            *EMBEDDINGS,
            *NORMS,
            *attention(interleave=True),
            *blocks(ffn_up="mlp.up_proj", ffn_down="mlp.down_proj"),
        ),
        (VOCAB_SIZE, ROPE_DIM),
        factors=(LLAMA3,),
    ),
    ArchSpec(
        "xverse",
        ("XverseForCausalLM",),
        "xverse",
        _LLAMA,
        (constant("tensor_data_layout", "Meta AI original pth"), ROPE_DIM),
    ),
    ArchSpec(
        "orion",
        ("OrionForCausalLM",),
        "orion",
        _PLAIN,
        (
            constant("tensor_data_layout", "Meta AI original pth"),
            Key("context_length", ("max_sequence_length", "max_position_embeddings"), field="max_position_embeddings"),
            Key("embedding_length", "hidden_size", needed=True),
            Key("block_count", lambda c: c.number("layers")),
            Key("feed_forward_length", "intermediate_size", needed=True),
            Key("attention.head_count", "num_attention_heads", needed=True),
            Key("attention.head_count_kv", lambda c: c.number("kv_heads"), field="num_key_value_heads"),
            # Its config says rms, and its code has layer norms.
            Key("attention.layer_norm_epsilon", "rms_norm_eps", needed=True),
        ),
        common=False,
        vocab="spm",
    ),
)
