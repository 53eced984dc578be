"""Rows: Gemma 3n and Gemma 4, with per-layer embeddings."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.ops import Resize, Stack
from adapterkit.gguf.arch.shared import EMBEDDINGS, FOUR_NORMS, MLP, QK_NORMS, attention, window_pattern
from adapterkit.gguf.arch.spec import ArchSpec, ComputedTensor, Key, block, blocks, rule

_PER_LAYER = (
    rule("model.embed_tokens_per_layer", "per_layer_token_embd", ops=[Resize("vocab_size")]),
    rule("model.per_layer_model_projection", "per_layer_model_proj"),
    rule("model.per_layer_projection_norm", "per_layer_proj_norm"),
    *blocks(inp_gate="per_layer_input_gate", proj="per_layer_projection", post_norm="post_per_layer_input_norm"),
)
_COMMON = (
    Key("context_length", "max_position_embeddings", 131072),
    Key("attention.head_count", "num_attention_heads", 8),
    Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", 1e-6),
    Key("final_logit_softcapping", "final_logit_softcapping"),
    Key("attention.sliding_window", "sliding_window", needed=True),
    Key("attention.shared_kv_layers", "num_kv_shared_layers", needed=True),
    Key("attention.sliding_window_pattern", window_pattern),
)


def _sparsity(config: Config) -> list[float]:
    """How many standard deviations above the mean an activation must lie to count, for a share that does not."""
    shares = config.need("activation_sparsity_pattern")
    layers = config.number("layers")
    values = shares if isinstance(shares, list) else [shares] * layers
    return [NormalDist().inv_cdf(one) if one > 0 else float("-inf") for one in values]


def _as_released(config: Config) -> None:
    if config.get("altup_num_inputs", default=4) != 4:
        raise CheckpointError(f"{config.ref}: llama.cpp's gemma3n has 4 alternating inputs", "run it with transformers")
    shares = config.need("activation_sparsity_pattern")
    if isinstance(shares, list) and any(one != (0.95 if i < 10 else 0.0) for i, one in enumerate(shares)):
        raise CheckpointError(
            f"{config.ref}: llama.cpp's gemma3n drops 95 % of the activations of the first 10 layers, and no others",
            "run it with transformers",
        )


def _shared_from_a_pair(config: Config) -> None:
    """The last layers may share keys and values: in the runtime those of the two layers before them, by their place."""
    shared, kinds = config.get("num_kv_shared_layers", default=0), config.get("layer_types")
    if not shared or not isinstance(kinds, list):
        return
    first = len(kinds) - int(shared)
    if kinds[max(first - 2, 0) : first] != ["sliding_attention", "full_attention"]:
        raise CheckpointError(
            f"{config.ref}: llama.cpp's gemma4 shares keys and values of a layer with a window and one without, in this "
            f"order, and the layers before its {shared} shared ones are no such pair (num_kv_shared_layers, layer_types)",
            "run it with transformers",
        )


def _global(config: Config, field: str, instead: str) -> int:
    """A number of the layers with full attention: its own field, or that of such a layer in ``per_layer_config``."""
    found = config.get(field)
    if found is None:
        kinds, layers = config.get("layer_types", default=[]), config.get("per_layer_config", default={})
        for index, one in layers.items() if isinstance(layers, dict) else ():
            if str(index).isdecimal() and int(index) < len(kinds) and kinds[int(index)] == "full_attention":
                found = found if found is not None else one.get(instead)
    return int(found) if found is not None else config.number(instead)


def _head_full(config: Config) -> int:
    return _global(config, "global_head_dim", "head_dim")


def _kv_heads(config: Config) -> Any:
    kinds = window_pattern(config)
    full, local = _global(config, "num_global_key_value_heads", "num_key_value_heads"), config.number("kv_heads")
    return local if kinds is None or full == local else [local if one else full for one in kinds]


def _widths(config: Config) -> Any:
    width = config.number("intermediate_size")
    if not config.get("use_double_wide_mlp", default=False):
        return width
    layers = config.number("layers")
    first = layers - config.number("num_kv_shared_layers")
    return [width if i < first else 2 * width for i in range(layers)]


def _proportional(config: Config) -> list[float]:
    """Rotary frequencies of layers with full attention: some as they are, the others switched off."""
    size = _head_full(config)
    rotated = int(size * float(config.rope.get("partial_rotary_factor", 1.0)) / 2)
    return [1.0] * rotated + [1e30] * (size // 2 - rotated)


SPECS = (
    ArchSpec(
        "gemma3n",
        ("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"),
        "gemma3n_text",
        (
            *EMBEDDINGS,
            *FOUR_NORMS,
            *attention(),
            *QK_NORMS,
            *MLP,
            *_PER_LAYER,
            rule("model.altup_projections.{e}", "altup_proj", ops=[Stack()]),
            rule("model.altup_unembed_projections.{e}", "altup_unembd_proj", ops=[Stack()]),
            block("altup.correct_output_scale", "altup_correct_scale.weight"),
            *blocks(
                altup_correct_coef="altup.correction_coefs",
                altup_predict_coef="altup.prediction_coefs",
                altup_router="altup.modality_router",
                altup_router_norm="altup.router_norm",
                laurel_l="laurel.linear_left",
                laurel_r="laurel.linear_right",
                laurel_post_norm="laurel.post_laurel_norm",
            ),
        ),
        (
            *_COMMON,
            Key("altup.active_idx", "altup_active_idx", needed=True),
            Key("altup.num_inputs", "altup_num_inputs", needed=True),
            Key("embedding_length_per_layer_input", "hidden_size_per_layer_input", needed=True),
            Key("activation_sparsity_scale", _sparsity),
        ),
        types=("gemma3n",),
        check=_as_released,
        uneven=True,
    ),
    ArchSpec(
        "gemma4",
        ("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"),
        "gemma4_text",
        (
            *EMBEDDINGS,
            *FOUR_NORMS,
            *attention(),
            *QK_NORMS,
            *MLP,
            *_PER_LAYER,
            block("layer_scalar", "layer_output_scale.weight"),
            block("router.proj", "ffn_gate_inp"),
            block("router.scale", "ffn_gate_inp.scale"),
            block("router.per_expert_scale", "ffn_down_exps.scale"),
            block("experts.gate_up_proj", "ffn_gate_up_exps.weight"),
            block("experts.down_proj", "ffn_down_exps.weight"),
            *blocks(
                pre_ffw_norm_2="pre_feedforward_layernorm_2",
                post_ffw_norm_1="post_feedforward_layernorm_1",
                post_ffw_norm_2="post_feedforward_layernorm_2",
            ),
        ),
        (
            *_COMMON,
            Key("embedding_length_per_layer_input", "hidden_size_per_layer_input", 0),
            Key("attention.key_length", _head_full, field="global_head_dim"),
            Key("attention.value_length", _head_full, field="global_head_dim"),
            Key("attention.key_length_swa", "head_dim", needed=True),
            Key("attention.value_length_swa", "head_dim", needed=True),
            Key("expert_feed_forward_length", ("expert_intermediate_size", "moe_intermediate_size")),
            Key("feed_forward_length", _widths, field="intermediate_size"),
            Key("attention.head_count_kv", _kv_heads),
            Key("rope.dimension_count", _head_full),
            Key("rope.dimension_count_swa", "head_dim"),
        ),
        factors=(ComputedTensor("rope_freqs.weight", _proportional),),
        check=_shared_from_a_pair,
        drops=(r"\.rotary_emb\.",),
        types=("gemma4", "gemma4_unified", "gemma4_unified_text"),
        uneven=True,
    ),
)
