"""Experts as MLX stacks them: `switch_mlp.gate_proj.weight` `[experts, out, in]` holds what Hugging Face stores as one tensor
for each expert. Adapters name the single experts, so these are found as rows of the stack.

Source: mlx-lm 0.32 (MIT), ``models/*.py``: sanitize, ``models/switch_layers.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod

STACK = "switch_mlp"
_PARTS = re.compile(rf"((?:.+\.)?)(?:{STACK}|(experts))\.(gate_proj|up_proj|down_proj)\.(weight|bias)")
_ALONE = re.compile(r"(.*\.experts\.\d+\.)(gate_proj|up_proj|down_proj)(\..+)")
# What the projections are called where experts stand alone, by the module around them or the type of the model.
NUMBERED = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
NUMBERED_BLOCK = "block_sparse_moe"
_NUMBERED_TYPES = frozenset({"lfm2_moe"})
MOST = 1 << 20  # experts of all stacks; a header that says more is not followed


def experts(
    shapes: Mapping[str, tuple[int, ...]], model_types: frozenset[str]
) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    """Every single expert's tensor: its name, its shape, the stack, and its first row there (of `[experts * out, in]`).

    gpt-oss and Llama 4 have the stack in `experts.gate_proj`; the single ones are called `experts.gate_proj.0` then.
    """
    left = MOST
    for name, shape in shapes.items():
        found = _PARTS.fullmatch(name) if "_proj." in name else None
        if found is None or len(shape) != (3 if found[4] == "weight" else 2) or shape[0] > left:
            continue
        left -= shape[0]
        head, inside, part, leaf = found.groups()
        numbered = head.endswith(f"{NUMBERED_BLOCK}.") or not model_types.isdisjoint(_NUMBERED_TYPES)
        rows = prod(shape[1:-1]) if len(shape) == 3 else shape[1]
        for expert in range(shape[0]):
            alone = f"{part}.{expert}" if inside else f"{expert}.{NUMBERED[part] if numbered else part}"
            yield f"{head}experts.{alone}.{leaf}", shape[1:], name, expert * rows


def numbered(parameter: str) -> str | None:
    """A single expert's parameter by the other names of its projections: `experts.0.w1` for `experts.0.gate_proj`."""
    found = _ALONE.fullmatch(parameter)
    return None if found is None else f"{found[1]}{NUMBERED[found[2]]}{found[3]}"
