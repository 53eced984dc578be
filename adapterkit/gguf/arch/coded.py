"""Rows: decoders with code in their own repository, each with one feed-forward network per layer.

CodeShell, Refact, JAIS, OpenELM, PLM, PLaMo 1 and 3, Maincoder, Nanbeige, LLaDA, Spark and ruGPT-3 XL. Names and keys are those
of llama.cpp's converter; what its runtime has built in is stated as `Fixed`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.arch.builtin import Fixed
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.ops import Add, Copies, Each, Interleave, Scale, Split, Tile, Turn
from adapterkit.gguf.arch.rope import kind_of
from adapterkit.gguf.arch.shared import (
    EMBEDDINGS,
    LLAMA3,
    MLP,
    NORMS,
    QK_NORMS,
    ROPE_DIM,
    VOCAB_SIZE,
    attention,
    constant,
    window_pattern,
)
from adapterkit.gguf.arch.spec import ArchSpec, Key, Rule, block, blocks, rule, tree

if TYPE_CHECKING:
    from collections.abc import Mapping

LAYERS = Key("block_count", lambda c: c.number("layers"))
SILU = Fixed("hidden_act", "silu", "computes silu in this architecture")
_GELU = Fixed("activation_function", "gelu", "computes gelu in this architecture")
_NO_BIASES = Fixed("attention_bias", False, "has no such biases in this architecture")


# ------------------------------------------------------------------ CodeShell


def _stretched(config: Config) -> bool:
    """Whether its config asks for scaled positions, of which `scaling` has the keys."""
    return kind_of(config.rope) in ("linear", "yarn")


def _codeshell_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    factor = values.get("rope.scaling.factor", 1.0)
    return {
        "n_layer": values["block_count"],
        "group_query_attention": True,
        "position_embedding_type": "rope",
        "rope_parameters": config["rope_parameters"] if factor != 1.0 else None,
        "num_hidden_layers": None,
    }


# ------------------------------------------------------------------ Refact


def _refact_width(config: Config) -> int:
    """Two thirds of four times the width, up to a multiple of 256."""
    size = 8 * config.number("hidden") // 3
    return -(-size // 256) * 256


# ------------------------------------------------------------------ JAIS


def _jais_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    """The factors are in the weights of a GGUF, and cannot be told from it."""
    return {
        "n_inner": values["feed_forward_length"],
        "embeddings_scale": 1.0,
        "width_scale": 1.0,
        "activation_function": "swiglu",
        "position_embedding_type": "alibi",
        "scale_qk_dot_by_d": True,
        "tie_word_embeddings": False,
        "num_key_value_heads": None,
    }


_JAIS = (
    rule("transformer.ln_f", "output_norm"),
    *tree(
        "transformer.h.{i}.",
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_gate": "mlp.c_fc2",
            "ffn_down": "mlp.c_proj",
        },
        dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_gate", "ffn_down"), (Turn(),)),
    ),
)
_SCALE_IN, _SCALE_OUT = Scale(("jais_embedding",)), Scale(("jais_output",))


def _jais_tied(config: Config) -> str | None:
    return "jais_tied" if config.get("tie_word_embeddings", default=True) else None


def _jais(model_type: str, rules: tuple[Rule, ...], **more: Any) -> ArchSpec:
    return ArchSpec(
        "jais",
        ("JAISLMHeadModel",) if model_type == "jais" else (),
        model_type,
        (*rules, *_JAIS),
        (
            LAYERS,
            Key("context_length", "n_positions", needed=True),
            Key("embedding_length", "n_embd", needed=True),
            Key("feed_forward_length", "n_inner", needed=True),
            Key("attention.head_count", "n_head", needed=True),
            Key("attention.layer_norm_epsilon", "layer_norm_epsilon", needed=True),
            constant("attention.max_alibi_bias", 8.0),
        ),
        common=False,
        # Slopes of ALiBi, which are those of every model with as many heads.
        drops=(r"relative_pe\.slopes$", r"\.attn\.(masked_)?bias$"),
        scaled=True,
        fixed=(
            Fixed("activation_function", "swiglu", "computes swiglu in this architecture"),
            Fixed("position_embedding_type", "alibi", "has ALiBi in this architecture"),
            Fixed("scale_attn_weights", True, "scales the scores in this architecture"),
            Fixed("mup_scale_qk_dot_by_d", True, "divides the scores by the head size", default=True),
            Fixed("scale_qk_dot_by_d", True, "divides the scores by the head size", default=True),
            Fixed("scale_attn_by_inverse_layer_idx", False, "scales all layers alike"),
        ),
        back=_jais_back,
        **more,
    )


# ------------------------------------------------------------------ OpenELM


def _divisible(value: float, by: int) -> int:
    """The nearest multiple, and not more than a tenth below ``value``."""
    found = max(by, int(value + by / 2) // by * by)
    return found + by if found < 0.9 * value else found


def _openelm_widths(config: Config) -> list[int]:
    by, width = int(config.need("ffn_dim_divisor")), int(config.need("model_dim"))
    return [_divisible(float(one) * width, by) for one in config.need("ffn_multipliers")]


def _openelm_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    width = values["embedding_length"]
    return {
        "num_transformer_layers": values["block_count"],
        "model_dim": width,
        "max_context_length": values["context_length"],
        "num_query_heads": values["attention.head_count"],
        "num_kv_heads": values["attention.head_count_kv"],
        "ffn_multipliers": [one / width for one in values["feed_forward_length"]],
        "ffn_dim_divisor": 1,
        "rope_freq_constant": values.get("rope.freq_base", 10000.0),
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
        "tie_word_embeddings": True,
        "ffn_with_glu": True,
        "activation_fn_name": "swish",
        "rope_parameters": None,
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "intermediate_size", "num_hidden_layers")),
    }


# ------------------------------------------------------------------ PLaMo


def _plamo_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {"n_shared_head": values["attention.head_count"] // values["attention.head_count_kv"]}


def plamo_norms(*more: Rule) -> tuple[Rule, ...]:
    """Norms around mixer and feed-forward, stored without what is added to their weights."""
    return (
        rule("model.norm.weight", "output_norm.weight", ops=[Add(1.0)]),
        *tree(
            "model.layers.layers.{i}.",
            {
                "attn_norm.weight": "pre_mixer_norm.weight",
                "post_attention_norm": "post_mixer_norm.weight",
                "ffn_norm.weight": "pre_mlp_norm.weight",
                "post_ffw_norm": "post_mlp_norm.weight",
                "attn_q_norm.weight": "mixer.q_norm.weight",
                "attn_k_norm.weight": "mixer.k_norm.weight",
            },
            {
                "attn_norm.weight": [Add(1.0)],
                "post_attention_norm": [Add(1.0 / 5)],
                "ffn_norm.weight": [Add(1.0)],
                "post_ffw_norm": [Add(1.0 / 5**1.5)],
                "attn_q_norm.weight": [Add(1.0)],
                "attn_k_norm.weight": [Add(1.0)],
            },
        ),
        *more,
    )


def _plamo_window(config: Config) -> Any:
    return config.get("window_size", "sliding_window")


def _plamo3_check(config: Config) -> None:
    if float(config.get("rope_scaling_factor", default=1)) != 1:
        raise CheckpointError(
            f"{config.ref}: 'rope_scaling_factor' stretches the positions as yarn without rounded bounds, and llama.cpp "
            "rounds them",
            "run it with its own code",
        )


# ------------------------------------------------------------------ LLaDA


def _llada_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {
        "d_model": values["embedding_length"],
        "n_heads": values["attention.head_count"],
        "n_kv_heads": values["attention.head_count_kv"],
        "n_layers": values["block_count"],
        "mlp_hidden_size": values["feed_forward_length"],
        "max_sequence_length": values["context_length"],
        "rope_theta": values.get("rope.freq_base"),
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": "output.weight" not in base,
        "hidden_size": None,
    }


def _nanbeige_rules() -> tuple[Rule, ...]:
    return (*EMBEDDINGS, *NORMS, *attention(interleave=True), *MLP)


SPECS = (
    ArchSpec(
        "codeshell",
        ("CodeShellForCausalLM",),
        "codeshell",
        (
            rule("transformer.wte", "token_embd"),
            rule("transformer.ln_f", "output_norm"),
            rule("lm_head", "output"),
            *tree(
                "transformer.h.{i}.",
                {
                    "attn_norm": "ln_1",
                    "attn_qkv": "attn.c_attn",
                    "attn_output": "attn.c_proj",
                    "ffn_norm": "ln_2",
                    "ffn_up": "mlp.c_fc",
                    "ffn_down": "mlp.c_proj",
                },
            ),
        ),
        (
            Key("context_length", "n_positions", needed=True),
            Key("embedding_length", "n_embd", needed=True),
            Key(
                "feed_forward_length", lambda c: int(c.get("n_inner", default=4 * c.number("hidden"))), field="n_inner"
            ),
            LAYERS,
            Key("attention.head_count", "n_head", needed=True),
            Key("attention.head_count_kv", "num_query_groups", needed=True),
            Key("attention.layer_norm_epsilon", "layer_norm_epsilon", needed=True),
            constant("rope.freq_base", 10000.0),
            Key("rope.scaling.type", lambda c: None if _stretched(c) else "linear"),
            Key("rope.scaling.factor", lambda c: None if _stretched(c) else 1.0),
        ),
        common=False,
        own_output=True,
        drops=(r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$"),
        fixed=(
            _GELU,
            Fixed("group_query_attention", True, "has groups of query heads in this architecture"),
            Fixed("rope.rope_theta", 10000.0, "has a rotary base of 10000 in this architecture"),
            Fixed("position_embedding_type", "rope", "rotates positions in this architecture", default="rope"),
            Fixed("scale_attn_weights", True, "divides the scores by the root of the head size"),
        ),
        back=_codeshell_back,
    ),
    ArchSpec(
        "refact",
        ("GPTRefactForCausalLM",),
        "gpt_refact",
        (
            rule("transformer.wte", "token_embd"),
            rule("transformer.ln_f", "output_norm"),
            rule("lm_head.ln_f", "output_norm", writes=False),
            rule("ln_f", "output_norm", writes=False),
            rule("lm_head", "output"),
            *tree(
                "transformer.h.{i}.",
                {
                    "attn_norm": "ln_1",
                    "attn_q": "attn.q",
                    "attn_output": "attn.c_proj",
                    "ffn_norm": "ln_2",
                    "ffn_down": "mlp.c_proj",
                },
            ),
            rule("transformer.h.{i}.attn.kv", "blk.{i}.attn_k", "blk.{i}.attn_v", ops=[Split()]),
            rule("transformer.h.{i}.mlp.gate_up_proj", "blk.{i}.ffn_gate", "blk.{i}.ffn_up", ops=[Split()]),
        ),
        (
            Key("context_length", "n_positions", needed=True),
            Key("embedding_length", "n_embd", needed=True),
            Key("feed_forward_length", _refact_width),
            LAYERS,
            Key("attention.head_count", "n_head", needed=True),
            constant("attention.head_count_kv", 1),
            Key("attention.layer_norm_rms_epsilon", "layer_norm_epsilon", needed=True),
        ),
        common=False,
        fixed=(Fixed("multi_query", True, "has one key and value head in this architecture"),),
        back=lambda values, config, base: {
            "n_layer": values["block_count"],
            "multi_query": True,
            **dict.fromkeys(("num_key_value_heads", "num_hidden_layers", "intermediate_size")),
        },
    ),
    _jais(
        "jais",
        (
            rule("transformer.wte", "token_embd", ops=[_SCALE_IN]),
            rule("lm_head", "output", ops=[_SCALE_OUT]),
        ),
        variant=_jais_tied,
    ),
    _jais(
        "jais_tied",
        (
            rule(
                "transformer.wte.weight",
                "token_embd.weight",
                "output.weight",
                ops=[Copies(2), Each((_SCALE_IN, _SCALE_OUT))],
            ),
        ),
        when=lambda base: False,
        output_apart=True,
    ),
    ArchSpec(
        "openelm",
        ("OpenELMForCausalLM",),
        "openelm",
        (
            rule("transformer.token_embeddings", "token_embd"),
            rule("transformer.norm", "output_norm"),
            rule("lm_head", "output"),
            *tree(
                "transformer.layers.{i}.",
                {
                    "attn_norm": "attn_norm",
                    "attn_qkv": "attn.qkv_proj",
                    "attn_q_norm": "attn.q_norm",
                    "attn_k_norm": "attn.k_norm",
                    "attn_output": "attn.out_proj",
                    "ffn_norm": "ffn_norm",
                    "ffn_down": "ffn.proj_2",
                },
            ),
            rule("transformer.layers.{i}.ffn.proj_1", "blk.{i}.ffn_gate", "blk.{i}.ffn_up", ops=[Split()]),
        ),
        (
            Key("block_count", "num_transformer_layers", needed=True),
            Key("context_length", "max_context_length", needed=True),
            Key("embedding_length", "model_dim", needed=True),
            Key("feed_forward_length", _openelm_widths),
            Key("attention.head_count", "num_query_heads", needed=True),
            Key("attention.head_count_kv", "num_kv_heads", needed=True),
            Key("rope.freq_base", "rope_freq_constant", needed=True),
            constant("attention.layer_norm_rms_epsilon", 1e-6),
            Key("rope.dimension_count", "head_dim", needed=True),
            Key("attention.key_length", "head_dim", needed=True),
            Key("attention.value_length", "head_dim", needed=True),
        ),
        common=False,
        tied=True,
        fixed=(
            Fixed("normalize_qk_projections", True, "normalises queries and keys in this architecture"),
            Fixed("share_input_output_layers", True, "has one table for input and output"),
            Fixed("ffn_with_glu", True, "has a gate in this architecture"),
            Fixed("activation_fn_name", "silu", "computes silu in this architecture"),
            Fixed("normalization_layer_name", "rms_norm", "has RMS norms in this architecture"),
        ),
        back=_openelm_back,
    ),
    ArchSpec(
        "plm",
        ("PLMForCausalLM",),
        "plm",
        (
            *EMBEDDINGS,
            *NORMS,
            *blocks(
                attn_q="self_attn.q_proj",
                attn_kv_a_mqa="self_attn.kv_a_proj_with_mqa",
                attn_kv_a_norm="self_attn.kv_a_layernorm",
                attn_kv_b="self_attn.kv_b_proj",
                attn_output="self_attn.o_proj",
                ffn_up="mlp.up_proj",
                ffn_down="mlp.down_proj",
            ),
        ),
        (
            VOCAB_SIZE,
            Key("attention.kv_lora_rank", "kv_lora_rank", needed=True),
            Key(
                "attention.key_length",
                lambda c: c.number("qk_nope_head_dim") + c.number("qk_rope_head_dim"),
            ),
            Key("attention.value_length", "v_head_dim", needed=True),
            Key("rope.dimension_count", "qk_rope_head_dim", needed=True),
        ),
        tied=True,
        no_lora=("attn_q.weight", "attn_kv_a_mqa.weight", "attn_kv_b.weight"),
        fixed=(Fixed("hidden_act", "relu2", "computes relu2 in this architecture"), _NO_BIASES),
        back=lambda values, config, base: {
            "hidden_act": "relu2",
            "q_lora_rank": None,
            "qk_rope_head_dim": values["rope.dimension_count"],
            "qk_nope_head_dim": values["attention.key_length"] - values["rope.dimension_count"],
            "tie_word_embeddings": True,
            "head_dim": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": values.get("rope.freq_base", 10000.0)},
        },
    ),
    ArchSpec(
        "plamo",
        ("PlamoForCausalLM",),
        "plamo",
        (
            *EMBEDDINGS,
            *tree(
                "model.layers.layers.{i}.",
                {
                    "attn_norm": "norm",
                    "attn_q": "self_attn.q_proj",
                    "attn_k": "self_attn.k_proj",
                    "attn_v": "self_attn.v_proj",
                    "attn_output": "self_attn.o_proj",
                    "ffn_gate": "mlp.gate_proj",
                    "ffn_up": "mlp.up_proj",
                    "ffn_down": "mlp.down_proj",
                },
                # Query heads h, h + g, h + 2 g, ... share a key head of g; ggml has those of one key head in a row.
                {
                    "attn_q": [Tile("n_shared_head", "heads", "head_dim")],
                    "attn_output": [Tile("n_shared_head", "heads", "head_dim", columns=True)],
                },
            ),
        ),
        (
            # Its config says neither; both are those of its code.
            Key("context_length", lambda c: c.get("max_position_embeddings", default=4096)),
            Key("embedding_length", "hidden_size", needed=True),
            Key("feed_forward_length", "intermediate_size", needed=True),
            LAYERS,
            Key("attention.head_count", "num_attention_heads", needed=True),
            Key("attention.head_count_kv", lambda c: c.number("heads") // max(c.number("n_shared_head"), 1)),
            Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", needed=True),
        ),
        common=False,
        own_output=True,
        drops=(r"rotary_emb\.inv_freq$",),
        fixed=(SILU,),
        back=_plamo_back,
    ),
    ArchSpec(
        "plamo3",
        ("Plamo3ForCausalLM", "PLaMo3ForCausalLM"),
        "plamo3",
        (
            rule("model.embed_tokens", "token_embd"),
            rule("lm_head", "output"),
            *plamo_norms(),
            *tree(
                "model.layers.layers.{i}.",
                {
                    "attn_qkv": "mixer.qkv_proj",
                    "attn_output": "mixer.o_proj",
                    "ffn_up": "mlp.gate_up_proj",
                    "ffn_down": "mlp.down_proj",
                },
            ),
        ),
        (
            VOCAB_SIZE,
            Key("attention.sliding_window", _plamo_window, field="window_size"),
            Key(
                "attention.sliding_window_pattern",
                lambda c: c.get("sliding_window_pattern") if _plamo_window(c) is not None else None,
                field="sliding_window_pattern",
            ),
        ),
        uneven=True,
        check=_plamo3_check,
        fixed=(SILU,),
    ),
    ArchSpec(
        "maincoder",
        ("MaincoderForCausalLM",),
        "maincoder",
        (*EMBEDDINGS, *NORMS, *attention(), *QK_NORMS, *MLP),
        (Key("rope.dimension_count", "head_dim"),),
        fixed=(
            SILU,
            _NO_BIASES,
            Fixed("use_qk_norm", True, "normalises queries and keys in this architecture"),
        ),
    ),
    ArchSpec(
        "nanbeige",
        ("NanbeigeForCausalLM",),
        "nanbeige",
        _nanbeige_rules(),
        (
            VOCAB_SIZE,
            ROPE_DIM,
            Key("num_loops", lambda c: max(int(c.get("num_loops", default=1) or 1), 1), field="num_loops"),
            Key(
                "skip_loop_final_norm",
                lambda c: bool(c.get("skip_loop_final_norm", default=False)),
                field="skip_loop_final_norm",
            ),
        ),
        factors=(LLAMA3,),
        fixed=(SILU,),
    ),
    ArchSpec(
        "llada",
        ("LLaDAModelLM",),
        "llada",
        (
            rule("model.transformer.wte", "token_embd"),
            rule("model.transformer.ln_f", "output_norm"),
            rule("model.transformer.ff_out", "output"),
            *tree(
                "model.transformer.blocks.{i}.",
                {
                    "attn_norm": "attn_norm",
                    "attn_q": "q_proj",
                    "attn_k": "k_proj",
                    "attn_v": "v_proj",
                    "attn_output": "attn_out",
                    "ffn_norm": "ff_norm",
                    "ffn_gate": "ff_proj",
                    "ffn_up": "up_proj",
                    "ffn_down": "ff_out",
                },
                {"attn_q": [Interleave("heads")], "attn_k": [Interleave("kv_heads")]},
            ),
        ),
        (
            VOCAB_SIZE,
            ROPE_DIM,
            Key("context_length", "max_sequence_length", 4096),
            Key("embedding_length", "d_model", needed=True),
            Key("feed_forward_length", "mlp_hidden_size", needed=True),
            Key("attention.head_count", "heads", field="n_heads"),
            Key("attention.head_count_kv", lambda c: c.number("kv_heads"), field="n_kv_heads"),
            constant("attention.causal", False),
            constant("diffusion.shift_logits", False),
        ),
        fixed=(
            Fixed("activation_type", "silu", "computes silu in this architecture"),
            Fixed("block_type", "llama", "has the layers of a Llama in this architecture"),
            Fixed("layer_norm_type", "rms", "has RMS norms in this architecture"),
            Fixed("attention_layer_norm", False, "has no norms of queries and keys in this architecture"),
            Fixed("alibi", False, "rotates positions in this architecture"),
            Fixed("rope", True, "rotates positions in this architecture"),
            Fixed("include_bias", False, "has no biases in this architecture"),
            Fixed("include_qkv_bias", False, "has no biases in this architecture"),
            Fixed("input_emb_norm", False, "has no norm of the embeddings in this architecture"),
            Fixed("scale_logits", False, "takes the logits as they are"),
        ),
        back=_llada_back,
    ),
    ArchSpec(
        "spark2_5",
        ("Spark2_5ForCausalLM",),
        "spark2_5",
        (
            *EMBEDDINGS,
            *NORMS,
            *MLP,
            block("self_attn.q_k_v_proj", "attn_qkv"),
            block("self_attn.g_proj", "attn_gate"),
            block("self_attn.o_proj", "attn_output"),
        ),
        (
            VOCAB_SIZE,
            Key("attention.sliding_window", "sliding_window", needed=True),
            Key("attention.sliding_window_pattern", window_pattern),
            Key("rope.dimension_count", lambda c: _spark_rope(c, "full_attention")),
            Key("rope.dimension_count_swa", lambda c: _spark_rope(c, "sliding_attention")),
        ),
        fixed=(
            Fixed("hidden_act", "gelu", "computes gelu in this architecture"),
            Fixed("gate_attn_act_mode", "sigmoid", "has sigmoid gates in this architecture"),
            Fixed("headwise_attn_output_gate", True, "has one gate per head in this architecture", default=False),
        ),
        back=lambda values, config, base: _spark_back(values, config),
    ),
)


def _spark_rope(config: Config, kind: str) -> int:
    rope = config.rope_by_kind.get(kind)
    share = rope.get("partial_rotary_factor", 1.0) if isinstance(rope, dict) else 1.0
    return int(config.number("head_dim") * float(share))


def _spark_back(values: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    size = values["attention.key_length"]
    rope = config.get("rope_parameters", {})
    full = rope.get("full_attention", rope)
    local = rope.get("sliding_attention", {"rope_type": "default", "rope_theta": full.get("rope_theta", 10000.0)})
    pattern = values["attention.sliding_window_pattern"]
    return {
        "layer_types": ["sliding_attention" if one else "full_attention" for one in pattern],
        "gate_attn_act_mode": "sigmoid",
        "headwise_attn_output_gate": True,
        "hidden_act": "gelu",
        "rope_parameters": {
            "full_attention": {**full, "partial_rotary_factor": values["rope.dimension_count"] / size},
            "sliding_attention": {**local, "partial_rotary_factor": values["rope.dimension_count_swa"] / size},
        },
    }
