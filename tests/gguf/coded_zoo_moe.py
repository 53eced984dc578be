"""Tiny models for `coded_zoo`: decoders with experts, or with mixers beside attention."""

from __future__ import annotations

from typing import Any

import torch
from coded_zoo import (
    _BASE,
    _LLAMA_NORMS,
    _QK,
    HEADS,
    INNER,
    KV,
    LAYERS,
    SIZE,
    WIDTH,
    Coded,
    Weights,
    _ends,
    _layers,
    _mlp,
    _q_k_v_o,
    plain,
    qkv,
)
from reference import SILU, Tensor, attend, chosen, gelu, heads, linear, mlp, moe, rms, rope
from torch.nn import functional

_FEW = {"num_local_experts": 4, "num_experts_per_tok": 2}
_W123 = {
    "block_sparse_moe.gate.weight": (4, WIDTH),
    "block_sparse_moe.experts.{e}.w1.weight": (INNER, WIDTH),
    "block_sparse_moe.experts.{e}.w2.weight": (WIDTH, INNER),
    "block_sparse_moe.experts.{e}.w3.weight": (INNER, WIDTH),
}
_EXPERTS = {
    "mlp.gate.weight": (4, WIDTH),
    "mlp.experts.{e}.gate_proj.weight": (32, WIDTH),
    "mlp.experts.{e}.up_proj.weight": (32, WIDTH),
    "mlp.experts.{e}.down_proj.weight": (WIDTH, 32),
}


def _expert(w: Weights, at: str, names: tuple[str, str, str], act: Any = SILU) -> Any:
    return lambda index, x: mlp(x, w, *(f"{at}{index}.{name}" for name in names), act)


_GUD = ("gate_proj", "up_proj", "down_proj")


def _arctic(w: Weights, ids: Tensor) -> Tensor:
    def layer(w: Weights, x: Tensor, index: int) -> Tensor:
        q, k, v = qkv(w, rms(x, w["input_layernorm.weight"]))
        found = x + linear(attend(rope(q), rope(k), v), w, "self_attn.o_proj")
        y = rms(found, w["residual_layernorm.weight"])
        found = found + mlp(y, w, "residual_mlp.w1", "residual_mlp.w3", "residual_mlp.w2")
        y = rms(x, w["post_attention_layernorm.weight"])
        weights = chosen(linear(y, w, "block_sparse_moe.gate").softmax(-1), 2)
        return found + moe(y, weights, _expert(w, "block_sparse_moe.experts.", ("w1", "w3", "w2")))

    return plain(w, ids, layer=layer)


