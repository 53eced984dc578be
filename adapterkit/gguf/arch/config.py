"""``config.json`` as the tables ask it: one flat view of the language model, in the spellings of all transformers versions.

The file is data: no class of transformers is made, so neither its version nor code in a repository matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.arch.omitted import completed
from adapterkit.gguf.arch.wellformed import well_formed

TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
VISION_PARTS = ("vision_config", "audio_config", "vision_tower", "mm_vision_tower", "sound_config", "encoder_config")

# Names under which the same number stands in configs, the one of most architectures first.
ALIASES: dict[str, tuple[str, ...]] = {
    "layers": ("n_layers", "num_hidden_layers", "n_layer", "num_layers", "num_transformer_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_head_kv"),
    "hidden": ("hidden_size", "n_embd", "n_embed", "d_model", "dim"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "context": (
        *("max_position_embeddings", "n_ctx", "n_positions", "max_length", "max_sequence_length", "model_max_length"),
        *("max_seq_len", "seq_length"),
    ),
}


class Config:
    """The part of a ``config.json`` that describes the language model.

    Attributes:
        asked: the fields that were asked for so far.
        text_part: the part about the language model alone.

    Args:
        config: the file as data.
        ref: what its checkpoint is called, for errors.
        files: the files beside it, for what other files say of the model.
        where: what it stands in, for errors.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        ref: str = "config.json",
        files: Mapping[str, bytes] | None = None,
        where: str = "config.json",
    ) -> None:
        self.where = where
        self.raw, self.ref, self.files = dict(config), ref, files or {}
        inner: dict[str, Any] = {}
        for key in TEXT_PARTS:
            part = config.get(key)
            if isinstance(part, Mapping):
                inner = {**part, **next((part[k] for k in TEXT_PARTS if isinstance(part.get(k), Mapping)), part)}
                break
        merged = {**config, **inner}
        if where == "config.json":
            well_formed(merged, ref)
            merged = completed(merged, inner)
        self.text: dict[str, Any] = merged
        self.text_part = inner or merged
        self.asked: set[str] = set(_ROPE_FIELDS)
        self._rope = _rope(merged)

    @property
    def model_type(self) -> str:
        return str(self.text.get("model_type") or "")

    @property
    def classes(self) -> tuple[str, ...]:
        """``architectures``: of the whole model, then of its language model."""
        found = []
        for part in (self.raw, self.text):
            names = part.get("architectures")
            if isinstance(names, list):
                found += [str(name) for name in names]
        return tuple(dict.fromkeys(found))

    @property
    def has_vision(self) -> bool:
        thinker = self.raw.get("thinker_config")
        parts = (self.raw, thinker if isinstance(thinker, Mapping) else {})
        return any(key in part for part in parts for key in VISION_PARTS)

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of these fields that is there and not null."""
        self.asked.update(names)
        for name in names:
            if self.text.get(name) is not None:
                return self.text[name]
        return default

    def need(self, *names: str) -> Any:
        """Like `get`, but the field must exist.

        Raises:
            CheckpointError: none of them is there.
        """
        found = self.get(*names)
        if found is None:
            shown = "' or '".join(names[:3])
            raise CheckpointError(
                f"{self.ref}: its {self.where} does not say '{shown}'", "complete it from the base model"
            )
        return found

    def number(self, name: int | str) -> int:
        """A whole number by one of the names of `ALIASES` or `DERIVED`, or of a field.

        Raises:
            CheckpointError: the config does not say it.
        """
        if isinstance(name, int):
            return name
        if name in DERIVED:
            return DERIVED[name](self)
        value = self.need(*ALIASES.get(name, (name,)))
        if isinstance(value, list):
            value = next((one for one in value if isinstance(one, int) and one > 0), 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or value % 1 != 0:
            raise CheckpointError(f"{self.ref}: '{name}' in its {self.where} is not a number", "correct it")
        return int(value)

    def real(self, name: str) -> float:
        """A number, or one of a list: ``mlp_multipliers.1``; or one of `COMPUTED`.

        Raises:
            CheckpointError: the config does not say it.
        """
        if name in COMPUTED:
            return COMPUTED[name](self)
        field, _, index = name.partition(".")
        value = self.need(field)
        try:
            return float(value[int(index)] if index else value)
        except (TypeError, ValueError, IndexError, KeyError):
            raise CheckpointError(f"{self.ref}: '{name}' in its {self.where} is not a number", "correct it") from None

    @property
    def rope(self) -> dict[str, Any]:
        """``rope_parameters`` as transformers 5 writes them, whatever the file has; of layers with full attention when
        kinds of layers differ."""
        full = self._rope.get("full_attention")
        return full if isinstance(full, dict) else self._rope

    @property
    def rope_by_kind(self) -> dict[str, Any]:
        """The same before a kind of layer is chosen."""
        return self._rope


# Fields that `_rope` reads.
_ROPE_FIELDS_WORDS = """
rope_parameters rope_scaling local_rope_theta rope_local_theta rope_theta_local swa_rope_theta rope_local_base_freq
global_rope_theta rope_global_theta rope_theta_global rope_theta rotary_emb_base partial_rotary_factor rope_pct
rope_percent rotary_pct original_max_position_embeddings
"""
_ROPE_FIELDS = frozenset(_ROPE_FIELDS_WORDS.split())


def _rope(text: Mapping[str, Any]) -> dict[str, Any]:
    found = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if isinstance(found, (str, list)):
        raise CheckpointError(f"'rope_parameters' of a config.json is {str(found)[:40]!r}, and no table", "correct it")
    rope: dict[str, Any] = dict(found) if isinstance(found, Mapping) else {}
    if isinstance(rope.get("full_attention"), Mapping) or isinstance(rope.get("sliding_attention"), Mapping):
        return {key: dict(value) if isinstance(value, Mapping) else value for key, value in rope.items()}

    def first(*names: str) -> Any:
        return next((text[name] for name in names if text.get(name) is not None), None)

    local = first("local_rope_theta", "rope_local_theta", "rope_theta_local", "swa_rope_theta", "rope_local_base_freq")
    if local is not None:
        rope["sliding_attention"] = {"rope_theta": local}
    for key, names in {
        "rope_theta": ("global_rope_theta", "rope_global_theta", "rope_theta_global", "rope_theta", "rotary_emb_base"),
        "rope_type": (),
        "partial_rotary_factor": ("partial_rotary_factor", "rope_pct", "rope_percent", "rotary_pct"),
        "original_max_position_embeddings": ("original_max_position_embeddings",),
    }.items():
        value = first(*names) if names else rope.get("type")
        if key not in rope and value is not None:
            rope[key] = value
    return rope


def _kv_heads(config: Config) -> int:
    value = config.get(*ALIASES["kv_heads"])
    if isinstance(value, list):
        value = max((one for one in value if isinstance(one, int)), default=0)
    return int(value) if value else config.number("heads")


def _falcon_kv(config: Config) -> int:
    """transformers' FalconConfig: one key and value head unless the architecture is the new one."""
    if config.get("new_decoder_architecture"):
        return _kv_heads(config)
    return 1 if config.get("multi_query", default=True) else config.number("heads")


