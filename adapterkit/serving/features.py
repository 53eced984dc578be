"""What an adapter may have that servers differ on: a name, words for it, and how it is seen from headers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from adapterkit.adapters.methods.lora import B_BIAS, EMBEDDING_A, MAGNITUDE
from adapterkit.adapters.methods.tokens import KEY as TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterkit.adapters.adapter import Adapter


# How transformers names the parts of a model that are not its language model.
_TOWER = re.compile(
    r"(?:^|\.)(?:vision_tower|vision_model|visual|vision_encoder|audio_tower|audio_encoder|multi_modal_projector|mm_projector"
    r"|embed_vision|embed_audio|connector)\."
)
_LAYER = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.")


def _has(*endings: str) -> Callable[[Adapter], bool]:
    return lambda adapter: any(key.endswith(endings) for key in adapter.tensors)


def _says(field: str) -> Callable[[Adapter], bool]:
    return lambda adapter: bool(adapter.config.get(field))


def largest_rank(adapter: Adapter) -> int:
    """The largest first dimension of the adapter's ``lora_A``; 0 where it has none."""
    return max(
        (t.shape[0] for key, t in adapter.tensors.items() if key.endswith("lora_A.weight") and t.shape), default=0
    )


_RESIDUAL = ("pissa", "olora", "corda", "loftq")


def _in_some_layers(adapter: Adapter) -> bool:
    """Whether a kind of module has factors in one layer and none in another of those that the adapter touches."""
    found: dict[str, set[str]] = {}
    for key in adapter.tensors:
        match = _LAYER.search(key)
        if match is not None and ".lora_A" in key:
            found.setdefault(key[match.end() :].partition(".lora_A")[0], set()).add(match[1])
    layers = set().union(*found.values()) if found else set()
    return any(one != layers for one in found.values())


FEATURES: dict[str, tuple[str, Callable[[Adapter], bool]]] = {
    "adapter": ("an adapter beside its base", lambda adapter: True),
    "not_lora": ("it is not a LoRA", lambda adapter: adapter.config.peft_type != "LORA"),
    "dora": ("DoRA magnitudes", _has(MAGNITUDE, MAGNITUDE + ".weight")),
    "rslora": ("rsLoRA scaling", _says("use_rslora")),
    "alpha_pattern": ("alpha_pattern", _says("alpha_pattern")),
    "rank_pattern": ("rank_pattern", _says("rank_pattern")),
    "whole": ("modules_to_save", _says("modules_to_save")),
    "bias": ("trained biases", lambda adapter: adapter.config.get("bias", "none") != "none" or _has(B_BIAS)(adapter)),
    "tokens": ("trained token rows", _has(TOKENS)),
    "embedding": ("LoRA on embeddings", _has(EMBEDDING_A)),
    "experts": ("LoRA on stacked experts (target_parameters)", _says("target_parameters")),
    "residual": (
        "an initialisation that took its factors out of the base",
        lambda adapter: str(adapter.config.get("init_lora_weights", "")).lower().startswith(_RESIDUAL),
    ),
    "block_diagonal": ("block-diagonal factors", _says("use_bdlora")),
    "pooled": ("QA-LoRA's pooled inputs", _says("use_qalora")),
    "some_layers": ("modules adapted in some layers only", _in_some_layers),
    "tower": ("LoRA on the vision or audio part", lambda adapter: any(_TOWER.search(key) for key in adapter.tensors)),
    "local_base": (
        "a base named by a local path",
        lambda adapter: (adapter.config.base or "").startswith((".", "/", "~")),
    ),
    "no_base": ("no base named", lambda adapter: not adapter.config.base),
}
