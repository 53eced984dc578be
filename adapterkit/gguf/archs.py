"""What converters do to a model's tensors on the way to GGUF, as tables by architecture.

Names come from gguf's own tables; what is here is what names cannot say: which rows are in another order, and what has
other values. Source: ``conversion/`` of llama.cpp. An architecture that is in no table is refused, since a wrong order of
rows is a wrong model that nobody notices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# Matrices are the ones of the checkpoint, row for row.
PLAIN = frozenset(
    (
        "cohere2",
        "command-r",
        "deepseek2",
        "dots1",
        "ernie4_5",
        "ernie4_5-moe",
        "exaone",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3",
        "glm4",
        "glm4moe",
        "gpt-oss",
        "gpt2",
        "hunyuan-dense",
        "hunyuan-moe",
        "llama4",
        "nemotron",
        "olmo2",
        "olmoe",
        "orion",
        "phi2",
        "phi3",
        "phimoe",
        "qwen2",
        "qwen2moe",
        "qwen2vl",
        "qwen3",
        "qwen3moe",
        "qwen3vl",
        "qwen3vlmoe",
        "seed_oss",
        "stablelm",
        "starcoder",
        "starcoder2",
    )
)
# The halves of each head's rotary dimensions are interleaved in q and k.
INTERLEAVED = frozenset(
    (
        "arcee",
        "bailingmoe",
        "deepseek",
        "granite",
        "granitemoe",
        "llama",
        "minicpm",
        "mistral3",
        "olmo",
        "smollm3",
        "xverse",
    )
)
# Norm weights are stored with 1 added (or subtracted); a trained norm would need the same.
SHIFTED_NORMS = frozenset({"gemma", "gemma2", "gemma3", "nemotron"})
# Stacks of experts that checkpoints keep on their side, ``[experts, in, out]``. Where gate and up are one parameter,
# this is the step from one of its gate columns to the next: 2 where they alternate, 1 where one follows the other.
TURNED_EXPERTS = {"gpt-oss": 2, "llama4": 1}
# No output layer of its own can be loaded.
ALWAYS_TIED = frozenset({"gemma", "gemma2", "command-r", "cohere2"})
# Classes whose linear layers are Conv1D, with weights [in, out].
CONV1D = {"gpt2": frozenset({"c_attn", "c_fc", "c_proj"})}

# Where transformers writes an architecture's name otherwise.
MODEL_TYPES = {
    "command-r": "cohere",
    "deepseek2": "deepseek_v2",
    "gemma3": "gemma3_text",
    "gpt-oss": "gpt_oss",
    "gptneox": "gpt_neox",
    "phi2": "phi",
    "qwen2moe": "qwen2_moe",
    "qwen2vl": "qwen2_vl",
    "qwen3moe": "qwen3_moe",
    "qwen3vl": "qwen3_vl",
    "qwen3vlmoe": "qwen3_vl_moe",
}
ARCHS = {model_type: arch for arch, model_type in MODEL_TYPES.items()} | {
    "mistral": "llama",
    "mixtral": "llama",
    "gemma3": "gemma3",
    "llama4_text": "llama4",
}


@dataclass(frozen=True)
class Run:
    """``count`` tensor rows ``at, at + step, ...`` that follow each other in the checkpoint's matrix."""

    at: int
    step: int
    count: int


def plain(rows: int) -> list[Run]:
    return [Run(0, 1, rows)]


def interleaved(rows: int, heads: int) -> list[Run]:
    """``reshape(heads, 2, d/2)``, the inner two swapped: row ``h, half, i`` of the checkpoint is ``h, i, half``."""
    width = rows // heads
    return [Run(head * width + half, 2, width // 2) for head in range(heads) for half in (0, 1)]


def _by_head(rows: int, heads: int, kv_heads: int) -> list[Run]:
    """q, k, v of each head after the other (GPT-NeoX, BLOOM), from all q, all k, all v."""
    width = rows // heads // 3
    return [Run((part * heads + head) * width, 1, width) for head in range(heads) for part in range(3)]


def _by_group(rows: int, heads: int, kv_heads: int) -> list[Run]:
    """The q of a group, its k, its v (Falcon), from all q, all k, all v."""
    each = heads // kv_heads
    width = rows // (heads + 2 * kv_heads)
    found = []
    for group in range(kv_heads):
        found.append(Run(group * each * width, 1, each * width))
        found += [Run((heads + part * kv_heads + group) * width, 1, width) for part in (0, 1)]
    return found


FUSED_QKV: dict[str, Callable[[int, int, int], list[Run]]] = {
    "bloom": _by_head,
    "falcon": _by_group,
    "gptneox": _by_head,
}
KNOWN = PLAIN | INTERLEAVED | frozenset(FUSED_QKV)
