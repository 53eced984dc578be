"""Tiny models for `coded_zoo`: encoders, and decoders whose tokens see all others. Their functions give hidden states."""

from __future__ import annotations

import torch
from coded_zoo import (
    _BASE,
    _LLAMA_NORMS,
    HEADS,
    INNER,
    KV,
    LAYERS,
    SIZE,
    VOCAB,
    WIDTH,
    Coded,
    Weights,
    _layers,
    _llama_layer,
    _mlp,
    _q_k_v_o,
)
from reference import SILU, Tensor, attend, chosen, gelu, heads, linear, mlp, moe, norm, rms, rope
from torch.nn import functional


def _norm(x: Tensor, w: Weights, name: str, eps: float = 1e-12) -> Tensor:
    return norm(x, w[f"{name}.weight"], w[f"{name}.bias"], eps)


def _spread(length: int) -> Tensor:
    """ALiBi of an encoder: minus the distance, whichever side."""
    slopes = 2.0 ** (-8 / HEADS * torch.arange(1, HEADS + 1).double())
    at = torch.arange(length).double()
    return -slopes[:, None, None] * (at[None, None, :] - at[None, :, None]).abs()


def _nomic_moe(w: Weights, ids: Tensor) -> Tensor:
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
    x = _norm(x, w, "emb_ln")
    for index in range(LAYERS):
        at = f"encoder.layers.{index}."
        q, k, v = (heads(one, HEADS) for one in linear(x, w, at + "attn.Wqkv").chunk(3, -1))
        mixed = attend(rope(q, 1000.0), rope(k, 1000.0), v, causal=False)
        x = _norm(x + linear(mixed, w, at + "attn.out_proj"), w, at + "norm1")
        if index % 2 == 1:
            weights = chosen(linear(x, w, at + "mlp.router.layer").softmax(-1), 2, normed=False)
            up, down = (w[f"{at}mlp.experts.mlp.w{n}"].view(4, INNER, WIDTH) for n in (1, 2))
            found = moe(x, weights, lambda e, y, up=up, down=down: gelu(y @ up[e].T) @ down[e])
        else:
            found = linear(gelu(linear(x, w, at + "mlp.fc1")), w, at + "mlp.fc2")
        x = _norm(x + found, w, at + "norm2")
    return x


def _jina(code: bool) -> object:
    def run(w: Weights, ids: Tensor) -> Tensor:
        x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.token_type_embeddings.weight"][0]
        x = _norm(x, w, "embeddings.LayerNorm")
        for index in range(LAYERS):
            at = f"encoder.layer.{index}."
            q, k, v = (linear(x, w, f"{at}attention.self.{one}") for one in ("query", "key", "value"))
            if code:
                q, k = (_norm(y, w, f"{at}attention.self.layer_norm_{one}") for y, one in ((q, "q"), (k, "k")))
            q, k, v = (heads(one, HEADS) for one in (q, k, v))
            mixed = attend(q, k, v, bias=_spread(len(x)), causal=False)
            y = _norm(x + linear(mixed, w, at + "attention.output.dense"), w, at + "attention.output.LayerNorm")
            x = _norm(x + y, w, at + "layer_norm_1") if code else y
            up, down, last = (
                ("mlp.up_gated_layer", "mlp.down_layer", "layer_norm_2")
                if code
                else ("mlp.gated_layers", "mlp.wo", "mlp.layernorm")
            )
            gate, value = linear(x, w, at + up).chunk(2, -1)
            x = _norm(x + linear(gelu(gate) * value, w, at + down), w, at + last)
        return x

    return run


def _neo(w: Weights, ids: Tensor) -> Tensor:
    x = w["model.encoder.weight"][ids]
    for index in range(LAYERS):
        at = f"model.transformer_encoder.{index}."
        y = linear(rms(x, w[at + "attention_norm.weight"]), w, at + "qkv").view(len(x), HEADS, 3 * SIZE)
        q, k, v = (one.transpose(0, 1) for one in y.chunk(3, -1))
        x = x + linear(attend(rope(q, pairs=True), rope(k, pairs=True), v, causal=False), w, at + "wo")
        gate, up = linear(rms(x, w[at + "ffn_norm.weight"]), w, at + "ffn.w12").chunk(2, -1)
        x = x + linear(SILU(gate) * up, w, at + "ffn.w3")
    return rms(x, w["model.layer_norm.weight"])


