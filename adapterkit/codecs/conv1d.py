"""GPT-2's ``Conv1D``: a linear layer whose weight is ``[in, out]``, which quantizers store as ``[out, in]``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TYPES = frozenset({"gpt2", "gpt-sw3", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
LEAVES = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight", ".q_attn.weight")


def is_conv1d(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the parameter or tensor ``name`` of a model with this ``config.json`` is a ``Conv1D``."""
    if not name.endswith(LEAVES):
        return False
    parts = (config, *(part for part in config.values() if isinstance(part, Mapping)))
    return any(part.get("model_type") in TYPES for part in parts)
