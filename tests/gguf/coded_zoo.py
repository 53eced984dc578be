"""Tiny models of decoders with code in their own repository: a config, shapes of tensors, and the function in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reference import (
    SILU,
    Tensor,
    alibi,
    attend,
    gelu,
    heads,
    linear,
    mlp,
    norm,
    relu2,
    rms,
    rope,
)

Weights = dict[str, Tensor]
VOCAB, WIDTH, LAYERS, HEADS, KV, SIZE, INNER = 288, 64, 2, 4, 2, 16, 96


@dataclass(frozen=True)
class Coded:
    """One model.

    Attributes:
        config: its ``config.json``.
        shapes: of its tensors; ``{i}`` stands for each layer, ``{e}`` for each of four experts.
        run: logits ``[t, vocab]`` of its weights and token numbers.
        tolerance: of log-probabilities.
        causal: whether the next token is asked for, and not an embedding.
        head: of the tensor that logits come from; none where hidden states do.
        scale: of the random weights.
        ubatch: tokens that the runtime computes at a time; 0 for as many as it likes.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    run: Callable[[Weights, Tensor], Tensor] | None
    tolerance: float = 1e-5
    causal: bool = True
    head: str = "lm_head.weight"
    ubatch: int = 0
    scale: float = 0.15


def tensors(one: Coded, seed: int = 0) -> Weights:
    """Random float32 weights; those of norms are around 1."""
    generator = torch.Generator().manual_seed(seed)
    found: Weights = {}
    layers = int(one.config.get("num_hidden_layers") or one.config.get("n_layer") or LAYERS)
    for name, shape in one.shapes.items():
        for layer in range(layers) if "{i}" in name else (0,):
            for expert in range(4) if "{e}" in name else (0,):
                values = torch.randn(shape, generator=generator) * one.scale
                own = name.replace("{i}", str(layer)).replace("{e}", str(expert))
                near_one = len(shape) == 1 and own.endswith("weight")
                found[own] = values + 1.0 if near_one else values
    return found


def build(folder: Path, one: Coded) -> Weights:
    """A folder with such a model; its weights in float64."""
    from safetensors.torch import save_file

    found = tensors(one)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(one.config))
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return {name: tensor.double() for name, tensor in found.items()}


def logprobs_of(one: Coded, weights: Weights, prompts: Any) -> Any:
    """Float64 ``[prompts, vocab]`` of the token after each prompt."""
    import numpy as np

    assert one.run is not None
    return np.array([one.run(weights, torch.tensor(p))[-1].log_softmax(-1).numpy() for p in prompts])


def embeddings_of(one: Coded, weights: Weights, prompts: Any) -> Any:
    """Float64 ``[prompts, width]``: the mean of the last hidden states, of length 1."""
    import numpy as np

    assert one.run is not None
    bare = {**weights, one.head: torch.eye(WIDTH).double()} if one.head else weights
    means = [one.run(bare, torch.tensor(p)).mean(0) for p in prompts]
    return np.array([(mean / mean.norm()).numpy() for mean in means])


def _layers(shapes: dict[str, tuple[int, ...]], at: str) -> dict[str, tuple[int, ...]]:
    return {at + name: shape for name, shape in shapes.items()}


def _ends(embed: str, last: str, head: str | None = "lm_head.weight", bias: bool = False) -> dict[str, tuple[int, ...]]:
    found = {f"{embed}.weight": (VOCAB, WIDTH), f"{last}.weight": (WIDTH,)}
    found |= {f"{last}.bias": (WIDTH,)} if bias else {}
    return found | ({head: (VOCAB, WIDTH)} if head else {})


def _q_k_v_o(where: str = "self_attn.", out: str = "o_proj", kv: int = KV) -> dict[str, tuple[int, ...]]:
    return {
        f"{where}q_proj.weight": (HEADS * SIZE, WIDTH),
        f"{where}k_proj.weight": (kv * SIZE, WIDTH),
        f"{where}v_proj.weight": (kv * SIZE, WIDTH),
        f"{where}{out}.weight": (WIDTH, HEADS * SIZE),
    }


