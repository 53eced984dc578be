"""The metadata of an architecture: its hyperparameters as key-values, from ``config.json``.

Keys, their order and their defaults are those of llama.cpp's converter (``TextModel.set_gguf_parameters``), so that its
files and ours say the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.arch.config import ALIASES, Config, _head_dim
from adapterkit.gguf.arch.pooling import MODULES, pooling
from adapterkit.gguf.arch.rope import kind_of, scaling
from adapterkit.gguf.metadata import Entry, array, boolean, f32, text, u32
from adapterkit.gguf.reader import BOOL, F32, I32, STRING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.gguf.arch.spec import ArchSpec

REALS = frozenset(
    (
        "attention.layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon",
        "attention.clamp_kqv",
        "attention.max_alibi_bias",
        "attention.scale",
        "attention.output_scale",
        "router_logit_softcapping",
        "expert_group_scale",
        "attention.temperature_scale",
        "attn_logit_softcapping",
        "final_logit_softcapping",
        "embedding_scale",
        "residual_scale",
        "logit_scale",
        "expert_weights_scale",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scaling.factor",
        "rope.scaling.attn_factor",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_log_multiplier",
        "activation_sparsity_scale",
        "attention.value_scale",
        "vision.image_mean",
        "vision.image_std",
        "vision.attention.layer_norm_epsilon",
        "audio.attention.layer_norm_epsilon",
        "swiglu_clamp_exp",
        "swiglu_clamp_shexp",
        "xielu.alpha_p",
        "xielu.alpha_n",
        "xielu.beta",
        "xielu.eps",
    )
)
POOLED = "pooling_type"
ROPE_BASE = 10000.0  # what llama.cpp takes where a file does not say it
UNPREFIXED = ("xielu.", "diffusion.")  # keys that llama.cpp names without the architecture
# llama.cpp's ExpertGatingFuncType; dots.llm1 calls the sigmoid of DeepSeek V3 by the way that experts are chosen
GATING = {"noaux_tc": 2, "softmax": 1, "sigmoid": 2, "sqrtsoftplus": 4}


def hyperparameters(spec: ArchSpec, config: Config) -> dict[str, Any]:
    """Keys without the architecture's name, and their values.

    Raises:
        CheckpointError: the config does not say what is needed, or this architecture's runtime cannot run it.
    """
    if spec.check is not None:
        spec.check(config)
    scaled = scaling(spec, config).keys
    if not spec.common and kind_of(config.rope) == "longrope":
        scaled = {}  # such a row has keys of its own for it
    found: dict[str, Any] = dict(common(config, scaled)) if spec.common else dict(scaled)
    theta = config.rope.get("rope_theta")
    if not spec.common and theta is not None and theta != ROPE_BASE:
        found["rope.freq_base"] = theta
    for name in spec.leave:
        found.pop(name, None)
    for key in spec.keys:
        if callable(key.source):
            value = key.source(config)
        else:
            names = (key.source,) if isinstance(key.source, str) else key.source
            fields = [field for name in names for field in ALIASES.get(name, (name,))]
            value = config.need(*fields) if key.needed else config.get(*fields)
        value = key.default if value is None else value
        if value is not None:
            found.pop(key.name, None)
            found[key.name] = value
    if POOLED not in found and MODULES in config.files:
        kind = pooling(config)
        if kind is not None:
            found[POOLED] = kind
    return found


def common(config: Config, scaled: dict[str, Any]) -> dict[str, Any]:
    """The keys that most architectures share; ``scaled``: those of scaled rotary embeddings."""
    found: dict[str, Any] = {"block_count": config.number("layers")}

    def put(key: str, *names: str) -> None:
        value = config.get(*names)
        if value is not None:
            found[key] = value

    put("context_length", *ALIASES["context"][:6])
    put("embedding_length", "hidden_size", "n_embd", "dim")
    put("feed_forward_length", *_WIDTHS)
    put("attention.head_count", "num_attention_heads", "n_head", "n_heads")
    put("attention.head_count_kv", "num_key_value_heads", "n_kv_heads")
    if config.get("is_causal") is False:
        found["attention.causal"] = False
    found |= scaled | rope_keys(config)
    put("attention.layer_norm_rms_epsilon", "rms_norm_eps", "norm_eps")
    put("attention.layer_norm_epsilon", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    put("expert_count", "num_local_experts", "num_experts", "n_routed_experts")
    put("expert_used_count", "num_experts_per_tok", "num_experts_per_token", "top_k_experts")
    groups, used = config.get("n_group"), config.get("topk_group")
    if isinstance(groups, int) and isinstance(used, int) and used >= groups:
        groups = used = 1  # all groups are used: there is nothing to choose
    if config.model_type == "deepseek_v2" and config.get("topk_method", default="greedy") == "greedy":
        groups = used = 1  # DeepSeek V2 says groups that it chooses nothing by
    found |= {k: v for k, v in zip(_GROUPS, (groups, used), strict=True) if v is not None}
    gating = config.get(*_GATING)
    if gating is not None:
        if gating not in GATING:
            raise CheckpointError(f"{config.ref}: experts are chosen by '{gating}', which GGUF has no number for", "")
        found["expert_gating_func"] = GATING[gating]
    head_dim = config.get("head_dim")
    if head_dim is not None:
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    return found


_GROUPS = ("expert_group_count", "expert_group_used_count")
_WIDTHS = ("prefix_dense_intermediate_size", "dense_intermediate_size", "intermediate_size", "n_inner", "hidden_dim")
_GATING = (
    *("score_function", "scoring_func", "score_func", "moe_router_activation", "moe_router_activation_func"),
    "expert_selection_fn",
)


def rope_keys(config: Config) -> dict[str, Any]:
    """Rotary embeddings: base and sections; for their scaling see `adapterkit.gguf.arch.rope`."""
    found: dict[str, Any] = {}
    rope = config.rope
    sections = config.rope_by_kind.get("mrope_section")
    if isinstance(sections, list):
        found["rope.dimension_sections"] = [*sections, 0, 0, 0, 0][:4]
    if rope.get("rope_theta") is not None:
        found["rope.freq_base"] = rope["rope_theta"]
    local = config.rope_by_kind.get("sliding_attention")
    if isinstance(local, dict) and local.get("rope_theta") is not None:
        found["rope.freq_base_swa"] = local["rope_theta"]
    return found


def hyper_entries(arch: str, values: Mapping[str, Any]) -> list[Entry]:
    """Key-values as bytes, with the types that llama.cpp's converter gives them."""
    return [hyper_entry(full_key(arch, name), name, value) for name, value in values.items()]


