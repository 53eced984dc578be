"""Rows: decoders with code of their own whose tensors are put together otherwise.

ruGPT-3 XL, CogVLM, DeepSeek-OCR, Sarashina 2 Vision and Chameleon. Names and keys are those of llama.cpp's converter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.errors import CheckpointError
from adapterkit.gguf.arch import dense, moe
from adapterkit.gguf.arch.builtin import Fixed
from adapterkit.gguf.arch.coded import LAYERS, SILU
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.ops import InterleaveColumns, Join
from adapterkit.gguf.arch.shared import EMBEDDINGS, EXPERT_WIDTH, MLP, NORMS, VOCAB_SIZE, attention
from adapterkit.gguf.arch.spec import ArchSpec, Key, Rule, block, blocks, named_items, rule

if TYPE_CHECKING:
    pass

# ------------------------------------------------------------------ CogVLM


def _cogvlm_check(config: Config) -> None:
    if config.number("kv_heads") != config.number("heads"):
        raise CheckpointError(f"{config.ref}: llama.cpp's cogvlm has a key head per query head", "run its own code")


# ------------------------------------------------------------------ Chameleon


def _chameleon_check(config: Config) -> None:
    """llama.cpp hides tokens 4 to 8195, which are those of images in the published vocabulary."""
    if config.number("vocab_size") < 8196:
        raise CheckpointError(
            f"{config.ref}: llama.cpp's chameleon takes tokens 4 to 8195 for images, and this one has "
            f"{config.number('vocab_size')} tokens",
            "run it with transformers",
        )


_LLAMA = next(one for one in dense.SPECS if one.model_type == "llama")
_DEEPSEEK = next(one for one in moe.SPECS if one.model_type == "deepseek")

SPECS = (
    ArchSpec(
        "gpt2",
        ("RuGPT3XLForCausalLM",),
        "rugpt3xl",
        (
            rule("model.embed_tokens", "token_embd"),
            rule("model.embed_positions", "position_embd"),
            rule("model.norm", "output_norm"),
            rule("lm_head", "output"),
            named_items(
                "model.layers.{i}.self_attn.",
                ("q_proj", "k_proj", "v_proj"),
                "blk.{i}.attn_qkv",
                Join(("hidden", "hidden", "hidden")),
            ),
            *blocks(
                attn_norm="input_layernorm",
                attn_output="self_attn.o_proj",
                ffn_norm="post_attention_layernorm",
                ffn_up="mlp.up_proj",
                ffn_down="mlp.down_proj",
            ),
        ),
        (
            LAYERS,
            Key("context_length", ("max_position_embeddings", "n_positions"), needed=True),
            Key("embedding_length", "hidden_size", needed=True),
            Key("feed_forward_length", "intermediate_size", needed=True),
            Key("attention.head_count", "num_attention_heads", needed=True),
            Key("attention.layer_norm_epsilon", ("layer_norm_eps", "layer_norm_epsilon"), needed=True),
        ),
        common=False,
        when=lambda base: False,
        fixed=(Fixed("hidden_act", "gelu", "computes gelu in this architecture"),),
    ),
    ArchSpec(
        "cogvlm",
        ("CogVLMForCausalLM",),
        "cogvlm",
        (
            *EMBEDDINGS,
            *NORMS,
            *blocks(
                attn_qkv="self_attn.language_expert_query_key_value",
                attn_output="self_attn.language_expert_dense",
                ffn_gate="mlp.language_mlp.gate_proj",
                ffn_up="mlp.language_mlp.up_proj",
                ffn_down="mlp.language_mlp.down_proj",
                vis_attn_qkv="self_attn.vision_expert_query_key_value",
                vis_attn_output="self_attn.vision_expert_dense",
                vis_gate="mlp.vision_mlp.gate_proj",
                vis_up="mlp.vision_mlp.up_proj",
                vis_down="mlp.vision_mlp.down_proj",
            ),
        ),
        (VOCAB_SIZE, Key("rope.dimension_count", lambda c: c.number("head_dim"))),
        drops=(r"^model\.vision\.", r"rotary_emb\.inv_freq$"),
        check=_cogvlm_check,
        note="llama.cpp's cogvlm answers with the scores of the first token of a batch; start it with a micro-batch of one",
        fixed=(SILU,),
        back=lambda values, config, base: {"template_version": "chat", "hidden_act": "silu"},
    ),
    replace(
        _DEEPSEEK,
        arch="deepseek2-ocr",
        classes=("DeepseekOCRForCausalLM", "UnlimitedOCRForCausalLM", "DeepseekOCR2ForCausalLM"),
        model_type="deepseek_ocr",
        rules=(
            *(one for one in _DEEPSEEK.rules if "self_attn." not in one.hf),
            *attention(),
        ),
        keys=(
            VOCAB_SIZE,
            EXPERT_WIDTH,
            Key("leading_dense_block_count", "first_k_dense_replace", needed=True),
            Key("rope.freq_base", lambda c: float(c.rope.get("rope_theta", 10000.0))),
            Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", 1e-6),
            Key("expert_count", "n_routed_experts", needed=True),
            Key("expert_shared_count", "n_shared_experts", needed=True),
            Key("expert_weights_scale", "routed_scaling_factor"),
            Key("expert_weights_norm", "norm_topk_prob"),
        ),
        types=("DeepseekOCR", "deepseek_vl_v2", "deepseek_ocr2"),
        drops=(
            r"sam_model",
            r"qwen2_model",
            r"^model\.(vision_model|projector)\.",
            r"image_newline$",
            r"view_seperator$",
        ),
        fixed=(SILU, Fixed("use_mla", False, "has plain attention in this architecture", default=False)),
        back=lambda values, config, base: {
            "n_routed_experts": values["expert_count"],
            "n_shared_experts": values["expert_shared_count"],
            "use_mla": False,
            "num_experts": None,
        },
    ),
    replace(
        _LLAMA,
        classes=("Sarashina2VisionForCausalLM",),
        model_type="sarashina2_vision",
        rules=(Rule("norm.weight", ()), *_LLAMA.rules),  # a norm of the whole model that its code leaves out
        prefixes=("llm.",),
        drops=(r"^visual\.",),
        types=(),
        variant=None,
        when=lambda base: False,
    ),
    ArchSpec(
        "chameleon",
        ("ChameleonForConditionalGeneration", "ChameleonForCausalLM"),
        "chameleon",
        (
            *EMBEDDINGS,
            *NORMS,
            *attention(interleave=True),
            *MLP,
            block("self_attn.q_norm", "attn_q_norm", ops=[InterleaveColumns()]),
            block("self_attn.k_norm", "attn_k_norm", ops=[InterleaveColumns()]),
        ),
        (VOCAB_SIZE, Key("rope.dimension_count", lambda c: c.number("head_dim")), Key("swin_norm", "swin_norm", False)),
        drops=(r"^model\.vqmodel\.",),
        check=_chameleon_check,
        fixed=(
            SILU,
            Fixed("attention_bias", False, "has no such biases in this architecture"),
            Fixed("mlp_bias", False, "has no such biases in this architecture"),
        ),
    ),
)