def _mlp(where: str = "mlp.", inner: int = INNER) -> dict[str, tuple[int, ...]]:
    return {
        f"{where}gate_proj.weight": (inner, WIDTH),
        f"{where}up_proj.weight": (inner, WIDTH),
        f"{where}down_proj.weight": (WIDTH, inner),
    }


_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_LLAMA_NORMS = {"input_layernorm.weight": (WIDTH,), "post_attention_layernorm.weight": (WIDTH,)}
_QK = {"self_attn.q_norm.weight": (SIZE,), "self_attn.k_norm.weight": (SIZE,)}
_GPT2 = {"n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "n_positions": 128, "layer_norm_epsilon": 1e-5}


def plain(
    w: Weights,
    ids: Tensor,
    *,
    embed: str = "model.embed_tokens",
    last: str = "model.norm",
    head: str = "lm_head",
    layer: Callable[[Weights, Tensor, int], Tensor],
    scale: float = 1.0,
    out: float = 1.0,
    layers: int = LAYERS,
) -> Tensor:
    """Embedding, layers, RMS norm, output layer."""
    x = w[f"{embed}.weight"][ids] * scale
    for index in range(layers):
        own = f".{index}."
        x = layer({n.partition(own)[2]: t for n, t in w.items() if own in n}, x, index)
    return functional_linear(rms(x, w[f"{last}.weight"]), w[f"{head}.weight"]) * out


def functional_linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


def qkv(w: Weights, x: Tensor, where: str = "self_attn.") -> tuple[Tensor, Tensor, Tensor]:
    """Heads of queries, keys and values."""
    return tuple(heads(linear(x, w, f"{where}{one}_proj"), n) for one, n in (("q", HEADS), ("k", KV), ("v", KV)))  # type: ignore[return-value]


# ------------------------------------------------------------------ the models


def _codeshell(w: Weights, ids: Tensor) -> Tensor:
    x = w["transformer.wte.weight"][ids]
    for index in range(LAYERS):
        at = f"transformer.h.{index}."
        found = linear(norm(x, w[at + "ln_1.weight"], w[at + "ln_1.bias"]), w, at + "attn.c_attn")
        q, k, v = found.split((HEADS * SIZE, KV * SIZE, KV * SIZE), -1)
        mixed = attend(rope(heads(q, HEADS)), rope(heads(k, KV)), heads(v, KV))
        x = x + linear(mixed, w, at + "attn.c_proj")
        inner = linear(norm(x, w[at + "ln_2.weight"], w[at + "ln_2.bias"]), w, at + "mlp.c_fc")
        x = x + linear(gelu(inner), w, at + "mlp.c_proj")
    return linear(norm(x, w["transformer.ln_f.weight"], w["transformer.ln_f.bias"]), w, "lm_head")


def _refact(w: Weights, ids: Tensor) -> Tensor:
    def layer(w: Weights, x: Tensor, index: int) -> Tensor:
        y = rms(x, w["ln_1.weight"], 1e-5)
        k, v = linear(y, w, "attn.kv").chunk(2, -1)
        mixed = attend(heads(linear(y, w, "attn.q"), HEADS), heads(k, 1), heads(v, 1), bias=alibi(HEADS, len(x)))
        x = x + linear(mixed, w, "attn.c_proj")
        gate, up = linear(rms(x, w["ln_2.weight"], 1e-5), w, "mlp.gate_up_proj").chunk(2, -1)
        return x + linear(SILU(gate) * up, w, "mlp.c_proj")

    return plain({**w}, ids, embed="transformer.wte", last="transformer.ln_f", layer=layer)


def _jais(tied: bool) -> Callable[[Weights, Tensor], Tensor]:
    def run(w: Weights, ids: Tensor) -> Tensor:
        x = w["transformer.wte.weight"][ids] * 2.5
        for index in range(LAYERS):
            at = f"transformer.h.{index}."
            y = norm(x, w[at + "ln_1.weight"], w[at + "ln_1.bias"])
            q, k, v = (y @ w[at + "attn.c_attn.weight"] + w[at + "attn.c_attn.bias"]).chunk(3, -1)
            mixed = attend(heads(q, HEADS), heads(k, HEADS), heads(v, HEADS), scale=1 / SIZE, bias=alibi(HEADS, len(x)))
            x = x + mixed @ w[at + "attn.c_proj.weight"] + w[at + "attn.c_proj.bias"]
            y = norm(x, w[at + "ln_2.weight"], w[at + "ln_2.bias"])
            up = y @ w[at + "mlp.c_fc.weight"] + w[at + "mlp.c_fc.bias"]
            gate = y @ w[at + "mlp.c_fc2.weight"] + w[at + "mlp.c_fc2.bias"]
            x = x + (up * SILU(gate)) @ w[at + "mlp.c_proj.weight"] + w[at + "mlp.c_proj.bias"]
        x = norm(x, w["transformer.ln_f.weight"], w["transformer.ln_f.bias"])
        return x @ w["transformer.wte.weight" if tied else "lm_head.weight"].T * 0.7

    return run


def _openelm(w: Weights, ids: Tensor) -> Tensor:
    def layer(w: Weights, x: Tensor, index: int) -> Tensor:
        count, groups = (2, 1) if index == 0 else (4, 2)
        found = heads(linear(rms(x, w["attn_norm.weight"]), w, "attn.qkv_proj"), count + 2 * groups)
        q, k, v = found.split((count, groups, groups))
        q, k = rope(rms(q, w["attn.q_norm.weight"])), rope(rms(k, w["attn.k_norm.weight"]))
        x = x + linear(attend(q, k, v), w, "attn.out_proj")
        gate, up = linear(rms(x, w["ffn_norm.weight"]), w, "ffn.proj_1").chunk(2, -1)
        return x + linear(SILU(gate) * up, w, "ffn.proj_2")

    at = "transformer."
    return plain(w, ids, embed=f"{at}token_embeddings", last=f"{at}norm", head=f"{at}token_embeddings", layer=layer)


def _plm(w: Weights, ids: Tensor) -> Tensor:
    def layer(w: Weights, x: Tensor, index: int) -> Tensor:
        y = rms(x, w["input_layernorm.weight"])
        q = heads(linear(y, w, "self_attn.q_proj"), HEADS)
        low, shared = linear(y, w, "self_attn.kv_a_proj_with_mqa").split((32, 8), -1)
        k, v = heads(linear(rms(low, w["self_attn.kv_a_layernorm.weight"]), w, "self_attn.kv_b_proj"), HEADS).split(
            (16, 16), -1
        )
        q = torch.cat((q[..., :16], rope(q[..., 16:], pairs=True)), -1)
        k = torch.cat((k, rope(shared[None], pairs=True).expand(HEADS, -1, -1)), -1)
        x = x + linear(attend(q, k, v), w, "self_attn.o_proj")
        up = linear(rms(x, w["post_attention_layernorm.weight"]), w, "mlp.up_proj")
        return x + linear(relu2(up), w, "mlp.down_proj")

    return plain(w, ids, head="model.embed_tokens", layer=layer)


def _plamo(w: Weights, ids: Tensor) -> Tensor:
    def layer(w: Weights, x: Tensor, index: int) -> Tensor:
        y = rms(x, w["norm.weight"])
        q, k, v = qkv(w, y)
        k, v = k.repeat(2, 1, 1), v.repeat(2, 1, 1)  # head h attends to key head h mod 2
        mixed = linear(attend(rope(q), rope(k), v), w, "self_attn.o_proj")
        return x + mixed + mlp(y, w, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

    return plain(w, ids, layer=layer)


def _plamo3(w: Weights, ids: Tensor) -> Tensor:
    def layer(w: Weights, x: Tensor, index: int) -> Tensor:
        y = rms(x, 1 + w["pre_mixer_norm.weight"])
        q, k, v = heads(linear(y, w, "mixer.qkv_proj"), HEADS + 2 * KV).split((HEADS, KV, KV))
        q, k = rope(rms(q, 1 + w["mixer.q_norm.weight"])), rope(rms(k, 1 + w["mixer.k_norm.weight"]))
        x = x + rms(linear(attend(q, k, v), w, "mixer.o_proj"), 1 / 5 + w["post_mixer_norm.weight"])
        gate, up = linear(rms(x, 1 + w["pre_mlp_norm.weight"]), w, "mlp.gate_up_proj").chunk(2, -1)
        return x + rms(linear(SILU(gate) * up, w, "mlp.down_proj"), 1 / 5**1.5 + w["post_mlp_norm.weight"])

    return plain({**w, "last.weight": 1 + w["model.norm.weight"]}, ids, last="last", layer=layer)


def _llama_layer(w: Weights, x: Tensor, index: int, *, turn: Any = rope, causal: bool = True) -> Tensor:
    q, k, v = qkv(w, rms(x, w["input_layernorm.weight"]))
    x = x + linear(attend(turn(q), turn(k), v, causal=causal), w, "self_attn.o_proj")
    y = rms(x, w["post_attention_layernorm.weight"])
    return x + mlp(y, w, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def _maincoder(w: Weights, ids: Tensor) -> Tensor:
    def layer(w: Weights, x: Tensor, index: int) -> Tensor:
        q, k, v = qkv(w, rms(x, w["input_layernorm.weight"]))
        q = rms(rope(q, pairs=True), w["self_attn.q_norm.weight"])
        k = rms(rope(k, pairs=True), w["self_attn.k_norm.weight"])
        x = x + linear(attend(q, k, v), w, "self_attn.o_proj")
        y = rms(x, w["post_attention_layernorm.weight"])
        return x + mlp(y, w, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

    return plain(w, ids, layer=layer)


def _nanbeige(w: Weights, ids: Tensor) -> Tensor:
    x = w["model.embed_tokens.weight"][ids]
    for _ in range(2):
        for index in range(LAYERS):
            at = f"model.layers.{index}."
            x = _llama_layer({n.removeprefix(at): t for n, t in w.items() if n.startswith(at)}, x, index)
        x = rms(x, w["model.norm.weight"])
    return linear(x, w, "lm_head")


def _llada(w: Weights, ids: Tensor) -> Tensor:
    def layer(w: Weights, x: Tensor, index: int) -> Tensor:
        q, k, v = qkv(w, rms(x, w["attn_norm.weight"]), "")
        x = x + linear(attend(rope(q), rope(k), v, causal=False), w, "attn_out")
        return x + mlp(rms(x, w["ff_norm.weight"]), w, "ff_proj", "up_proj", "ff_out")

    at = "model.transformer."
    return plain(w, ids, embed=f"{at}wte", last=f"{at}ln_f", head=f"{at}ff_out", layer=layer)


def _spark(w: Weights, ids: Tensor) -> Tensor:
    def layer(w: Weights, x: Tensor, index: int) -> Tensor:
        y = rms(x, w["input_layernorm.weight"])
        q, k, v = heads(linear(y, w, "self_attn.q_k_v_proj"), HEADS + 2 * KV).split((HEADS, KV, KV))
        theta, size, window = (10000.0, 16, 4) if index == 0 else (500000.0, 8, None)
        mixed = attend(rope(q, theta, size), rope(k, theta, size), v, window=window).view(len(x), HEADS, SIZE)
        gate = torch.sigmoid(linear(y, w, "self_attn.g_proj"))
        x = x + linear((mixed * gate[..., None]).flatten(1), w, "self_attn.o_proj")
        y = rms(x, w["post_attention_layernorm.weight"])
        return x + mlp(y, w, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", gelu)

    return plain(w, ids, layer=layer)


_BIASED = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_TWO_NORMS = {f"ln_{n}.{end}": (WIDTH,) for n in (1, 2) for end in ("weight", "bias")}
_JAIS_CONFIG = {
    **_GPT2,
    "architectures": ["JAISLMHeadModel"],
    "model_type": "jais",
    "vocab_size": VOCAB,
    "n_inner": INNER,
    "activation_function": "swiglu",
    "position_embedding_type": "alibi",
    "mup_embeddings_scale": 2.5,
    "mup_output_alpha": 1.4,
    "mup_width_scale": 0.5,
    "mup_scale_qk_dot_by_d": True,
}
_JAIS_SHAPES = {
    **_ends("transformer.wte", "transformer.ln_f", bias=True),
    "transformer.relative_pe.slopes": (HEADS, 1, 1),
    **_layers(
        {
            **_TWO_NORMS,
            "attn.c_attn.weight": (WIDTH, 3 * WIDTH),
            "attn.c_attn.bias": (3 * WIDTH,),
            "attn.c_proj.weight": (WIDTH, WIDTH),
            "attn.c_proj.bias": (WIDTH,),
            "mlp.c_fc.weight": (WIDTH, INNER),
            "mlp.c_fc.bias": (INNER,),
            "mlp.c_fc2.weight": (WIDTH, INNER),
            "mlp.c_fc2.bias": (INNER,),
            "mlp.c_proj.weight": (INNER, WIDTH),
            "mlp.c_proj.bias": (WIDTH,),
        },
        "transformer.h.{i}.",
    ),
}

DENSE: dict[str, Coded] = {
    "codeshell": Coded(
        {
            **_GPT2,
            "architectures": ["CodeShellForCausalLM"],
            "model_type": "codeshell",
            "vocab_size": VOCAB,
            "num_query_groups": KV,
            "group_query_attention": True,
            "position_embedding_type": "rope",
            "activation_function": "gelu_pytorch_tanh",
        },
        {
            **_ends("transformer.wte", "transformer.ln_f", bias=True),
            **_layers(
                {
                    **_TWO_NORMS,
                    "attn.c_attn.weight": ((HEADS + 2 * KV) * SIZE, WIDTH),
                    "attn.c_attn.bias": ((HEADS + 2 * KV) * SIZE,),
                    "attn.c_proj.weight": (WIDTH, WIDTH),
                    "attn.c_proj.bias": (WIDTH,),
                    "mlp.c_fc.weight": (4 * WIDTH, WIDTH),
                    "mlp.c_fc.bias": (4 * WIDTH,),
                    "mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
                    "mlp.c_proj.bias": (WIDTH,),
                },
                "transformer.h.{i}.",
            ),
        },
        _codeshell,
        5e-3,
    ),
    "refact": Coded(
        {
            **_GPT2,
            "architectures": ["GPTRefactForCausalLM"],
            "model_type": "gpt_refact",
            "vocab_size": VOCAB,
            "multi_query": True,
        },
        {
            **_ends("transformer.wte", "transformer.ln_f"),
            **_layers(
                {
                    "ln_1.weight": (WIDTH,),
                    "ln_2.weight": (WIDTH,),
                    "attn.q.weight": (WIDTH, WIDTH),
                    "attn.kv.weight": (2 * SIZE, WIDTH),
                    "attn.c_proj.weight": (WIDTH, WIDTH),
                    "mlp.gate_up_proj.weight": (512, WIDTH),
                    "mlp.c_proj.weight": (WIDTH, 256),
                },
                "transformer.h.{i}.",
            ),
        },
        _refact,
    ),
    "jais": Coded({**_JAIS_CONFIG, "tie_word_embeddings": False}, _JAIS_SHAPES, _jais(False)),
    "jais_tied": Coded(_JAIS_CONFIG, {n: s for n, s in _JAIS_SHAPES.items() if n != "lm_head.weight"}, _jais(True)),
    "openelm": Coded(
        {
            "architectures": ["OpenELMForCausalLM"],
            "model_type": "openelm",
            "vocab_size": VOCAB,
            "model_dim": WIDTH,
            "num_transformer_layers": LAYERS,
            "num_query_heads": [2, 4],
            "num_kv_heads": [1, 2],
            "head_dim": SIZE,
            "ffn_multipliers": [1.0, 1.5],
            "ffn_dim_divisor": 32,
            "max_context_length": 128,
            "rope_freq_constant": 10000,
            "normalize_qk_projections": True,
            "share_input_output_layers": True,
            "ffn_with_glu": True,
            "activation_fn_name": "swish",
            "normalization_layer_name": "rms_norm",
        },
        {
            **_ends("transformer.token_embeddings", "transformer.norm", None),
            **_layers(
                {
                    "attn_norm.weight": (WIDTH,),
                    "ffn_norm.weight": (WIDTH,),
                    "attn.q_norm.weight": (SIZE,),
                    "attn.k_norm.weight": (SIZE,),
                },
                "transformer.layers.{i}.",
            ),
            "transformer.layers.0.attn.qkv_proj.weight": (4 * SIZE, WIDTH),
            "transformer.layers.0.attn.out_proj.weight": (WIDTH, 2 * SIZE),
            "transformer.layers.0.ffn.proj_1.weight": (128, WIDTH),
            "transformer.layers.0.ffn.proj_2.weight": (WIDTH, 64),
            "transformer.layers.1.attn.qkv_proj.weight": (8 * SIZE, WIDTH),
            "transformer.layers.1.attn.out_proj.weight": (WIDTH, 4 * SIZE),
            "transformer.layers.1.ffn.proj_1.weight": (192, WIDTH),
            "transformer.layers.1.ffn.proj_2.weight": (WIDTH, 96),
        },
        _openelm,
    ),
    "plm": Coded(
        {
            **_BASE,
            "architectures": ["PLMForCausalLM"],
            "model_type": "plm",
            "num_key_value_heads": HEADS,
            "hidden_act": "relu2",
            "tie_word_embeddings": True,
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "rope_theta": 10000.0,
            "attention_bias": False,
        },
        {
            **_ends("model.embed_tokens", "model.norm", None),
            **_layers(
                {
                    **_LLAMA_NORMS,
                    "self_attn.q_proj.weight": (HEADS * 24, WIDTH),
                    "self_attn.kv_a_proj_with_mqa.weight": (40, WIDTH),
                    "self_attn.kv_a_layernorm.weight": (32,),
                    "self_attn.kv_b_proj.weight": (HEADS * 32, 32),
                    "self_attn.o_proj.weight": (WIDTH, HEADS * 16),
                    "mlp.up_proj.weight": (INNER, WIDTH),
                    "mlp.down_proj.weight": (WIDTH, INNER),
                },
                "model.layers.{i}.",
            ),
        },
        _plm,
    ),
    "plamo": Coded(
        {
            **{k: v for k, v in _BASE.items() if k != "num_key_value_heads"},
            "architectures": ["PlamoForCausalLM"],
            "model_type": "plamo",
            "n_shared_head": 2,
        },
        {
            **_ends("model.embed_tokens", "model.norm"),
            **_layers({"norm.weight": (WIDTH,), **_q_k_v_o(), **_mlp()}, "model.layers.layers.{i}."),
        },
        _plamo,
    ),
    "plamo3": Coded(
        {
            **_BASE,
            "architectures": ["Plamo3ForCausalLM"],
            "model_type": "plamo3",
            "head_dim": SIZE,
            "window_size": 64,
            "sliding_window_pattern": 8,
            "rope_theta": 10000.0,
            "rope_local_theta": 10000.0,
        },
        {
            **_ends("model.embed_tokens", "model.norm"),
            **_layers(
                {
                    **{f"{one}_norm.weight": (WIDTH,) for one in ("pre_mixer", "post_mixer", "pre_mlp", "post_mlp")},
                    "mixer.qkv_proj.weight": ((HEADS + 2 * KV) * SIZE, WIDTH),
                    "mixer.o_proj.weight": (WIDTH, HEADS * SIZE),
                    "mixer.q_norm.weight": (SIZE,),
                    "mixer.k_norm.weight": (SIZE,),
                    "mlp.gate_up_proj.weight": (2 * INNER, WIDTH),
                    "mlp.down_proj.weight": (WIDTH, INNER),
                },
                "model.layers.layers.{i}.",
            ),
        },
        _plamo3,
    ),
    "maincoder": Coded(
        {
            **_BASE,
            "architectures": ["MaincoderForCausalLM"],
            "model_type": "maincoder",
            "head_dim": SIZE,
            "rope_theta": 10000.0,
        },
        {
            **_ends("model.embed_tokens", "model.norm"),
            **_layers({**_LLAMA_NORMS, **_q_k_v_o(), **_QK, **_mlp()}, "model.layers.{i}."),
        },
        _maincoder,
    ),
    "nanbeige": Coded(
        {
            **_BASE,
            "architectures": ["NanbeigeForCausalLM"],
            "model_type": "nanbeige",
            "num_loops": 2,
            "rope_theta": 10000.0,
        },
        {
            **_ends("model.embed_tokens", "model.norm"),
            **_layers({**_LLAMA_NORMS, **_q_k_v_o(), **_mlp()}, "model.layers.{i}."),
        },
        _nanbeige,
    ),
    "llada": Coded(
        {
            "architectures": ["LLaDAModelLM"],
            "model_type": "llada",
            "vocab_size": VOCAB,
            "d_model": WIDTH,
            "n_heads": HEADS,
            "n_kv_heads": KV,
            "n_layers": LAYERS,
            "mlp_hidden_size": INNER,
            "max_sequence_length": 128,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "weight_tying": False,
            "activation_type": "silu",
            "block_type": "llama",
            "layer_norm_type": "rms",
        },
        {
            **_ends("model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out.weight"),
            **_layers(
                {
                    "attn_norm.weight": (WIDTH,),
                    "ff_norm.weight": (WIDTH,),
                    **_q_k_v_o("", "attn_out"),
                    "ff_proj.weight": (INNER, WIDTH),
                    "up_proj.weight": (INNER, WIDTH),
                    "ff_out.weight": (WIDTH, INNER),
                },
                "model.transformer.blocks.{i}.",
            ),
        },
        _llada,
        causal=False,
        head="model.transformer.ff_out.weight",
    ),
    "spark2_5": Coded(
        {
            **_BASE,
            "architectures": ["Spark2_5ForCausalLM"],
            "model_type": "spark2_5",
            "head_dim": SIZE,
            "hidden_act": "gelu",
            "gate_attn_act_mode": "sigmoid",
            "headwise_attn_output_gate": True,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500000.0, "partial_rotary_factor": 0.5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
            },
        },
        {
            **_ends("model.embed_tokens", "model.norm"),
            **_layers(
                {
                    **_LLAMA_NORMS,
                    "self_attn.q_k_v_proj.weight": ((HEADS + 2 * KV) * SIZE, WIDTH),
                    "self_attn.g_proj.weight": (HEADS, WIDTH),
                    "self_attn.o_proj.weight": (WIDTH, HEADS * SIZE),
                    **_mlp(),
                },
                "model.layers.{i}.",
            ),
        },
        _spark,
        5e-3,
        scale=0.1,
    ),
}
