"""Rows: encoders, whose hidden states are pooled to embeddings."""

from __future__ import annotations

from typing import Any

from adapterkit.gguf.arch.config import Config
from adapterkit.gguf.arch.ops import Cut
from adapterkit.gguf.arch.pooling import POOLING, is_classifier, labels, pooling
from adapterkit.gguf.arch.shared import (
    EMBEDDINGS,
    MLP,
    NO_SCALING,
    NORMS,
    VOCAB_SIZE,
    attention,
    constant,
    window_pattern,
)
from adapterkit.gguf.arch.spec import ArchSpec, Key, Rule, rule


def _tree(layer: str, names: dict[str, str]) -> tuple[Rule, ...]:
    return tuple(rule(f"{layer}{hf}", f"blk.{{i}}.{gguf}") for gguf, hf in names.items())


def _older_norms(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Norms as TensorFlow called their weights."""
    found = []
    for one in rules:
        if one.hf.endswith("LayerNorm"):
            for old, new in (("gamma", "weight"), ("beta", "bias")):
                found.append(Rule(f"{one.hf}.{old}", (f"{one.gguf[0]}.{new}",), (), False))
    return (*rules, *found)


_BERT_LAYERS = _tree(
    "encoder.layer.{i}.",
    {
        "attn_q": "attention.self.query",
        "attn_k": "attention.self.key",
        "attn_v": "attention.self.value",
        "attn_output": "attention.output.dense",
        "attn_output_norm": "attention.output.LayerNorm",
        "ffn_up": "intermediate.dense",
        "ffn_down": "output.dense",
        "layer_output_norm": "output.LayerNorm",
    },
)
_BERT_EMBEDDINGS = (
    rule("embeddings.word_embeddings", "token_embd"),
    rule("embeddings.token_type_embeddings", "token_types"),
    rule("embeddings.LayerNorm", "token_embd_norm"),
)
_CAUSAL = constant("attention.causal", False)
_POOLING = Key("pooling_type", pooling)
_BERT_DROPS = (
    r"^cls\.(predictions|seq_relationship)",
    r"^(bert\.|roberta\.)?pooler\.",
    r"^lm_head\.",
    r"position_ids$",
)
LABELS = Key(
    "classifier.output_labels",
    lambda c: labels(c) if is_classifier(c) else None,
)
_BERT = _older_norms((*_BERT_EMBEDDINGS, rule("embeddings.position_embeddings", "position_embd"), *_BERT_LAYERS))


def _positions(config: Config) -> int:
    return config.number("context") - config.number("position_offset")


def _modernbert_pattern(config: Config) -> Any:
    """Every so many-th layer sees all, from the first on; or which layers have a window, where it is not that."""
    found, every = window_pattern(config), config.get("global_attn_every_n_layers")
    if found is None or (every and found == [i % int(every) != 0 for i in range(config.number("layers"))]):
        return every
    return found


_T5 = _tree(
    "encoder.block.{i}.",
    {
        "attn_q": "layer.0.SelfAttention.q",
        "attn_k": "layer.0.SelfAttention.k",
        "attn_v": "layer.0.SelfAttention.v",
        "attn_o": "layer.0.SelfAttention.o",
        "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
        "attn_norm": "layer.0.layer_norm",
        "ffn_gate": "layer.1.DenseReluDense.wi_0",
        "ffn_up": "layer.1.DenseReluDense.wi",
        "ffn_down": "layer.1.DenseReluDense.wo",
        "ffn_norm": "layer.1.layer_norm",
    },
)


def _t5_rules() -> tuple[Rule, ...]:
    found = [Rule(one.hf, tuple(name.replace("blk.", "enc.blk.") for name in one.gguf)) for one in _T5]
    found.append(rule("encoder.block.{i}.layer.1.DenseReluDense.wi_1", "enc.blk.{i}.ffn_up", writes=False))
    return (
        rule("shared", "token_embd"),
        rule("encoder.final_layer_norm", "enc.output_norm"),
        *found,
    )


_MODERN = (
    rule("embeddings.tok_embeddings", "token_embd"),
    rule("embeddings.norm", "token_embd_norm"),
    rule("final_norm", "output_norm"),
    *_tree(
        "layers.{i}.",
        {
            "attn_norm": "attn_norm",
            "attn_qkv": "attn.Wqkv",
            "attn_output": "attn.Wo",
            "ffn_norm": "mlp_norm",
            "ffn_up": "mlp.Wi",
            "ffn_down": "mlp.Wo",
        },
    ),
)
_MODERN_KEYS = (
    Key("attention.layer_norm_epsilon", "norm_eps", 1e-5),
    _CAUSAL,
    _POOLING,
    Key("attention.sliding_window", "local_attention", needed=True),
    Key("attention.sliding_window_pattern", _modernbert_pattern, field="global_attn_every_n_layers"),
    NO_SCALING,
    VOCAB_SIZE,
    Key("hidden_activation", "hidden_activation"),
    Key(
        "classifier.pooling_type",
        lambda c: POOLING.get(c.get("classifier_pooling")),
        field="classifier_pooling",
    ),
)

SPECS = (
    ArchSpec(
        "bert",
        ("BertModel", "BertForMaskedLM", "CamembertModel"),
        "bert",
        _BERT,
        (_CAUSAL, _POOLING, LABELS),
        prefixes=("bert.",),
        drops=_BERT_DROPS,
        needs=("token_embd.weight", "position_embd.weight"),
        encoder=True,
    ),
    # The runtime computes cls.output(tanh(cls(x))), which is what the pooler and the classifier do. llama.cpp's own
    # converter drops the pooler.
    ArchSpec(
        "bert",
        ("BertForSequenceClassification",),
        "bert_classifier",
        (*_BERT, rule("pooler.dense", "cls"), rule("classifier", "cls.output")),
        (_CAUSAL, _POOLING, LABELS),
        prefixes=("bert.",),
        drops=tuple(one for one in _BERT_DROPS if "pooler" not in one),
        when=lambda base: "cls.output.weight" in base and base.header.get("tokenizer.ggml.model") == "bert",
        needs=("token_embd.weight", "position_embd.weight", "cls.weight", "cls.output.weight"),
        defaults={"model_type": "bert"},
        encoder=True,
        note="llama.cpp gives every token the type of a first text, so scores of pairs differ where that of the second "
        "counts (token_type_ids)",
    ),
    ArchSpec(
        "bert",
        ("RobertaModel", "RobertaForSequenceClassification", "XLMRobertaModel", "XLMRobertaForSequenceClassification"),
        "roberta",
        _older_norms(
            (
                *_BERT_EMBEDDINGS,
                rule("embeddings.position_embeddings", "position_embd", ops=[Cut("position_offset")]),
                *_BERT_LAYERS,
                rule("classifier.dense", "cls"),
                rule("classifier.out_proj", "cls.output"),
            )
        ),
        (Key("context_length", _positions), _CAUSAL, _POOLING, LABELS),
        prefixes=("roberta.",),
        drops=_BERT_DROPS,
        types=("xlm-roberta",),
        when=lambda base: base.header.get("tokenizer.ggml.model") in ("gpt2", "t5"),
        needs=("token_embd.weight", "position_embd.weight"),
        encoder=True,
    ),
    ArchSpec(
        "bert",
        ("DistilBertModel", "DistilBertForMaskedLM"),
        "distilbert",
        (
            rule("embeddings.word_embeddings", "token_embd"),
            rule("embeddings.LayerNorm", "token_embd_norm"),
            rule("embeddings.position_embeddings", "position_embd"),
            *_tree(
                "transformer.layer.{i}.",
                {
                    "attn_q": "attention.q_lin",
                    "attn_k": "attention.k_lin",
                    "attn_v": "attention.v_lin",
                    "attn_output": "attention.out_lin",
                    "attn_output_norm": "sa_layer_norm",
                    "ffn_up": "ffn.lin1",
                    "ffn_down": "ffn.lin2",
                    "layer_output_norm": "output_layer_norm",
                },
            ),
        ),
        (constant("attention.layer_norm_epsilon", 1e-12), _CAUSAL, _POOLING),
        prefixes=("distilbert.",),
        drops=(r"^vocab_",),
        when=lambda base: "token_types.weight" not in base,
        needs=("token_embd.weight", "position_embd.weight"),
        encoder=True,
    ),
    ArchSpec(
        "modern-bert",
        ("ModernBertModel", "ModernBertForMaskedLM"),
        "modernbert",
        _MODERN,
        _MODERN_KEYS,
        prefixes=("model.",),
        drops=(r"^head\.", r"^decoder\."),
        uneven=True,
        encoder=True,
    ),
    ArchSpec(
        "modern-bert",
        ("ModernBertForSequenceClassification",),
        "modernbert_classifier",
        (*_MODERN, rule("head.dense", "cls"), rule("head.norm", "cls.norm"), rule("classifier", "cls.output")),
        (*_MODERN_KEYS, LABELS),
        prefixes=("model.",),
        when=lambda base: "cls.output.weight" in base,
        needs=("token_embd.weight", "output_norm.weight", "cls.weight", "cls.norm.weight", "cls.output.weight"),
        defaults={"model_type": "modernbert"},
        uneven=True,
        encoder=True,
    ),
    ArchSpec(
        "t5encoder",
        ("T5EncoderModel",),
        "t5",
        _t5_rules(),
        (
            Key("context_length", "n_positions", 512),
            Key("embedding_length", "d_model", needed=True),
            Key("feed_forward_length", "d_ff", needed=True),
            Key("block_count", lambda c: c.number("layers")),
            Key("attention.head_count", "num_heads", needed=True),
            Key("attention.key_length", "d_kv", needed=True),
            Key("attention.value_length", "d_kv", needed=True),
            Key("attention.layer_norm_epsilon", "layer_norm_epsilon", needed=True),
            Key("attention.relative_buckets_count", "relative_attention_num_buckets", needed=True),
            Key("attention.layer_norm_rms_epsilon", "layer_norm_epsilon", needed=True),
            # llama.cpp's own converter leaves this out, and its server then masks what comes after each token.
            _CAUSAL,
        ),
        common=False,
        drops=(r"^encoder\.embed_tokens\.",),
        needs=("token_embd.weight", "enc.output_norm.weight"),
        uneven=True,
        encoder=True,
        vocab="unigram",
    ),
    ArchSpec(
        "eurobert",
        ("EuroBertModel", "JinaEmbeddingsV5Model"),
        "eurobert",
        (*EMBEDDINGS, *NORMS, *attention(), *MLP),
        (_CAUSAL, NO_SCALING, _POOLING),
        prefixes=("model.",),
        encoder=True,
    ),
)
