"""Tiny transformers models, and the same models as GGUF by a converter of the tests' own.

The converter here is written from the description of the format and of each architecture, beside the code under test:
that the runtime gives the probabilities of transformers for the bases it makes shows that it is right.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_files import add_value

if TYPE_CHECKING:
    import numpy as np

VOCAB = 288
_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
_WINDOW = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}
# kind: (class, config, gguf architecture)
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("LlamaForCausalLM", _BASE, "llama"),
    "llama_tied": ("LlamaForCausalLM", {**_BASE, "tie_word_embeddings": True}, "llama"),
    "mistral": ("MistralForCausalLM", {**_BASE, "sliding_window": None}, "llama"),
    "mixtral": ("MixtralForCausalLM", {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2}, "llama"),
    "qwen2": ("Qwen2ForCausalLM", _BASE, "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", {**_BASE, "head_dim": 16}, "qwen3"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**_BASE, **_EXPERTS, "norm_topk_prob": True}, "qwen3moe"),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            **_BASE,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "gpt-oss",
    ),
    "llama4": (
        "Llama4ForCausalLM",
        {
            **_BASE,
            "head_dim": 16,
            "intermediate_size": 32,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "num_hidden_layers": 4,  # llama.cpp stops at a llama4 without a layer that has no rotary embedding
        },
        "llama4",
    ),
    "gemma2": ("Gemma2ForCausalLM", {**_BASE, **_WINDOW, "tie_word_embeddings": True}, "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", {**_BASE, **_WINDOW, "tie_word_embeddings": True}, "gemma3"),
    "phi3": ("Phi3ForCausalLM", {**_BASE, "num_key_value_heads": 4, "sliding_window": None}, "phi3"),
    "granite": ("GraniteForCausalLM", {**_BASE, "attention_multiplier": 0.25}, "granite"),
    "smollm3": ("SmolLM3ForCausalLM", _BASE, "smollm3"),
    "olmo2": ("Olmo2ForCausalLM", _BASE, "olmo2"),
    "starcoder2": ("Starcoder2ForCausalLM", {**_BASE, "sliding_window": None}, "starcoder2"),
    "stablelm": ("StableLmForCausalLM", _BASE, "stablelm"),
    "gpt2": (
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": VOCAB, "n_positions": 128, "bos_token_id": 1},
        "gpt2",
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {**{k: v for k, v in _BASE.items() if k != "num_key_value_heads"}, "use_parallel_residual": True},
        "gptneox",
    ),
}


def build(folder: Path, kind: str, scale: float = 0.15, **other: Any) -> Any:
    """A random model of a kind, saved in ``folder``, in float32; ``other`` goes before the kind's own config."""
    import torch
    import transformers
    from models import randomize

    name, config, _ = KINDS[kind]
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    model = cls(cls.config_class(**{**config, **other})).float().eval()
    randomize(model, scale=scale)
    model.save_pretrained(folder)
    return model


