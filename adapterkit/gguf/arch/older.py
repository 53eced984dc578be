"""Rows: decoders with module trees of their own (GPT-2, GPT-NeoX, Falcon, BLOOM, MPT, StarCoder)."""

from __future__ import annotations

from typing import Any

from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.ops import ByGroup, ByHead, Turn
from adapterkit.gguf.arch.shared import FEED_FORWARD, constant
from adapterkit.gguf.arch.spec import ArchSpec, Key, Rule, rule

_LAYERS = Key("block_count", lambda c: c.number("layers"))


def _tree(layer: str, names: dict[str, str], ops: dict[str, Any] | None = None) -> tuple[Rule, ...]:
    """Rules of one layer, by the root of its names."""
    return tuple(rule(f"{layer}{hf}", f"blk.{{i}}.{gguf}", ops=(ops or {}).get(gguf, ())) for gguf, hf in names.items())


def _alibi(config: Config) -> float:
    attention = config.get("attn_config", default={})
    return float(attention.get("alibi_bias_max", 8)) if attention.get("alibi", True) else 0.0


def _mpt(name: str) -> Any:
    def find(config: Config) -> Any:
        attention = config.get("attn_config", default={})
        return attention.get(name)

    return find


def _neox_rope(config: Config) -> int:
    share = config.rope.get("partial_rotary_factor", config.get("rotary_pct", default=0.25))
    return int(float(share) * (config.number("hidden") // config.number("heads")))


_FALCON = (
    rule("word_embeddings", "token_embd"),
    rule("ln_f", "output_norm"),
    rule("lm_head", "output"),
    *_tree(
        "h.{i}.",
        {
            "attn_qkv": "self_attention.query_key_value",
            "attn_output": "self_attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        {"attn_qkv": (ByGroup("heads", "falcon_kv"),)},
    ),
)
_FALCON_KEYS = (
    constant("context_length", 2048),
    constant("tensor_data_layout", "jploski"),
    Key("embedding_length", "hidden_size", needed=True),
    FEED_FORWARD,
    _LAYERS,
    Key("attention.head_count", "heads", field="num_attention_heads"),
    Key("attention.head_count_kv", lambda c: c.number("falcon_kv")),
    Key("attention.layer_norm_epsilon", "layer_norm_epsilon", needed=True),
)

SPECS = (
    ArchSpec(
        "gpt2",
        ("GPT2LMHeadModel", "GPT2Model"),
        "gpt2",
        (
            rule("wte", "token_embd"),
            rule("wpe", "position_embd"),
            rule("ln_f", "output_norm"),
            rule("lm_head", "output"),
            *_tree(
                "h.{i}.",
                {
                    "attn_norm": "ln_1",
                    "attn_qkv": "attn.c_attn",
                    "attn_output": "attn.c_proj",
                    "ffn_norm": "ln_2",
                    "ffn_up": "mlp.c_fc",
                    "ffn_down": "mlp.c_proj",
                },
                dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), (Turn(),)),
            ),
        ),
        (
            _LAYERS,
            Key("context_length", ("n_ctx", "n_positions", "max_position_embeddings"), field="n_positions"),
            Key("embedding_length", "n_embd", needed=True),
            FEED_FORWARD,
            Key("attention.head_count", "n_head", needed=True),
            Key("attention.layer_norm_epsilon", "layer_norm_epsilon", needed=True),
        ),
        common=False,
        prefixes=("transformer.",),
        root="transformer.",
        drops=(r"(^|\.)attn\.(masked_)?bias$",),
    ),
    ArchSpec(
        "starcoder",
        ("GPTBigCodeForCausalLM",),
        "gpt_bigcode",
        (
            rule("wte", "token_embd"),
            rule("wpe", "position_embd"),
            rule("ln_f", "output_norm"),
            rule("lm_head", "output"),
            *_tree(
                "h.{i}.",
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
            FEED_FORWARD,
            _LAYERS,
            Key("attention.head_count", "n_head", needed=True),
            Key("attention.head_count_kv", lambda c: 1 if c.get("multi_query", default=True) else c.number("heads")),
            Key("attention.layer_norm_epsilon", "layer_norm_epsilon", needed=True),
        ),
        common=False,
        prefixes=("transformer.",),
        root="transformer.",
        drops=(r"(^|\.)attn\.(masked_)?bias$",),
    ),
    ArchSpec(
        "gptneox",
        ("GPTNeoXForCausalLM",),
        "gpt_neox",
        (
            rule("embed_in", "token_embd"),
            rule("final_layer_norm", "output_norm"),
            rule("embed_out", "output"),
            *_tree(
                "layers.{i}.",
                {
                    "attn_norm": "input_layernorm",
                    "ffn_norm": "post_attention_layernorm",
                    "attn_qkv": "attention.query_key_value",
                    "attn_output": "attention.dense",
                    "ffn_up": "mlp.dense_h_to_4h",
                    "ffn_down": "mlp.dense_4h_to_h",
                },
                {"attn_qkv": (ByHead("heads"),)},
            ),
        ),
        (
            Key("context_length", "max_position_embeddings", needed=True),
            Key("embedding_length", "hidden_size", needed=True),
            _LAYERS,
            Key("feed_forward_length", "intermediate_size", needed=True),
            Key("rope.dimension_count", _neox_rope),
            Key("attention.head_count", "num_attention_heads", needed=True),
            Key("use_parallel_residual", "use_parallel_residual", True),
            Key("attention.layer_norm_epsilon", "layer_norm_eps", needed=True),
            Key("rope.freq_base", lambda c: c.rope.get("rope_theta")),
        ),
        common=False,
        prefixes=("gpt_neox.",),
        root="gpt_neox.",
        own_output=True,
    ),
    ArchSpec(
        "bloom",
        ("BloomForCausalLM", "BloomModel"),
        "bloom",
        (
            rule("word_embeddings", "token_embd"),
            rule("word_embeddings_layernorm", "token_embd_norm"),
            rule("ln_f", "output_norm"),
            rule("lm_head", "output"),
            *_tree(
                "h.{i}.",
                {
                    "attn_norm": "input_layernorm",
                    "ffn_norm": "post_attention_layernorm",
                    "attn_qkv": "self_attention.query_key_value",
                    "attn_output": "self_attention.dense",
                    "ffn_up": "mlp.dense_h_to_4h",
                    "ffn_down": "mlp.dense_4h_to_h",
                },
                {"attn_qkv": (ByHead("heads"),)},
            ),
        ),
        (
            Key("context_length", lambda c: c.get("seq_length", default=c.number("hidden"))),
            Key("embedding_length", "hidden", field="hidden_size"),
            Key("feed_forward_length", lambda c: 4 * c.number("hidden")),
            _LAYERS,
            Key("attention.head_count", "heads", field="n_head"),
            Key("attention.head_count_kv", lambda c: c.number("heads")),
            Key("attention.layer_norm_epsilon", "layer_norm_epsilon", needed=True),
        ),
        common=False,
        prefixes=("transformer.",),
        root="transformer.",
    ),
    ArchSpec(
        "falcon",
        ("FalconForCausalLM", "RWForCausalLM"),
        "falcon",
        (
            *_FALCON,
            rule("h.{i}.input_layernorm", "blk.{i}.attn_norm"),
            rule("h.{i}.ln_attn", "blk.{i}.attn_norm_2", writes=False),
            rule("h.{i}.ln_mlp", "blk.{i}.attn_norm", writes=False),
        ),
        _FALCON_KEYS,
        common=False,
        prefixes=("transformer.",),
        root="transformer.",
    ),
    ArchSpec(
        "falcon",
        (),
        "falcon_two_norms",
        (
            *_FALCON,
            rule("h.{i}.ln_attn", "blk.{i}.attn_norm_2"),
            rule("h.{i}.ln_mlp", "blk.{i}.attn_norm"),
        ),
        _FALCON_KEYS,
        common=False,
        prefixes=("transformer.",),
        root="transformer.",
        when=lambda base: "blk.0.attn_norm_2.weight" in base,
        defaults={"model_type": "falcon", "architectures": ["FalconForCausalLM"]},
    ),
    ArchSpec(
        "mpt",
        ("MptForCausalLM", "MPTForCausalLM"),
        "mpt",
        (
            rule("wte", "token_embd"),
            rule("norm_f", "output_norm"),
            rule("lm_head", "output"),
            *_tree(
                "blocks.{i}.",
                {
                    "attn_norm": "norm_1",
                    "ffn_norm": "norm_2",
                    "attn_qkv": "attn.Wqkv",
                    "attn_output": "attn.out_proj",
                    "ffn_up": "ffn.up_proj",
                    "ffn_down": "ffn.down_proj",
                },
            ),
        ),
        (
            Key("context_length", "max_seq_len", needed=True),
            Key("embedding_length", "d_model", needed=True),
            _LAYERS,
            Key("feed_forward_length", lambda c: int(c.get("expansion_ratio", default=4)) * c.number("hidden")),
            Key("attention.head_count", "n_heads", needed=True),
            Key("attention.head_count_kv", _mpt("kv_n_heads")),
            constant("attention.layer_norm_epsilon", 1e-5),
            Key("attention.clamp_kqv", _mpt("clip_qkv")),
            Key("attention.max_alibi_bias", _alibi),
        ),
        common=False,
        prefixes=("transformer.",),
        root="transformer.",
    ),
)
