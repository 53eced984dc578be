"""Tiny models for `coded_zoo`: RWKV 6 and 7, and decoders whose tensors are put together otherwise."""

from __future__ import annotations

from typing import Any

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
    _ends,
    _layers,
    _llama_layer,
    _mlp,
    _q_k_v_o,
    plain,
    qkv,
)
from coded_zoo_moe import _EXPERTS, _GUD, _expert
from reference import Tensor, attend, chosen, gelu, heads, linear, mlp, moe, norm, relu2, rms, rope
from torch.nn import functional


def _before(x: Tensor) -> Tensor:
    """What stood at the token before."""
    return torch.cat((torch.zeros_like(x[:1]), x[:-1]))


def _ln(x: Tensor, w: Weights, name: str, eps: float = 1e-5) -> Tensor:
    return norm(x, w[f"{name}.weight"], w[f"{name}.bias"], eps)


def _grouped(x: Tensor, w: Weights, name: str, count: int, eps: float) -> Tensor:
    """A norm of each head's part."""
    return functional.group_norm(x, count, w[f"{name}.weight"], w[f"{name}.bias"], eps)


def _rwkv6(w: Weights, ids: Tensor) -> Tensor:
    count = WIDTH // 32
    x = _ln(w["rwkv.embeddings.weight"][ids], w, "rwkv.blocks.0.pre_ln")
    for index in range(LAYERS):
        at = f"rwkv.blocks.{index}."
        y = _ln(x, w, at + "ln1")
        sx, a = _before(y) - y, at + "attention."
        low = torch.tanh((y + sx * w[a + "time_maa_x"][0, 0]) @ w[a + "time_maa_w1"]).view(len(y), 5, -1)
        mixed = {
            one: y + sx * (w[f"{a}time_maa_{one}"][0, 0] + low[:, n] @ w[a + "time_maa_w2"][n])
            for n, one in enumerate("wkvrg")
        }
        decay = w[a + "time_decay"][0, 0] + torch.tanh(mixed["w"] @ w[a + "time_decay_w1"]) @ w[a + "time_decay_w2"]
        decay = torch.exp(-torch.exp(decay)).view(len(y), count, 32)
        r, k, v = (
            linear(mixed[one], w, a + name).view(len(y), count, 32)
            for one, name in (("r", "receptance"), ("k", "key"), ("v", "value"))
        )
        memory, rows = torch.zeros(count, 32, 32).double(), []
        for t in range(len(y)):
            new = k[t][:, :, None] * v[t][:, None, :]
            rows.append((r[t][:, None, :] @ (w[a + "time_faaaa"][:, :, None] * new + memory))[:, 0])
            memory = memory * decay[t][:, :, None] + new
        out = _grouped(torch.stack(rows).flatten(1), w, a + "ln_x", count, 64e-5)
        gate = functional.silu(linear(mixed["g"], w, a + "gate"))
        x = x + linear(out * gate, w, a + "output")
        y = _ln(x, w, at + "ln2")
        sx, f = _before(y) - y, at + "feed_forward."
        key = relu2(linear(y + sx * w[f + "time_maa_k"][0, 0], w, f + "key"))
        share = torch.sigmoid(linear(y + sx * w[f + "time_maa_r"][0, 0], w, f + "receptance"))
        x = x + share * linear(key, w, f + "value")
    return linear(_ln(x, w, "rwkv.ln_out"), w, "head")


def _wkv7(r: Tensor, decay: Tensor, k: Tensor, v: Tensor, kk: Tensor, rate: Tensor) -> Tensor:
    """The memory of RWKV 7: what it gives at each token, ``[t, heads, size]``."""
    _, count, size = r.shape
    memory, rows = torch.zeros(count, size, size).double(), []
    for t in range(len(r)):
        taken = memory @ -kk[t][:, :, None]
        new = taken @ (kk[t] * rate[t])[:, None, :] + v[t][:, :, None] * k[t][:, None, :]
        memory = memory * decay[t][:, None, :] + new
        rows.append((memory @ r[t][:, :, None])[:, :, 0])
    return torch.stack(rows)