def full_key(arch: str, name: str) -> str:
    """The key of a file for a name within an architecture's own metadata."""
    return name if name.startswith(UNPREFIXED) else f"{arch}.{name}"


# Ends of names of keys that are counts.
_COUNTS = ("_count", "_length", "_count_kv", "dimension_count", "sliding_window")


def hyper_entry(key: str, name: str, value: Any) -> Entry:
    if isinstance(value, list):
        kind = I32
        if value and isinstance(value[0], bool):
            kind = BOOL
        elif value and isinstance(value[0], str):
            kind = STRING
        elif name in REALS:
            kind = F32
        return array(key, kind, [float(one) if kind == F32 else one for one in value])
    if isinstance(value, bool):
        return boolean(key, value)
    if isinstance(value, str) and name not in REALS and not name.endswith(_COUNTS):
        return text(key, value)
    if name in REALS:
        if isinstance(value, str):
            raise CheckpointError(f"the config gives {value!r} for '{name}', which is no number", "correct config.json")
        return f32(key, float(value))
    if not isinstance(value, (int, float)) or value != int(value) or not 0 <= value < 1 << 32:
        raise CheckpointError(f"the config gives {value!r} for '{name}', which is no count", "correct config.json")
    return u32(key, int(value))


def layer_kinds(config: Config, kind: str) -> list[bool] | None:
    """Which layers are of a kind, by ``layer_types``."""
    found = config.get("layer_types")
    return [one == kind for one in found] if isinstance(found, list) else None


def rotary_dim(config: Config, default: float = 1.0) -> int:
    """Rotated dimensions of a head."""
    return int(float(config.rope.get("partial_rotary_factor", default)) * _head_dim(config))