def _llama(w: Weights, ids: Tensor) -> Tensor:
    x = w["embed_tokens.weight"][ids]
    for index in range(LAYERS):
        at = f"layers.{index}."
        x = _llama_layer({n.removeprefix(at): t for n, t in w.items() if n.startswith(at)}, x, index, causal=False)
    return rms(x, w["norm.weight"])


def _lfm2(w: Weights, ids: Tensor) -> Tensor:
    x = w["embed_tokens.weight"][ids]
    for index in range(LAYERS):
        at = f"layers.{index}."
        y = rms(x, w[at + "operator_norm.weight"])
        if index == 0:
            b, c, inner = linear(y, w, at + "conv.in_proj").chunk(3, -1)
            padded = functional.pad((b * inner).T, (1, 1))  # both sides of a token
            mixed = functional.conv1d(padded[None], w[at + "conv.conv.weight"], groups=WIDTH)[0].T
            x = x + linear(c * mixed, w, at + "conv.out_proj")
        else:
            q, k, v = (
                heads(linear(y, w, f"{at}self_attn.{one}_proj"), n)
                for one, n in zip("qkv", (HEADS, KV, KV), strict=True)
            )
            q, k = (rms(z, w[f"{at}self_attn.{one}_layernorm.weight"]) for z, one in ((q, "q"), (k, "k")))
            x = x + linear(attend(rope(q, 1e6), rope(k, 1e6), v, causal=False), w, at + "self_attn.out_proj")
        y = rms(x, w[at + "ffn_norm.weight"])
        x = x + mlp(y, w, *(f"{at}feed_forward.w{n}" for n in (1, 3, 2)))
    return rms(x, w["embedding_norm.weight"])