def _rwkv7(w: Weights, ids: Tensor) -> Tensor:
    size = 32
    count = WIDTH // size
    x = _ln(w["model.embeddings.weight"][ids], w, "model.layers.0.pre_norm")
    first = torch.zeros(0)
    for index in range(LAYERS):
        at = f"model.layers.{index}."
        y = _ln(x, w, at + "attn_norm")
        sx, a = _before(y) - y, at + "attn."
        mixed = {one: y + sx * w[f"{a}x_{one}"][0, 0] for one in "rwkvag"}

        def low(name: str, x: Tensor, act: Any = None, a: str = a) -> Tensor:
            inner = linear(x, w, f"{a}{name}_lora.lora.0")
            return linear(inner if act is None else act(inner), w, f"{a}{name}_lora.lora.2")

        r, k, v = (linear(mixed[one], w, f"{a}{one}_proj") for one in "rkv")
        decay = torch.exp(-0.606531 * torch.sigmoid(low("w", mixed["w"], torch.tanh)))
        first = v if index == 0 else first
        v = v if index == 0 else v + (first - v) * torch.sigmoid(low("v", mixed["v"]))
        rate, gate = torch.sigmoid(low("a", mixed["a"])), low("g", mixed["g"], torch.sigmoid)
        kk = functional.normalize((k * w[a + "k_k"]).view(len(y), count, size), dim=-1, eps=1e-12)
        k = k * (1 + (rate - 1) * w[a + "k_a"])
        r, k, v, decay, rate = (one.view(len(y), count, size) for one in (r, k, v, decay, rate))
        out = _grouped(_wkv7(r, decay, k, v, kk, rate).flatten(1), w, a + "g_norm", count, 64e-5)
        extra = (r * k * w[a + "r_k"]).sum(-1, keepdim=True) * v
        x = x + linear((out + extra.flatten(1)) * gate, w, a + "o_proj")
        y = _ln(x, w, at + "ffn_norm")
        key = relu2(linear(y + (_before(y) - y) * w[at + "ffn.x_k"], w, at + "ffn.key"))
        x = x + linear(key, w, at + "ffn.value")
    return linear(_ln(x, w, "model.norm"), w, "lm_head")


def _hybrid(gate: bool) -> Any:
    """RWKV 7 in the place of attention, between the norms and networks of a Qwen 2."""

    def run(w: Weights, ids: Tensor) -> Tensor:
        size = 32
        count, first = WIDTH // size, torch.zeros(0)
        x = w["model.embed_tokens.weight"][ids]
        for index in range(LAYERS):
            at = f"model.layers.{index}."
            a = at + "self_attn.time_mixer."
            y = rms(x, w[at + "input_layernorm.weight"])
            sx = _before(y) - y
            mixed = {one: y + sx * w[f"{a}x_{one}"][0, 0] for one in ("rwkvag" if gate else "rwkva")}
            r, k, v = (linear(mixed[one], w, a + n) for one, n in (("r", "receptance"), ("k", "key"), ("v", "value")))

            def low(name: str, x: Tensor, a: str = a) -> Tensor:
                return w[f"{a}{name}0"][0, 0] + x @ w[f"{a}{name}2"]

            decay = torch.exp(-0.606531 * torch.sigmoid(low("w", torch.tanh(mixed["w"] @ w[a + "w1"]))))
            first = v if index == 0 else first
            v = v if index == 0 else v + (first - v) * torch.sigmoid(low("v", mixed["v"] @ w[a + "v1"]))
            rate = torch.sigmoid(low("a", mixed["a"] @ w[a + "a1"]))
            kk = functional.normalize((k * w[a + "k_k"][0, 0]).view(len(y), count, size), dim=-1, eps=1e-12)
            k = k * (1 + (rate - 1) * w[a + "k_a"][0, 0])
            r, k, v, decay, rate = (one.view(len(y), count, size) for one in (r, k, v, decay, rate))
            out = _wkv7(r, decay, k, v, kk, rate).flatten(1)
            out = _grouped(out, w, a + "ln_x", count, 64e-5)
            out = out + ((r * k * w[a + "r_k"]).sum(-1, keepdim=True) * v).flatten(1)
            if gate:
                out = out * (torch.sigmoid(mixed["g"] @ w[a + "g1"]) @ w[a + "g2"])
            x = x + linear(out, w, a + "output")
            x = x + mlp(rms(x, w[at + "post_attention_layernorm.weight"]), w, *(f"{at}mlp.{one}" for one in _GUD))
        return linear(rms(x, w["model.norm.weight"]), w, "lm_head")

    return run


