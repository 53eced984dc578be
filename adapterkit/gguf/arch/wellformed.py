"""Whether the fields of a ``config.json`` that GGUF is made of are of their kind: counts, numbers and lists of words."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

# Counts by their names: whole numbers, or one for each layer.
_COUNT = re.compile(r"(num|n)_\w+|\w+_(size|dim|rank|heads|length)|max_position_embeddings|d_model")
_NO_COUNT = re.compile(r"\w*(vision|audio|image|video|feature|patch|norm|bias|labels)\w*")
# Those that no model is without.
_ABOVE_ZERO = frozenset(
    {
        "hidden_size",
        "n_embd",
        "d_model",
        "head_dim",
        "num_attention_heads",
        "n_head",
        "num_key_value_heads",
    }
)
_WIDTHS = frozenset({"intermediate_size", "moe_intermediate_size", "vocab_size"})
# One number for the whole model.
_SINGLE = frozenset({"vocab_size", "sliding_window"})
_WITHOUT_ATTENTION = ("mamba", "rwkv")
_REALS = frozenset(
    {
        "rms_norm_eps",
        "layer_norm_eps",
        "layer_norm_epsilon",
        "norm_eps",
        "norm_epsilon",
        "rope_theta",
        "rope_local_base_freq",
    }
    | {"routed_scaling_factor", "partial_rotary_factor", "query_pre_attn_scalar", "logit_scale", "logits_scaling"}
    | {"attention_multiplier", "embedding_multiplier", "residual_multiplier", "attn_logit_softcapping"}
    | {"final_logit_softcapping", "clip_qkv", "attn_scale", "floor_scale", "scale_emb", "scale_depth"}
)
_WORDS = frozenset({"layer_types", "mlp_layer_types", "layers_block_type"})


def well_formed(fields: Mapping[str, Any], ref: str) -> None:
    """Refuse fields whose values are of another kind than every model's.

    Args:
        fields: of the language model.
        ref: what its checkpoint is called.

    Raises:
        CheckpointError: the first such field, with what belongs there.
    """
    for name, value in fields.items():
        wanted = None if value is None else _wanted(name, value, str(fields.get("model_type") or ""))
        if wanted is not None:
            raise CheckpointError(
                f"{ref}: '{name}' in its config.json is {_short(value)}, where {wanted} belongs", "correct it"
            )


def _wanted(name: str, value: Any, model_type: str) -> str | None:
    """What belongs in a field, where its value is something else."""
    if name in _REALS:
        return None if all(_is_real(one) for one in _each(value)) and value != [] else "a number"
    if name in _WORDS:
        return None if isinstance(value, list) and all(isinstance(one, str) for one in value) else "a list of words"
    if name in _SINGLE and isinstance(value, (str, list, dict)):
        return "a whole number"
    if name == "vocab_size" and _is_count(value) and value < 1:
        return "a whole number above 0"
    if _COUNT.fullmatch(name) is None or _NO_COUNT.fullmatch(name):
        return None
    ours = name.startswith(("num_", "n_")) or name in _ABOVE_ZERO or name in _WIDTHS
    if not ours and (isinstance(value, (bool, dict)) or value == "auto"):
        return None  # a switch, a part or a word of another meaning, whatever its name ends with
    items = _each(value)
    if not all(_is_count(one) or (one is None and isinstance(value, list)) for one in items):
        return "a whole number"
    if name in _ABOVE_ZERO and not any(items) and not any(word in model_type for word in _WITHOUT_ATTENTION):
        return "a whole number above 0"
    return None


def _each(value: Any) -> list[Any]:
    """A value, or those of a list, also of one in it."""
    if not isinstance(value, list):
        return [value]
    return [inner for one in value for inner in (one if isinstance(one, list) else [one])]


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return _is_real(value) and value == int(value)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
