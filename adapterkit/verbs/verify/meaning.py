"""What a key of a GGUF file's metadata means to llama.cpp, so that two files that say it differently can be compared."""

from __future__ import annotations

from math import isclose
from typing import TYPE_CHECKING, Any

from adapterkit.gguf.vocab import special, templates
from adapterkit.gguf.vocab.pretokenizers import row_of
from adapterkit.gguf.vocab.table import MODEL, PRE, TOKENS

if TYPE_CHECKING:
    from adapterkit.gguf.reader import GGUFHeader

# What llama.cpp takes for a key that is not there (llama-model.cpp, llama-vocab.cpp), of every architecture or of one.
DEFAULTS: dict[str, Any] = {
    "rope.freq_base": 10000.0,
    "rope.scaling.factor": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_shared_count": 0,
    "expert_group_count": 0,
    "expert_group_used_count": 0,
    "expert_weights_norm": False,
    "attention.causal": True,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "logit_scale": 0.0,
    "residual_scale": 0.0,
    "embedding_scale": 0.0,
    "tokenizer.ggml.normalizer.lowercase": True,
    "tokenizer.ggml.normalizer.strip_accents": True,
    "gemma2.attn_logit_softcapping": 50.0,
    "gemma2.final_logit_softcapping": 30.0,
    "gemma2.attention.sliding_window": 4096,
    "gemma3.rope.freq_base_swa": 10000.0,
    "t5encoder.attention.causal": False,
}
# The same by kind of tokenizer.
BY_TOKENIZER: dict[str, dict[str, Any]] = {
    special.KEYS["bos"]: {"llama": 1, "gpt2": 11, "bert": 101},
    special.KEYS["eos"]: {"llama": 2, "gpt2": 11, "t5": 1},
    special.ADDS["bos"]: {"llama": True, "bert": True, "t5": False},
    special.ADDS["eos"]: {"llama": False, "t5": True},
    special.ADDS["sep"]: {"llama": False, "gpt2": False, "t5": False},
    "tokenizer.ggml.add_space_prefix": {"llama": True},
}


def value(name: str, arch: str, header: GGUFHeader) -> Any:
    """What the runtime takes for a key, said or not; None where that cannot be told."""
    key = name if name in header.keys else f"{arch}.{name}"
    if name == "rope.scaling.type" and header.get(key, "linear") == "linear":
        return "none" if value("rope.scaling.factor", arch, header) == 1 else "linear"
    if key in header.keys:
        stated = header[key]
        return 1.0 if name == "rope.scaling.factor" and stated == 0 else stated
    for said in (key, name):
        if said in DEFAULTS:
            return DEFAULTS[said]
    heads, width = header.get(f"{arch}.attention.head_count"), header.get(f"{arch}.embedding_length")
    if name == "attention.head_count_kv":
        return heads
    if name in ("attention.key_length", "attention.value_length") and isinstance(heads, int) and heads and width:
        return width // heads
    if name == "rope.dimension_count":
        return value("attention.key_length", arch, header)
    if name == "rope.scaling.original_context_length":
        return header.get(f"{arch}.context_length")
    if name == "vocab_size":
        tokens = header.keys.get(TOKENS)
        return None if tokens is None else tokens.count
    if name == special.KEYS["cls"]:
        return value(special.KEYS["bos"], arch, header)
    if name in BY_TOKENIZER:
        return BY_TOKENIZER[name].get(str(header.get(MODEL)))
    return None


def same(name: str, one: Any, other: Any) -> bool:
    """Whether two values mean the same; a zero is as good as nothing."""
    if one is None or other is None:
        return not one and not other
    if isinstance(one, list) != isinstance(other, list):
        spread, single = (one, other) if isinstance(one, list) else (other, one)
        return bool(spread) and all(same(name, item, single) for item in spread)
    if isinstance(one, list):
        return len(one) == len(other) and all(same(name, a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) or isinstance(other, float):
        numbers = all(isinstance(value, int | float) for value in (one, other))
        return numbers and isclose(one, other, rel_tol=1e-6, abs_tol=1e-12)
    if name == PRE and one != other:
        rows = [row for row in (row_of(str(one)), row_of(str(other))) if row is not None]
        return len(rows) == 2 and rows[0].regexes == rows[1].regexes and rows[0].ignore_merges == rows[1].ignore_merges
    if name.startswith(templates.TEMPLATE) and isinstance(one, str) and isinstance(other, str):
        return one.rstrip() == other.rstrip()
    return bool(one == other)


def shown(key: str, value: Any, header: GGUFHeader) -> str:
    """A value in a sentence; a token with its text."""
    if value is None:
        return "none"
    if key.startswith(templates.TEMPLATE):
        return f"one of {len(str(value))} characters"
    tokens = header.get(TOKENS, []) if key.endswith("_token_id") else []
    text = f" ({tokens[value]!r})" if isinstance(value, int) and 0 <= value < len(tokens) else ""
    whole = f"{value:g}" if isinstance(value, float) else str(value)
    return (whole if len(whole) <= 60 else whole[:57] + "...") + text + ("" if key in header.keys else " by default")