def _rugpt(w: Weights, ids: Tensor) -> Tensor:
    x = w["model.embed_tokens.weight"][ids] + w["model.embed_positions.weight"][: len(ids)]
    for index in range(LAYERS):
        at = f"model.layers.{index}."
        y = _ln(x, w, at + "input_layernorm")
        q, k, v = (heads(linear(y, w, f"{at}self_attn.{one}_proj"), HEADS) for one in "qkv")
        x = x + linear(attend(q, k, v), w, at + "self_attn.o_proj")
        y = _ln(x, w, at + "post_attention_layernorm")
        x = x + linear(gelu(linear(y, w, at + "mlp.up_proj")), w, at + "mlp.down_proj")
    return linear(_ln(x, w, "model.norm"), w, "lm_head")


def _cogvlm(w: Weights, ids: Tensor) -> Tensor:
    def layer(w: Weights, x: Tensor, index: int) -> Tensor:
        y = linear(rms(x, w["input_layernorm.weight"]), w, "self_attn.language_expert_query_key_value")
        q, k, v = (heads(one, HEADS) for one in y.chunk(3, -1))
        x = x + linear(attend(rope(q), rope(k), v), w, "self_attn.language_expert_dense")
        y = rms(x, w["post_attention_layernorm.weight"])
        return x + mlp(y, w, *(f"mlp.language_mlp.{one}" for one in _GUD))

    return plain(w, ids, layer=layer)


def _ocr(w: Weights, ids: Tensor) -> Tensor:
    def layer(w: Weights, x: Tensor, index: int) -> Tensor:
        q, k, v = (
            heads(linear(rms(x, w["input_layernorm.weight"]), w, f"self_attn.{one}_proj"), HEADS) for one in "qkv"
        )
        x = x + linear(attend(rope(q), rope(k), v), w, "self_attn.o_proj")
        y = rms(x, w["post_attention_layernorm.weight"])
        if index == 0:
            return x + mlp(y, w, *(f"mlp.{one}" for one in _GUD))
        weights = chosen(linear(y, w, "mlp.gate").softmax(-1), 2, normed=False)
        found = moe(y, weights, _expert(w, "mlp.experts.", _GUD))
        return x + found + mlp(y, w, *(f"mlp.shared_experts.{one}" for one in _GUD))

    return plain(w, ids, layer=layer)


def _sarashina(w: Weights, ids: Tensor) -> Tensor:
    w = {name.removeprefix("llm."): tensor for name, tensor in w.items()}
    return plain(w, ids, layer=_llama_layer)


def _chameleon(w: Weights, ids: Tensor) -> Tensor:
    def layer(w: Weights, x: Tensor, index: int) -> Tensor:
        q, k, v = qkv(w, rms(x, w["input_layernorm.weight"]))
        q, k = (
            functional.layer_norm(y, (SIZE,), eps=1e-5) * w[f"self_attn.{one}_norm.weight"][:, None]
            + w[f"self_attn.{one}_norm.bias"][:, None]
            for one, y in (("q", q), ("k", k))
        )
        x = x + linear(attend(rope(q), rope(k), v), w, "self_attn.o_proj")
        y = rms(x, w["post_attention_layernorm.weight"])
        return x + mlp(y, w, *(f"mlp.{one}" for one in _GUD))

    found = plain(w, ids, layer=layer)
    found[:, 4:8196] = torch.finfo(torch.float32).min
    return found


def _pair(name: str, rows: int = WIDTH, width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, width), f"{name}.bias": (rows,)}


def _ln_shapes(*names: str) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{end}": (WIDTH,) for name in names for end in ("weight", "bias")}


_VECTOR = (1, 1, WIDTH)
_LOW7 = {
    f"attn.{one}_lora.lora.{end}": shape
    for one, rank in (("w", 16), ("a", 16), ("g", 16))
    for end, shape in (("0.weight", (rank, WIDTH)), ("2.weight", (WIDTH, rank)), ("2.bias", (WIDTH,)))
    if (one, end) != ("g", "2.bias")
}
_BIG = 8200  # Chameleon's tokens of images