def _head_dim(config: Config) -> int:
    value = config.get("head_dim", "attention_head_dim")
    return int(value) if value else config.number("hidden") // max(config.number("heads"), 1)


def _layers(config: Config) -> int:
    """Layers by their number, or by the list of what each is."""
    found = config.get(*ALIASES["layers"])
    kinds = config.get("hybrid_override_pattern", "layers_block_type") if found is None else None
    if isinstance(kinds, (list, str)):
        return len(kinds)
    found = config.need(*ALIASES["layers"])
    if isinstance(found, bool) or not isinstance(found, (int, float)) or found < 0 or found % 1 != 0:
        raise CheckpointError(f"{config.ref}: 'layers' in its {config.where} is not a number", "correct it")
    return int(found)


def _kda(config: Config, field: str, nested: str) -> int:
    """A number of delta attention, in either spelling of its config."""
    found = config.get(field, default=config.get("linear_attn_config", default={}).get(nested))
    return int(config.need(field) if found is None else found)


def _each(config: Config) -> int:
    return config.number("linear_num_value_heads") // max(config.number("linear_num_key_heads"), 1)


def _ssm_inner(config: Config) -> int:
    """Channels of a Mamba 2 mixer beside attention."""
    return int(config.get("mamba_d_ssm") or int(config.get("mamba_expand", default=2)) * config.number("hidden"))