def to_gguf(folder: Path, kind: str, path: Path, dtype: str = "float32", **other: Any) -> Path:
    """The GGUF file of a model saved by `build` with the same ``other``."""
    import gguf
    from models import read_tensors

    _, config, arch = KINDS[kind]
    config = {**config, **other}
    writer = gguf.GGUFWriter(path, arch)
    saved = json.loads((folder / "config.json").read_text())
    for key, value in metadata(kind, {**saved, **config}).items():
        add_value(writer, key if "." in key and not key.startswith(".") else arch + key, value)
    tokens = ["<unk>", "<s>", "</s>"] + [f"t{number}" for number in range(VOCAB - 3)]
    kinds = [2, 3, 3] + [1] * (VOCAB - 3)
    add_value(writer, "tokenizer.ggml.model", "llama")
    add_value(writer, "tokenizer.ggml.tokens", tokens)
    add_value(writer, "tokenizer.ggml.scores", [float(-number) for number in range(VOCAB)])
    add_value(writer, "tokenizer.ggml.token_type", kinds)
    for name, number in {"unknown": 0, "bos": 1, "eos": 2}.items():
        add_value(writer, f"tokenizer.ggml.{name}_token_id", number)
    number = {name: one for one, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(number, config.get("num_hidden_layers", 2))
    stored = {name: tensor.float().numpy() for name, tensor in read_tensors(folder).items()}
    for name, tensor in converted(stored, kind, config).items():
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert mapped is not None, name
        small = tensor.ndim == 1 or "norm" in mapped or "ffn_gate_inp" in mapped or mapped.endswith(".bias")
        writer.add_tensor(mapped, tensor.astype("float32" if small else dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """Keys that start with a dot get the architecture's name."""
    get = config.get
    heads, width = get("num_attention_heads") or get("n_head"), get("hidden_size") or get("n_embd")
    head_dim = get("head_dim") or width // heads
    found: dict[str, Any] = {
        "general.file_type": 0,
        ".block_count": get("num_hidden_layers", 2),
        ".context_length": 128,
        ".embedding_length": width,
        ".feed_forward_length": get("intermediate_size", 4 * width),
        ".attention.head_count": heads,
        ".attention.head_count_kv": get("num_key_value_heads", heads),
        ".vocab_size": VOCAB,
    }
    if kind in ("gpt2", "gpt_neox", "starcoder2", "stablelm"):
        found[".attention.layer_norm_epsilon"] = 1e-5
    else:
        found[".attention.layer_norm_rms_epsilon"] = get("rms_norm_eps")
    if kind != "gpt2":
        theta = (get("rope_parameters") or {}).get("rope_theta", 10000.0)
        found |= {".rope.freq_base": float(theta), ".rope.dimension_count": head_dim}
    if get("head_dim"):
        found |= {".attention.key_length": head_dim, ".attention.value_length": head_dim}
    if kind == "qwen3_moe":
        found |= {".expert_count": 4, ".expert_used_count": 2}
        found[".expert_feed_forward_length"] = get("moe_intermediate_size")
    if kind == "gpt_oss":
        found |= {".expert_count": 4, ".expert_used_count": 2}
        found[".expert_feed_forward_length"] = get("intermediate_size")
        found[".attention.sliding_window"] = 64
    if kind == "llama4":
        found |= {".expert_count": 4, ".expert_used_count": 1, ".expert_feed_forward_length": 32}
        found |= {".feed_forward_length": 96, ".interleave_moe_layer_step": 1}
    if kind == "mixtral":
        found |= {".expert_count": 4, ".expert_used_count": 2}
    if kind in ("gemma2", "gemma3"):
        found[".attention.sliding_window"] = 64
    if kind == "gemma2":
        found |= {".attn_logit_softcapping": 50.0, ".final_logit_softcapping": 30.0}
    if kind == "gpt_neox":
        found |= {".use_parallel_residual": True, ".rope.dimension_count": head_dim // 4}
    if kind == "stablelm":
        found |= {".use_parallel_residual": False, ".rope.dimension_count": head_dim // 4}
    if kind == "granite":
        found |= {".attention.scale": 0.25, ".embedding_scale": 1.0, ".residual_scale": 1.0, ".logit_scale": 1.0}
    return found


def converted(tensors: dict[str, np.ndarray], kind: str, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Tensors as GGUF has them, still by names that gguf's table knows."""
    import numpy as np

    heads = config.get("num_attention_heads", 4)
    kv_heads = config.get("num_key_value_heads", heads)
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, tensor in tensors.items():
        expert = re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)\.weight", name)
        if expert is not None:
            stacks.setdefault(f"{expert[1]}.experts.{expert[3]}.weight", {})[int(expert[2])] = tensor
            continue
        if name.endswith(("rotary_emb.inv_freq", "masked_bias", ".attn.bias")):
            continue
        value = tensor
        fused = re.fullmatch(r"(.*experts\.)(gate_up|down)_proj(_bias)?", name)
        if fused is not None and kind in ("gpt_oss", "llama4"):
            found |= unturned(value, fused[1], fused[2], "bias" if fused[3] else "weight", kind)
            continue
        if name.endswith("sinks"):
            name += ".weight"
        if kind in ("llama", "llama_tied", "mistral", "mixtral", "granite", "smollm3"):
            if re.search(r"q_proj\.(weight|bias)$", name):
                value = interleave(value, heads)
            if re.search(r"k_proj\.(weight|bias)$", name):
                value = interleave(value, kv_heads)
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if kind == "gpt2" and re.search(r"(c_attn|c_proj|c_fc)\.weight$", name):
            value = value.T.copy()
        if kind == "gpt_neox" and "query_key_value" in name:
            parts = value.reshape(heads, 3, value.shape[0] // heads // 3, *value.shape[1:])
            value = np.concatenate([parts[:, part].reshape(-1, *value.shape[1:]) for part in range(3)])
        if name == "lm_head.weight" and config.get("tie_word_embeddings", kind == "gpt2"):
            continue
        found[name] = value
    for name, stack in stacks.items():
        found[name] = np.stack([stack[number] for number in range(len(stack))])
    return found


def unturned(stack: np.ndarray, stem: str, part: str, leaf: str, kind: str) -> dict[str, np.ndarray]:
    """Experts ``[experts, in, out]`` (or their biases ``[experts, out]``) as GGUF has them, gate and up apart."""
    rows = stack.swapaxes(1, 2) if leaf == "weight" else stack
    if part == "down":
        return {f"{stem}down_proj.{leaf}": rows.copy()}
    half = rows.shape[1] // 2
    gate, up = (rows[:, ::2], rows[:, 1::2]) if kind == "gpt_oss" else (rows[:, :half], rows[:, half:])
    return {f"{stem}gate_proj.{leaf}": gate.copy(), f"{stem}up_proj.{leaf}": up.copy()}


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Each head's two halves in turn: what llama.cpp's rotary embedding of these architectures expects."""
    import numpy as np

    out = np.empty_like(rows)
    width = rows.shape[0] // heads
    for head in range(heads):
        mine = rows[head * width : (head + 1) * width]
        out[head * width : (head + 1) * width : 2] = mine[: width // 2]
        out[head * width + 1 : (head + 1) * width : 2] = mine[width // 2 :]
    return out