def _hybrid_model(gate: bool) -> Coded:
    low = [("w", 64), ("a", 64), *([("g", 128)] if gate else [])]
    mixer: dict[str, tuple[int, ...]] = {
        **_ln_shapes("ln_x"),
        **{f"x_{one}": _VECTOR for one in ("rwkvag" if gate else "rwkva")},
        **{f"{one}0": _VECTOR for one, _ in low if one != "g"},
        **{f"{one}1": (WIDTH, rank) for one, rank in low},
        **{f"{one}2": (rank, WIDTH) for one, rank in low},
        "k_k": _VECTOR,
        "k_a": _VECTOR,
        "r_k": (2, 32),
        **{f"{one}.weight": (WIDTH, WIDTH) for one in ("receptance", "key", "value", "output")},
    }
    return Coded(
        {
            **{k: v for k, v in _BASE.items() if k not in ("num_attention_heads", "num_key_value_heads")},
            "architectures": ["RwkvHybridForCausalLM"],
            "model_type": "rwkv_hybrid",
            "head_size": 32,
            "wkv_version": 7,
            "wkv_has_gate": gate,
        },
        {
            **_ends("model.embed_tokens", "model.norm"),
            **_layers({**_LLAMA_NORMS, **_mlp(), **_layers(mixer, "self_attn.time_mixer.")}, "model.layers.{i}."),
            "model.layers.1.self_attn.time_mixer.v0": _VECTOR,
            "model.layers.1.self_attn.time_mixer.v1": (WIDTH, 32),
            "model.layers.1.self_attn.time_mixer.v2": (32, WIDTH),
        },
        _hybrid(gate),
    )