DERIVED: dict[str, Callable[[Config], int]] = {
    "layers": _layers,
    "kv_heads": _kv_heads,
    "falcon_kv": _falcon_kv,
    "head_dim": _head_dim,
    "q_rows": lambda c: c.number("heads") * _head_dim(c),
    "kv_rows": lambda c: _kv_heads(c) * _head_dim(c),
    "rotary_dim": lambda c: int(_head_dim(c) * float(c.rope.get("partial_rotary_factor", 1.0))),
    "glm_rotary": lambda c: int(_head_dim(c) * float(c.rope.get("partial_rotary_factor", 0.5))),
    "linear_kq_rows": lambda c: 2 * c.number("linear_num_key_heads") * c.number("linear_key_head_dim"),
    "linear_group_v": lambda c: _each(c) * c.number("linear_value_head_dim"),
    "linear_each": _each,
    "linear_all": lambda c: c.number("linear_num_value_heads") * c.number("linear_value_head_dim"),
    "position_offset": lambda c: 1 + int(c.get("pad_token_id", default=-1)),
    "ssm_groups": lambda c: int(c.get("mamba_n_groups", "n_groups", default=1)),
    "ssm_inner": _ssm_inner,
    "ssm_bc": lambda c: int(c.get("mamba_n_groups", "n_groups", default=1)) * c.number("mamba_d_state"),
    "linear_rows": lambda c: _kda(c, "linear_num_heads", "num_heads") * _kda(c, "linear_head_dim", "head_dim"),
    "linear_kernel": lambda c: _kda(c, "linear_conv_kernel_dim", "short_conv_kernel_size"),
    "gate_up_rows": lambda c: 2 * c.number("moe_intermediate_size"),
    "nemotron_groups": lambda c: c.number("n_groups"),
    "dbrx_experts": lambda c: int(c.get("ffn_config", default={}).get("moe_num_experts", 0)),
    "rwkv_heads": lambda c: c.number("hidden") // max(int(c.need("head_dim", "head_size")), 1),
    "ssm_heads": lambda c: int(c.get("mamba_n_heads", default=0)),
}


def _jais_embedding(config: Config) -> float:
    """What JAIS multiplies embeddings with."""
    return float(config.need("mup_embeddings_scale", "embeddings_scale"))


def _jais_output(config: Config) -> float:
    """What JAIS multiplies the output layer with."""
    alpha = config.get("mup_output_alpha")
    if alpha is not None:
        return float(alpha) * float(config.need("mup_width_scale"))
    return float(config.need("width_scale"))


COMPUTED: dict[str, Callable[[Config], float]] = {
    "one_over_root_width": lambda c: c.number("hidden") ** -0.5,
    "jais_embedding": _jais_embedding,
    "jais_output": _jais_output,
}


def llama3_factors(rope: Mapping[str, Any], dim: int, factor: float = 8.0) -> list[float]:
    """The divisors of the rotary frequencies of Llama 3.1 (transformers' ``_compute_llama3_parameters``)."""
    base = float(rope.get("rope_theta", 10000.0))
    factor = float(rope.get("factor", factor))
    low, high = float(rope.get("low_freq_factor", 1.0)), float(rope.get("high_freq_factor", 4.0))
    old = float(rope.get("original_max_position_embeddings", 8192))
    found = []
    for index in range(0, dim, 2):
        length = 2 * math.pi * single(base ** (index / dim))
        if length < old / high:
            found.append(1.0)
        elif length > old / low:
            found.append(factor)
        else:
            smooth = (old / length - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def single(value: float) -> float:
    """A number rounded to float32."""
    import struct

    return float(struct.unpack("<f", struct.pack("<f", value))[0])