def _both(*names: str, rows: int = WIDTH, width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for name in names:
        found |= {f"{name}.weight": (rows, width), f"{name}.bias": (rows,)}
    return found


def _norms(*names: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{end}": (WIDTH,) for name in names for end in ("weight", "bias")}


_JINA_SHAPES = {
    "embeddings.word_embeddings.weight": (VOCAB, WIDTH),
    "embeddings.token_type_embeddings.weight": (2, WIDTH),
    **_norms("embeddings.LayerNorm"),
    **_layers(
        {
            **_both("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
            **_norms("attention.output.LayerNorm"),
        },
        "encoder.layer.{i}.",
    ),
}
_JINA = {
    "architectures": ["JinaBertForMaskedLM"],
    "model_type": "bert",
    "vocab_size": VOCAB,
    "type_vocab_size": 2,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 128,
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "alibi",
    "feed_forward_type": "geglu",
}
_DECODER = {k: v for k, v in _BASE.items() if k != "tie_word_embeddings"}

ENCODERS: dict[str, Coded] = {
    "nomic_moe": Coded(
        {
            "architectures": ["NomicBertModel"],
            "model_type": "nomic_bert",
            "vocab_size": VOCAB,
            "type_vocab_size": 1,
            "n_embd": WIDTH,
            "n_head": HEADS,
            "n_inner": INNER,
            "n_layer": LAYERS,
            "n_positions": 2048,
            "max_trained_positions": 2048,
            "layer_norm_epsilon": 1e-12,
            "rotary_emb_base": 1000,
            "rotary_emb_fraction": 1.0,
            "rotary_emb_interleaved": False,
            "rotary_emb_scale_base": None,
            "activation_function": "gelu",
            "causal": False,
            "prenorm": False,
            "moe_every_n_layers": 2,
            "moe_top_k": 2,
            "num_experts": 4,
            "qkv_proj_bias": True,
            "mlp_fc1_bias": True,
            "mlp_fc2_bias": True,
        },
        {
            "embeddings.word_embeddings.weight": (VOCAB, WIDTH),
            "embeddings.token_type_embeddings.weight": (1, WIDTH),
            **_norms("emb_ln"),
            **_layers(
                {
                    **_both("attn.Wqkv", rows=3 * WIDTH),
                    **_both("attn.out_proj"),
                    **_norms("norm1", "norm2"),
                },
                "encoder.layers.{i}.",
            ),
            **_layers({**_both("mlp.fc1", rows=INNER), **_both("mlp.fc2", width=INNER)}, "encoder.layers.0."),
            "encoder.layers.1.mlp.router.layer.weight": (4, WIDTH),
            "encoder.layers.1.mlp.experts.mlp.w1": (4 * INNER, WIDTH),
            "encoder.layers.1.mlp.experts.mlp.w2": (4 * INNER, WIDTH),
            "encoder.layers.1.mlp.experts.bias": (WIDTH,),
        },
        _nomic_moe,
        5e-3,
        causal=False,
        head="",
    ),
    "jina_bert": Coded(
        _JINA,
        {
            **_JINA_SHAPES,
            **_layers(
                {
                    "mlp.gated_layers.weight": (2 * INNER, WIDTH),
                    **_both("mlp.wo", width=INNER),
                    **_norms("mlp.layernorm"),
                },
                "encoder.layer.{i}.",
            ),
        },
        _jina(False),
        5e-3,
        causal=False,
        head="",
    ),
    "jina_bert_code": Coded(
        {
            **_JINA,
            "auto_map": {"AutoModel": "jinaai/jina-bert-v2-qk-post-norm--modeling_bert.JinaBertModel"},
        },
        {
            **_JINA_SHAPES,
            **_layers(
                {
                    **_norms(
                        "attention.self.layer_norm_q", "attention.self.layer_norm_k", "layer_norm_1", "layer_norm_2"
                    ),
                    "mlp.up_gated_layer.weight": (2 * INNER, WIDTH),
                    **_both("mlp.down_layer", width=INNER),
                },
                "encoder.layer.{i}.",
            ),
        },
        _jina(True),
        5e-3,
        causal=False,
        head="",
    ),
    "neobert": Coded(
        {
            "architectures": ["NeoBERTLMHead"],
            "model_type": "neobert",
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": 96,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_length": 128,
            "norm_eps": 1e-6,
        },
        {
            "model.encoder.weight": (VOCAB, WIDTH),
            "model.layer_norm.weight": (WIDTH,),
            **_layers(
                {
                    "attention_norm.weight": (WIDTH,),
                    "ffn_norm.weight": (WIDTH,),
                    "qkv.weight": (3 * WIDTH, WIDTH),
                    "wo.weight": (WIDTH, WIDTH),
                    "ffn.w12.weight": (128, WIDTH),
                    "ffn.w3.weight": (WIDTH, 64),
                },
                "model.transformer_encoder.{i}.",
            ),
        },
        _neo,
        causal=False,
        head="",
    ),
    "llama_both_ways": Coded(
        {
            **_DECODER,
            "architectures": ["LlamaBidirectionalModel"],
            "model_type": "llama_bidirec",
            "rope_theta": 10000.0,
        },
        {
            "embed_tokens.weight": (VOCAB, WIDTH),
            "norm.weight": (WIDTH,),
            **_layers({**_LLAMA_NORMS, **_q_k_v_o(), **_mlp()}, "layers.{i}."),
        },
        _llama,
        causal=False,
        head="",
    ),
    "lfm2_both_ways": Coded(
        {
            **_DECODER,
            "architectures": ["Lfm2BidirectionalModel"],
            "model_type": "lfm2_bidirectional",
            "norm_eps": 1e-6,
            "conv_L_cache": 3,
            "conv_bias": False,
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention"],
            "rope_theta": 1e6,
        },
        {
            "embed_tokens.weight": (VOCAB, WIDTH),
            "embedding_norm.weight": (WIDTH,),
            **_layers(
                {
                    "operator_norm.weight": (WIDTH,),
                    "ffn_norm.weight": (WIDTH,),
                    "feed_forward.w1.weight": (INNER, WIDTH),
                    "feed_forward.w2.weight": (WIDTH, INNER),
                    "feed_forward.w3.weight": (INNER, WIDTH),
                },
                "layers.{i}.",
            ),
            "layers.0.conv.in_proj.weight": (3 * WIDTH, WIDTH),
            "layers.0.conv.conv.weight": (WIDTH, 1, 3),
            "layers.0.conv.out_proj.weight": (WIDTH, WIDTH),
            **_layers(
                {
                    **_q_k_v_o(out="out_proj"),
                    "self_attn.q_layernorm.weight": (SIZE,),
                    "self_attn.k_layernorm.weight": (SIZE,),
                },
                "layers.1.",
            ),
        },
        _lfm2,
        1e-3,  # llama.cpp convolves in half precision
        causal=False,
        head="",
    ),
}