MORE: dict[str, Coded] = {
    "rwkv_hybrid": _hybrid_model(True),
    "rwkv_hybrid_plain": _hybrid_model(False),
    "rwkv6": Coded(
        {
            "architectures": ["Rwkv6ForCausalLM"],
            "model_type": "rwkv6",
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "head_size": 32,
            "intermediate_size": INNER,
            "layer_norm_epsilon": 1e-5,
            "rescale_every": 6,
            "tie_word_embeddings": False,
        },
        {
            "rwkv.embeddings.weight": (VOCAB, WIDTH),
            "head.weight": (VOCAB, WIDTH),
            **_ln_shapes("rwkv.ln_out", "rwkv.blocks.0.pre_ln"),
            **_layers(
                {
                    **_ln_shapes("ln1", "ln2", "attention.ln_x"),
                    **{f"attention.time_maa_{one}": _VECTOR for one in "xwkvrg"},
                    "attention.time_maa_w1": (WIDTH, 160),
                    "attention.time_maa_w2": (5, 32, WIDTH),
                    "attention.time_decay": _VECTOR,
                    "attention.time_decay_w1": (WIDTH, 64),
                    "attention.time_decay_w2": (64, WIDTH),
                    "attention.time_faaaa": (2, 32),
                    **{
                        f"attention.{one}.weight": (WIDTH, WIDTH)
                        for one in ("receptance", "key", "value", "gate", "output")
                    },
                    "feed_forward.time_maa_k": _VECTOR,
                    "feed_forward.time_maa_r": _VECTOR,
                    "feed_forward.key.weight": (INNER, WIDTH),
                    "feed_forward.receptance.weight": (WIDTH, WIDTH),
                    "feed_forward.value.weight": (WIDTH, INNER),
                },
                "rwkv.blocks.{i}.",
            ),
        },
        _rwkv6,
    ),
    "rwkv7": Coded(
        {
            "architectures": ["RWKV7ForCausalLM"],
            "model_type": "rwkv7",
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "head_dim": 32,
            "intermediate_size": INNER,
            "norm_eps": 1e-5,
            "decay_low_rank_dim": 16,
            "a_low_rank_dim": 16,
            "v_low_rank_dim": 8,
            "gate_low_rank_dim": 16,
            "hidden_act": "sqrelu",
            "tie_word_embeddings": False,
        },
        {
            "model.embeddings.weight": (VOCAB, WIDTH),
            "lm_head.weight": (VOCAB, WIDTH),
            **_ln_shapes("model.norm", "model.layers.0.pre_norm"),
            **_layers(
                {
                    **_ln_shapes("attn_norm", "ffn_norm", "attn.g_norm"),
                    **{f"attn.x_{one}": _VECTOR for one in "rwkvag"},
                    "attn.k_k": (WIDTH,),
                    "attn.k_a": (WIDTH,),
                    "attn.r_k": (2, 32),
                    **{f"attn.{one}_proj.weight": (WIDTH, WIDTH) for one in "rkvo"},
                    **_LOW7,
                    "ffn.x_k": (WIDTH,),
                    "ffn.key.weight": (INNER, WIDTH),
                    "ffn.value.weight": (WIDTH, INNER),
                },
                "model.layers.{i}.",
            ),
            "model.layers.1.attn.v_lora.lora.0.weight": (8, WIDTH),
            "model.layers.1.attn.v_lora.lora.2.weight": (WIDTH, 8),
            "model.layers.1.attn.v_lora.lora.2.bias": (WIDTH,),
        },
        _rwkv7,
    ),
    "rugpt3xl": Coded(
        {
            "architectures": ["RuGPT3XLForCausalLM"],
            "model_type": "rugpt3xl",
            "vocab_size": VOCAB,
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 128,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu_new",
            "tie_word_embeddings": False,
        },
        {
            **_ends("model.embed_tokens", "model.norm", bias=True),
            "model.embed_positions.weight": (128, WIDTH),
            **_layers(
                {
                    **_ln_shapes("input_layernorm", "post_attention_layernorm"),
                    **{k: v for one in "qkvo" for k, v in _pair(f"self_attn.{one}_proj").items()},
                    **_pair("mlp.up_proj", INNER),
                    **_pair("mlp.down_proj", WIDTH, INNER),
                },
                "model.layers.{i}.",
            ),
        },
        _rugpt,
        5e-3,
    ),
    "cogvlm": Coded(
        {
            **{k: v for k, v in _BASE.items() if k != "num_key_value_heads"},
            "architectures": ["CogVLMForCausalLM"],
            "model_type": "cogvlm",
            "vision_config": {"hidden_size": 32},
        },
        {
            **_ends("model.embed_tokens", "model.norm"),
            "model.vision.patch_embedding.cls_embedding": (1, 32),
            **_layers(
                {
                    **_LLAMA_NORMS,
                    **{
                        f"self_attn.{one}_expert_query_key_value.weight": (3 * WIDTH, WIDTH)
                        for one in ("vision", "language")
                    },
                    **{f"self_attn.{one}_expert_dense.weight": (WIDTH, WIDTH) for one in ("vision", "language")},
                    **_mlp("mlp.language_mlp."),
                    **_mlp("mlp.vision_mlp."),
                },
                "model.layers.{i}.",
            ),
        },
        _cogvlm,
        ubatch=1,
    ),
    "deepseek_ocr": Coded(
        {
            **_BASE,
            "architectures": ["DeepseekOCRForCausalLM"],
            "model_type": "DeepseekOCR",
            "num_key_value_heads": HEADS,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "use_mla": False,
            "norm_topk_prob": False,
            "vision_config": {"image_size": 1024},
        },
        {
            **_ends("model.embed_tokens", "model.norm"),
            "model.sam_model.pos_embed": (1, 4, 4, 8),
            **_layers({**_LLAMA_NORMS, **_q_k_v_o(kv=HEADS)}, "model.layers.{i}."),
            **_layers(_mlp(), "model.layers.0."),
            **_layers({**_EXPERTS, **_mlp("mlp.shared_experts.", 32)}, "model.layers.1."),
        },
        _ocr,
    ),
    "sarashina2_vision": Coded(
        {
            "architectures": ["Sarashina2VisionForCausalLM"],
            "model_type": "sarashina2_vision",
            "text_config": {**_BASE, "model_type": "llama", "rope_theta": 10000.0},
            "vision_config": {"hidden_size": 32},
        },
        {
            **_ends("llm.model.embed_tokens", "llm.model.norm", "llm.lm_head.weight"),
            "norm.weight": (WIDTH,),
            "visual.merger.ln_q.weight": (32,),
            **_layers({**_LLAMA_NORMS, **_q_k_v_o(), **_mlp()}, "llm.model.layers.{i}."),
        },
        _sarashina,
    ),
    "chameleon": Coded(
        {
            **_BASE,
            "architectures": ["ChameleonForConditionalGeneration"],
            "model_type": "chameleon",
            "vocab_size": _BIG,
            "rope_theta": 10000.0,
            "swin_norm": False,
        },
        {
            "model.embed_tokens.weight": (_BIG, WIDTH),
            "model.norm.weight": (WIDTH,),
            "lm_head.weight": (_BIG, WIDTH),
            "model.vqmodel.post_quant_conv.weight": (4, 4),
            **_layers(
                {
                    **_LLAMA_NORMS,
                    **_q_k_v_o(),
                    **_mlp(),
                    "self_attn.q_norm.weight": (HEADS, SIZE),
                    "self_attn.q_norm.bias": (HEADS, SIZE),
                    "self_attn.k_norm.weight": (KV, SIZE),
                    "self_attn.k_norm.bias": (KV, SIZE),
                },
                "model.layers.{i}.",
            ),
        },
        _chameleon,
    ),
}