def _grok(w: Weights, ids: Tensor) -> Tensor:
    def layer(w: Weights, x: Tensor, index: int) -> Tensor:
        q, k, v = qkv(w, rms(x, w["pre_attn_norm.weight"]))
        mixed = linear(attend(rope(q), rope(k), v, scale=0.2, cap=30.0), w, "self_attn.o_proj")
        x = x + rms(mixed, w["post_attn_norm.weight"])
        y = rms(x, w["pre_moe_norm.weight"])
        weights = chosen(linear(y, w, "block_sparse_moe.gate").softmax(-1), 2)
        found = moe(y, weights, _expert(w, "block_sparse_moe.experts.", ("w1", "w3", "w2"), gelu))
        both = (found + mlp(y, w, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", gelu)) / 2**0.5
        return x + rms(both, w["post_moe_norm.weight"])

    found = plain(w, ids, layer=layer, scale=3.5, out=0.6)
    return 20.0 * torch.tanh(found / 20.0)


def _smallthinker(slides: bool) -> Any:
    def run(w: Weights, ids: Tensor) -> Tensor:
        def layer(w: Weights, x: Tensor, index: int) -> Tensor:
            scores = linear(x, w, "block_sparse_moe.primary_router").sigmoid()
            q, k, v = qkv(w, rms(x, w["input_layernorm.weight"]))
            if index % 4 or not slides:
                q, k = rope(q), rope(k)
            x = x + linear(attend(q, k, v), w, "self_attn.o_proj")
            y = rms(x, w["post_attention_layernorm.weight"])
            expert = _expert(w, "block_sparse_moe.experts.", ("gate", "up", "down"), functional.relu)
            return x + moe(y, chosen(scores, 2), expert)

        return plain(w, ids, layer=layer)

    return run


def _maple(w: Weights, ids: Tensor) -> Tensor:
    def layer(w: Weights, x: Tensor, index: int) -> Tensor:
        q, k, v = qkv(w, rms(x, w["input_layernorm.weight"]))
        q, k = rms(q, w["self_attn.q_norm.weight"]), rms(k, w["self_attn.k_norm.weight"])
        if index == 0:
            q, k = rope(q, size=8), rope(k, size=8)
        x = x + linear(attend(q, k, v, window=4 if index == 0 else None), w, "self_attn.o_proj")
        y = rms(x, w["post_attention_layernorm.weight"])
        weights = chosen(linear(y, w, "mlp.gate").softmax(-1), 2)
        return x + moe(y, weights, _expert(w, "mlp.experts.", _GUD))

    return plain(w, ids, layer=layer)


def _qwen_moe(causal: bool, normed: bool) -> Any:
    def run(w: Weights, ids: Tensor) -> Tensor:
        def layer(w: Weights, x: Tensor, index: int) -> Tensor:
            q, k, v = qkv(w, rms(x, w["input_layernorm.weight"]))
            q, k = rope(rms(q, w["self_attn.q_norm.weight"])), rope(rms(k, w["self_attn.k_norm.weight"]))
            x = x + linear(attend(q, k, v, causal=causal), w, "self_attn.o_proj")
            y = rms(x, w["post_attention_layernorm.weight"])
            weights = chosen(linear(y, w, "mlp.gate").softmax(-1), 2, normed=normed)
            return x + moe(y, weights, _expert(w, "mlp.experts.", _GUD))

        return plain(w, ids, layer=layer)

    return run


def _sarvam(w: Weights, ids: Tensor) -> Tensor:
    def layer(w: Weights, x: Tensor, index: int) -> Tensor:
        y = rms(x, w["input_layernorm.weight"])
        q, k, v = heads(linear(y, w, "attention.query_key_value"), HEADS + 2 * KV).split((HEADS, KV, KV))
        q, k = rope(rms(q, w["attention.query_layernorm.weight"])), rope(rms(k, w["attention.key_layernorm.weight"]))
        x = x + linear(attend(q, k, v), w, "attention.dense")
        y = rms(x, w["post_attention_layernorm.weight"])
        if index == 0:
            return x + mlp(y, w, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
        scores = linear(y, w, "mlp.gate").sigmoid()
        bias = w["mlp.gate.expert_bias"]
        found = moe(y, 2.5 * chosen(scores, 2, by=scores + bias - bias.mean()), _expert(w, "mlp.experts.", _GUD))
        return x + found + mlp(y, w, *(f"mlp.shared_experts.{one}" for one in _GUD))

    return plain(w, ids, embed="model.word_embeddings", layer=layer)


def _plamo2(w: Weights, ids: Tensor) -> Tensor:
    def mixer(w: Weights, x: Tensor) -> Tensor:
        length, count, size, state = len(x), 4, SIZE, 16
        z, x = linear(x, w, "mixer.in_proj").view(length, count, 2 * size).chunk(2, -1)
        padded = functional.pad(x.reshape(length, -1).T, (3, 0))
        x = SILU(functional.conv1d(padded[None], w["mixer.conv1d.weight"], groups=count * size)[0].T)
        b, c, dt = linear(x, w, "mixer.bcdt_proj").split((state, state, 64), -1)
        b, c = rms(b, w["mixer.B_norm_weight"]), rms(c, w["mixer.C_norm_weight"])
        dt = linear(rms(dt, w["mixer.dt_norm_weight"]), w, "mixer.dt_proj")
        dt = functional.softplus(dt + w["mixer.dt_bias"])
        x = x.view(length, count, size)
        memory, rows = torch.zeros(count, size, state).double(), []
        for at in range(length):
            memory = memory * torch.exp(dt[at] * -torch.exp(w["mixer.A_log"]))[:, None, None]
            memory = memory + (dt[at][:, None] * x[at])[..., None] * b[at]
            rows.append(memory @ c[at] + w["mixer.D"][:, None] * x[at])
        return linear((SILU(z) * torch.stack(rows)).flatten(1), w, "mixer.out_proj")

    def attention(w: Weights, x: Tensor) -> Tensor:
        q, k, v = heads(linear(x, w, "mixer.qkv_proj"), HEADS + 2 * KV).split((HEADS, KV, KV))
        q, k = rms(q) * w["mixer.q_weight"][:, None], rms(k) * w["mixer.k_weight"][:, None]
        return linear(attend(rope(q), rope(k), v), w, "mixer.o_proj")

    def layer(w: Weights, x: Tensor, index: int) -> Tensor:
        y = rms(x, 1 + w["pre_mixer_norm.weight"])
        mixed = attention(w, y) if index == 1 else mixer(w, y)
        x = x + rms(mixed, 1 / 5 + w["post_mixer_norm.weight"])
        gate, up = linear(rms(x, 1 + w["pre_mlp_norm.weight"]), w, "mlp.gate_up_proj").chunk(2, -1)
        return x + rms(linear(SILU(gate) * up, w, "mlp.down_proj"), 1 / 5**1.5 + w["post_mlp_norm.weight"])

    return plain({**w, "last.weight": 1 + w["model.norm.weight"]}, ids, last="last", layer=layer)


_PLAMO_NORMS = {f"{one}_norm.weight": (WIDTH,) for one in ("pre_mixer", "post_mixer", "pre_mlp", "post_mlp")}
_GROK_NORMS = {f"{one}_norm.weight": (WIDTH,) for one in ("pre_attn", "post_attn", "pre_moe", "post_moe")}
_SMALLTHINKER = {
    **_BASE,
    "architectures": ["SmallThinkerForCausalLM"],
    "model_type": "smallthinker",
    "head_dim": SIZE,
    "moe_num_primary_experts": 4,
    "moe_num_active_primary_experts": 2,
    "moe_ffn_hidden_size": 32,
    "moe_primary_router_apply_softmax": False,
    "rope_theta": 10000.0,
}
_SMALLTHINKER_SHAPES = {
    **_ends("model.embed_tokens", "model.norm"),
    **_layers(
        {
            **_LLAMA_NORMS,
            **_q_k_v_o(),
            "block_sparse_moe.primary_router.weight": (4, WIDTH),
            "block_sparse_moe.experts.{e}.gate.weight": (32, WIDTH),
            "block_sparse_moe.experts.{e}.up.weight": (32, WIDTH),
            "block_sparse_moe.experts.{e}.down.weight": (WIDTH, 32),
        },
        "model.layers.{i}.",
    ),
}

MOE: dict[str, Coded] = {
    "arctic": Coded(
        {
            **_BASE,
            **_FEW,
            "architectures": ["ArcticForCausalLM"],
            "model_type": "arctic",
            "moe_layer_frequency": 1,
            "parallel_attn_mlp_res": True,
            "use_residual": True,
            "rope_theta": 10000.0,
        },
        {
            **_ends("model.embed_tokens", "model.norm"),
            **_layers(
                {
                    **_LLAMA_NORMS,
                    **_q_k_v_o(),
                    **_W123,
                    "residual_layernorm.weight": (WIDTH,),
                    **{f"residual_mlp.w{n}.weight": (WIDTH, WIDTH) for n in (1, 2, 3)},
                },
                "model.layers.{i}.",
            ),
        },
        _arctic,
    ),
    "grok": Coded(
        {
            **_BASE,
            **_FEW,
            "architectures": ["Grok1ForCausalLM"],
            "model_type": "grok",
            "hidden_act": "gelu",
            "head_dim": SIZE,
            "moe_intermediate_size": INNER,
            "attn_output_multiplier": 0.2,
            "embedding_multiplier_scale": 3.5,
            "output_multiplier_scale": 0.6,
            "attn_logit_softcapping": 30.0,
            "router_logit_softcapping": 30.0,
            "final_logit_softcapping": 20.0,
            "rope_theta": 10000.0,
        },
        {
            **_ends("model.embed_tokens", "model.norm"),
            **_layers({**_GROK_NORMS, **_q_k_v_o(), **_mlp(), **_W123}, "model.layers.{i}."),
        },
        _grok,
        5e-3,
    ),
    "grovemoe": Coded(
        {
            **_BASE,
            "architectures": ["GroveMoeForCausalLM"],
            "model_type": "grove_moe",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": SIZE,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "rope_theta": 10000.0,
        },
        {
            **_ends("model.embed_tokens", "model.norm"),
            **_layers({**_LLAMA_NORMS, **_q_k_v_o(), **_QK, **_EXPERTS}, "model.layers.{i}."),
            **{
                f"model.layers.{i}.mlp.chunk_experts.{e}.{one}.weight": (SIZE, WIDTH)
                if one != "down_proj"
                else (WIDTH, SIZE)
                for i in range(LAYERS)
                for e in range(2)
                for one in _GUD
            },
        },
        None,
    ),
    "smallthinker": Coded(
        {**_SMALLTHINKER, "sliding_window_layout": [0, 0], "rope_layout": [1, 1], "sliding_window_size": 4096},
        _SMALLTHINKER_SHAPES,
        _smallthinker(False),
    ),
    "smallthinker_windows": Coded(
        {
            **_SMALLTHINKER,
            "sliding_window_layout": [0, 1],
            "rope_layout": [0, 1],
            "sliding_window_size": 4096,
        },
        _SMALLTHINKER_SHAPES,
        _smallthinker(True),
    ),
    "maple": Coded(
        {
            **_BASE,
            "architectures": ["MapleForCausalLM"],
            "model_type": "maple",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": SIZE,
            "moe_intermediate_size": 32,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "nope_on_global_attention": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
        {
            **_ends("model.embed_tokens", "model.norm"),
            **_layers({**_LLAMA_NORMS, **_q_k_v_o(), **_QK, **_EXPERTS}, "model.layers.{i}."),
        },
        _maple,
    ),
    "llada_moe": Coded(
        {
            **_BASE,
            "architectures": ["LLaDAMoEModelLM"],
            "model_type": "llada",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "expert_intermediate_size": 32,
            "rope_theta": 10000.0,
            "qk_layernorm": True,
        },
        {
            **_ends("model.embed_tokens", "model.norm"),
            **_layers({**_LLAMA_NORMS, **_q_k_v_o(), **_QK, **_EXPERTS}, "model.layers.{i}."),
        },
        _qwen_moe(False, False),
        causal=False,
    ),
    "sarvam": Coded(
        {
            **_BASE,
            "architectures": ["SarvamMoEForCausalLM"],
            "model_type": "sarvam_moe",
            "head_dim": SIZE,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "n_group": 1,
            "topk_group": 1,
            "score_function": "sigmoid",
            "rope_theta": 10000.0,
        },
        {
            **_ends("model.word_embeddings", "model.norm"),
            **_layers(
                {
                    **_LLAMA_NORMS,
                    "attention.query_key_value.weight": ((HEADS + 2 * KV) * SIZE, WIDTH),
                    "attention.dense.weight": (WIDTH, WIDTH),
                    "attention.query_layernorm.weight": (SIZE,),
                    "attention.key_layernorm.weight": (SIZE,),
                },
                "model.layers.{i}.",
            ),
            **_layers(_mlp(), "model.layers.0."),
            **_layers({**_EXPERTS, **_mlp("mlp.shared_experts.", 32)}, "model.layers.1."),
            "model.layers.1.mlp.gate.expert_bias": (4,),
        },
        _sarvam,
    ),
    "plamo2": Coded(
        {
            **_BASE,
            "architectures": ["Plamo2ForCausalLM"],
            "model_type": "plamo2",
            "hidden_size_per_head": SIZE,
            "mamba_step": 2,
            "mamba_enabled": True,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_num_heads": 4,
            "rope_theta": 10000.0,
        },
        {
            **_ends("model.embed_tokens", "model.norm"),
            **_layers(
                {
                    **_PLAMO_NORMS,
                    "mlp.gate_up_proj.weight": (2 * INNER, WIDTH),
                    "mlp.down_proj.weight": (WIDTH, INNER),
                },
                "model.layers.layers.{i}.",
            ),
            **_layers(
                {
                    "in_proj.weight": (2 * 64, WIDTH),
                    "conv1d.weight": (64, 1, 4),
                    "bcdt_proj.weight": (64 + 32, 64),
                    "dt_proj.weight": (4, 64),
                    "dt_bias": (4,),
                    "A_log": (4,),
                    "D": (4,),
                    "dt_norm_weight": (64,),
                    "B_norm_weight": (16,),
                    "C_norm_weight": (16,),
                    "out_proj.weight": (WIDTH, 64),
                },
                "model.layers.layers.0.mixer.",
            ),
            **_layers(
                {
                    "qkv_proj.weight": ((HEADS + 2 * KV) * SIZE, WIDTH),
                    "o_proj.weight": (WIDTH, HEADS * SIZE),
                    "q_weight": (HEADS, SIZE),
                    "k_weight": (KV, SIZE),
                },
                "model.layers.layers.1.mixer.",
            ),
        },
        _plamo2,
    ),
}
