"""Rows: encoders with code in their own repository (Nomic BERT, Jina BERT 2, NeoBERT), and decoders that see both ways."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.gguf.arch import dense, encoders, hybrid
from adapterkit.gguf.arch.builtin import Fixed
from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.fields import MORE
from adapterkit.gguf.arch.ops import ByHead, Turn, Unjoin
from adapterkit.gguf.arch.pooling import POOLING, pooling
from adapterkit.gguf.arch.shared import constant
from adapterkit.gguf.arch.spec import ArchSpec, Key, rule, tree

if TYPE_CHECKING:
    from collections.abc import Mapping

CAUSAL = constant("attention.causal", False)
LABELS = encoders.LABELS
POOLED = Key("pooling_type", pooling)
_BERT_NEEDS = ("token_embd.weight", "token_embd_norm.weight")


# ------------------------------------------------------------------ Nomic


def _nomic_context(config: Config) -> int:
    """What it was trained for, where its config says what its code could stretch that to."""
    trained, said = config.get("max_trained_positions"), config.number("context")
    if trained is None or said > int(trained):
        return min(said, int(trained or 2048)) if "n_positions" in config.text else said
    return 512 if said == 2048 and _nomic_moe(config) else said


def _nomic_moe(config: Config) -> bool:
    return bool(config.get("moe_every_n_layers"))


def _nomic_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "rope_parameters": {"rope_type": "default", "rope_theta": values.get("rope.freq_base", 1000.0)},
        "hidden_act": "silu",
        "is_causal": None,
    }
    if not isinstance(config.get("pad_token_id"), int):
        found["pad_token_id"] = 0  # transformers' config wants one
    types = base.get("token_types.weight")
    if types is not None:
        found["type_vocab_size"] = types.shape[0]
    return found


def _nomic_moe_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {
        **_nomic_back(values, config, base),
        "hidden_act": None,
        "activation_function": "gelu",
        "moe_every_n_layers": values["moe_every_n_layers"],
        "moe_top_k": values["expert_used_count"],
        "num_experts": values["expert_count"],
        "num_experts_per_tok": None,
        **dict.fromkeys(("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"), True),
    }


_NOMIC = (
    rule("embeddings.word_embeddings", "token_embd"),
    rule("embeddings.token_type_embeddings", "token_types"),
    rule("emb_ln", "token_embd_norm"),
    *tree(
        "encoder.layers.{i}.",
        {
            "attn_qkv": "attn.Wqkv",
            "attn_output": "attn.out_proj",
            "attn_output_norm": "norm1",
            "layer_output_norm": "norm2",
            "ffn_down": "mlp.fc2",
        },
    ),
)
_NOMIC_FIXED = (
    Fixed("causal", False, "lets every token see all others in this architecture"),
    Fixed("prenorm", False, "has its norms after each part of a layer", default=False),
    Fixed("rotary_emb_fraction", 1.0, "rotates all of a head in this architecture"),
    Fixed("rotary_emb_interleaved", False, "rotates the halves of a head in this architecture"),
)
_NOMIC_KEYS = (
    Key("context_length", _nomic_context),
    Key("rope.freq_base", lambda c: float(c.rope.get("rope_theta", 1000.0))),
    CAUSAL,
    POOLED,
)
_NOMIC_DROPS = (r"^cls\.", r"^(nomic_bert\.)?pooler\.", r"position_ids$")


# ------------------------------------------------------------------ Jina


_JINA = (
    rule("embeddings.word_embeddings", "token_embd"),
    rule("embeddings.token_type_embeddings", "token_types"),
    rule("embeddings.LayerNorm", "token_embd_norm"),
    *tree(
        "encoder.layer.{i}.",
        {
            "attn_q": "attention.self.query",
            "attn_k": "attention.self.key",
            "attn_v": "attention.self.value",
            "attn_q_norm": "attention.self.layer_norm_q",
            "attn_k_norm": "attention.self.layer_norm_k",
            "attn_output": "attention.output.dense",
            "attn_output_norm": "attention.output.LayerNorm",
            "attn_norm_2": "layer_norm_1",
        },
    ),
)
_JINA_FIXED = (
    Fixed("position_embedding_type", "alibi", "has ALiBi in this architecture", default="absolute"),
    Fixed("feed_forward_type", "geglu", "has gates of gelu in this architecture", default="original"),
)


def _jina_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {
        "position_embedding_type": "alibi",
        "feed_forward_type": "geglu",
        "type_vocab_size": base["token_types.weight"].shape[0],
        "is_causal": None,
    }


# ------------------------------------------------------------------ NeoBERT


def _neo_width(config: Config) -> int:
    """Two thirds of what the config says, up to a multiple of 8."""
    return -(-int(2 * config.number("intermediate_size") / 3) // 8) * 8


def _neo_back(values: Mapping[str, Any], config: Mapping[str, Any], base: Any) -> dict[str, Any]:
    return {"intermediate_size": -(-3 * values["feed_forward_length"] // 2), "hidden_act": "swiglu", "is_causal": None}


_NEO = (
    rule("encoder", "token_embd"),
    rule("layer_norm", "enc.output_norm"),
    *tree(
        "transformer_encoder.{i}.",
        {
            "attn_norm": "attention_norm",
            # Its code has the query, key and value of each head after the other; llama.cpp's own converter
            # leaves them so, and its runtime takes all queries first.
            "attn_qkv": "qkv",
            "attn_output": "wo",
            "ffn_norm": "ffn_norm",
            "ffn_up": "ffn.w12",
            "ffn_down": "ffn.w3",
        },
        {"attn_qkv": [ByHead("heads")]},
    ),
)
_NEO_KEYS = (
    CAUSAL,
    Key("feed_forward_length", _neo_width),
    constant("rope.freq_base", 10000.0),
    constant("rope.scaling.type", "none"),
    Key("attention.layer_norm_rms_epsilon", "norm_eps", 1e-6),
    Key("pooling_type", lambda c: pooling(c) or POOLING["cls"]),
)
_NEO_FIXED = (
    Fixed("hidden_act", "swiglu", "computes swiglu in this architecture", default="swiglu"),
    Fixed("rms_norm", True, "has RMS norms in this architecture"),
    Fixed("rope", True, "rotates positions in this architecture"),
)


def _both_ways(row: ArchSpec, **more: Any) -> ArchSpec:
    """A decoder whose tokens see all others."""
    return replace(row, keys=(*row.keys, CAUSAL, POOLED), variant=None, encoder=True, types=(), **more)


_LLAMA = next(one for one in dense.SPECS if one.model_type == "llama")
_LFM2 = next(one for one in hybrid.SPECS if one.model_type == "lfm2")


def _seen(arch: str) -> Any:
    return lambda base: base.header.get(f"{arch}.attention.causal") is False


SPECS = (
    ArchSpec(
        "nomic-bert",
        ("NomicBertModel",),
        "nomic_bert",
        (*_NOMIC, *tree("encoder.layers.{i}.", {"ffn_up": "mlp.fc11", "ffn_gate": "mlp.fc12"})),
        _NOMIC_KEYS,
        prefixes=("nomic_bert.",),
        drops=_NOMIC_DROPS,
        variant=lambda c: "nomic_bert_moe" if _nomic_moe(c) else None,
        needs=_BERT_NEEDS,
        leave=("attention.key_length", "attention.value_length"),
        fixed=(
            *_NOMIC_FIXED,
            Fixed("activation_function", "swiglu", "computes swiglu in this architecture"),
            Fixed("hidden_act", "silu", "computes silu in this architecture"),
            Fixed(
                "head_dim",
                lambda c: c.number("hidden") // c.number("heads"),
                "has heads of hidden_size / num_attention_heads in this architecture",
            ),
        ),
        encoder=True,
        back=_nomic_back,
    ),
    ArchSpec(
        "nomic-bert-moe",
        (),
        "nomic_bert_moe",
        (
            *_NOMIC,
            *tree("encoder.layers.{i}.", {"ffn_up": "mlp.fc1", "ffn_gate_inp": "mlp.router.layer"}),
            rule("encoder.layers.{i}.mlp.experts.mlp.w1", "blk.{i}.ffn_up_exps.weight", ops=[Unjoin("num_experts")]),
            rule(
                "encoder.layers.{i}.mlp.experts.mlp.w2",
                "blk.{i}.ffn_down_exps.weight",
                ops=[Unjoin("num_experts"), Turn()],
            ),
        ),
        (
            *_NOMIC_KEYS,
            Key("moe_every_n_layers", "moe_every_n_layers", needed=True),
            Key("expert_used_count", "moe_top_k", needed=True),
        ),
        prefixes=("nomic_bert.",),
        # A bias that its code adds nowhere.
        drops=(*_NOMIC_DROPS, r"mlp\.experts\.bias$"),
        needs=_BERT_NEEDS,
        uneven=True,
        fixed=(
            *_NOMIC_FIXED,
            Fixed("activation_function", "gelu", "computes gelu in this architecture"),
            Fixed("moe_normalize_expert_weights", False, "takes the weights of the chosen experts as they are"),
        ),
        encoder=True,
        defaults={"model_type": "nomic_bert", "architectures": ["NomicBertModel"]},
        back=_nomic_moe_back,
    ),
    ArchSpec(
        "jina-bert-v2",
        ("JinaBertModel", "JinaBertForMaskedLM"),
        "jina_bert",
        (
            *_JINA,
            *tree(
                "encoder.layer.{i}.",
                {"ffn_up": "mlp.gated_layers", "ffn_down": "mlp.wo", "layer_output_norm": "mlp.layernorm"},
            ),
        ),
        (CAUSAL, POOLED),
        prefixes=("bert.",),
        drops=(r"^cls\.", r"^(bert\.)?pooler\.", r"position_ids$"),
        needs=_BERT_NEEDS,
        variant=lambda c: "jina_bert_code" if "qk-post-norm" in str(c.get("auto_map", default="")) else None,
        when=lambda base: "blk.0.attn_norm_2.weight" not in base,
        fixed=_JINA_FIXED,
        types=("bert",),
        encoder=True,
        back=_jina_back,
    ),
    # The embedders of code: norms of queries and keys, and a second norm after attention.
    ArchSpec(
        "jina-bert-v2",
        (),
        "jina_bert_code",
        (
            *_JINA,
            *tree(
                "encoder.layer.{i}.",
                {"ffn_up": "mlp.up_gated_layer", "ffn_down": "mlp.down_layer", "layer_output_norm": "layer_norm_2"},
            ),
        ),
        (CAUSAL, POOLED),
        prefixes=("bert.",),
        drops=(r"^cls\.", r"^(bert\.)?pooler\.", r"position_ids$"),
        needs=_BERT_NEEDS,
        when=lambda base: "blk.0.attn_norm_2.weight" in base,
        fixed=_JINA_FIXED,
        encoder=True,
        defaults={
            "model_type": "jina_bert",
            "architectures": ["JinaBertModel"],
            "auto_map": {"AutoModel": "jinaai/jina-bert-v2-qk-post-norm--modeling_bert.JinaBertModel"},
        },
        back=_jina_back,
    ),
    ArchSpec(
        "neo-bert",
        ("NeoBERT", "NeoBERTLMHead"),
        "neobert",
        _NEO,
        _NEO_KEYS,
        prefixes=("model.",),
        root="model.",
        drops=(r"^decoder\.", r"freqs_cis$"),
        needs=("token_embd.weight", "enc.output_norm.weight"),
        fixed=_NEO_FIXED,
        encoder=True,
        back=_neo_back,
    ),
    ArchSpec(
        "neo-bert",
        ("NeoBERTForSequenceClassification",),
        "neobert_classifier",
        (*_NEO, rule("dense", "cls"), rule("classifier", "cls.output")),
        (*_NEO_KEYS, LABELS),
        prefixes=("model.",),
        root="model.",
        drops=(r"freqs_cis$",),
        needs=("token_embd.weight", "enc.output_norm.weight", "cls.weight", "cls.output.weight"),
        when=lambda base: "cls.output.weight" in base,
        fixed=_NEO_FIXED,
        encoder=True,
        defaults={"model_type": "neobert"},
        back=_neo_back,
    ),
    _both_ways(
        replace(_LLAMA, arch="llama-embed", classes=("LlamaBidirectionalModel",), model_type="llama_bidirec"),
        prefixes=(),
        drops=(r"^lm_head\.",),
    ),
    _both_ways(
        replace(_LFM2, classes=("Lfm2BidirectionalModel",), model_type="lfm2_bidirectional"),
        when=_seen("lfm2"),
        drops=(r"^lm_head\.",),
        back=MORE["lfm2"],
    ),
)
