"""What serving software makes of an adapter, as data: one row per feature and server, with its source.

``refused`` means the server says no, ``wrong`` that it goes on and computes something else than what was trained, ``depends``
that it can be started or addressed so that it works.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.adapters.methods.lora import B_BIAS, EMBEDDING_A, MAGNITUDE
from adapterkit.adapters.methods.tokens import KEY as TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterkit.adapters.adapter import Adapter


def _has(*endings: str) -> Callable[[Adapter], bool]:
    return lambda adapter: any(key.endswith(endings) for key in adapter.tensors)


def _says(field: str) -> Callable[[Adapter], bool]:
    return lambda adapter: bool(adapter.config.get(field))


def _largest_rank(adapter: Adapter) -> int:
    return max(
        (t.shape[0] for key, t in adapter.tensors.items() if key.endswith("lora_A.weight") and t.shape), default=0
    )


FEATURES: dict[str, tuple[str, Callable[[Adapter], bool]]] = {
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
    "rank_16": ("a rank above 16", lambda adapter: _largest_rank(adapter) > 16),
    "rank_512": ("a rank above 512", lambda adapter: _largest_rank(adapter) > 512),
    "local_base": (
        "a base named by a local path",
        lambda adapter: (adapter.config.base or "").startswith((".", "/", "~")),
    ),
    "no_base": ("no base named", lambda adapter: not adapter.config.base),
}


@dataclass(frozen=True)
class Expectation:
    """What one server does with one feature, and what to do about it."""

    feature: str
    verdict: str
    says: str
    source: str
    fix: str = "merge the adapter and serve the result"


_NAME = "set base_model_name_or_path to the name under which the base is served"
_VLLM_HELPER = "vllm/lora/peft_helper.py"

SERVERS: dict[str, tuple[Expectation, ...]] = {
    "vllm": (
        Expectation("not_lora", "refused", "only LoRA adapters are loaded", _VLLM_HELPER),
        Expectation("dora", "refused", "magnitude vectors are an unsupported weight", "vllm-project/vllm#6983"),
        Expectation("whole", "refused", "modules_to_save is refused at load", "vllm-project/vllm#9280"),
        Expectation("bias", "refused", "biases are refused", _VLLM_HELPER),
        Expectation("tokens", "refused", "trained token rows are an unsupported weight", _VLLM_HELPER),
        Expectation("alpha_pattern", "wrong", "one alpha/r is used for all modules", _VLLM_HELPER),
        Expectation("rank_pattern", "wrong", "one alpha/r is used for all modules", _VLLM_HELPER),
        Expectation("experts", "wrong", "the factors' order is taken from an older PEFT", "vllm-project/vllm#52194"),
        Expectation(
            "rank_16", "depends", "start it with --max-lora-rank of at least the rank", "vllm-project/vllm#2847"
        ),
        Expectation("rank_512", "refused", "512 is the largest rank it can be started with", "vllm-project/vllm#2847"),
        Expectation(
            "no_base", "depends", "the file-system resolver compares names as text", "fastino-ai/GLiNER2#108", _NAME
        ),
        Expectation(
            "local_base", "depends", "the file-system resolver compares names as text", "fastino-ai/GLiNER2#108"
        ),
    ),
    "sglang": (
        Expectation("not_lora", "refused", "only LoRA adapters are loaded", "sgl-project/sglang docs, LoRA serving"),
        Expectation("rslora", "wrong", "the scale is taken as alpha/r", "sgl-project/sglang#40835"),
        Expectation("experts", "wrong", "target_parameters is not read", "sgl-project/sglang#27381"),
    ),
    "llama.cpp": (
        Expectation("not_lora", "refused", "convert_lora_to_gguf.py reads LoRA only", "ggml-org/llama.cpp"),
        Expectation("dora", "refused", "magnitude vectors stop the conversion", "ggml-org/llama.cpp#6536"),
        Expectation("whole", "refused", "whole modules stop the conversion", "ggml-org/llama.cpp#11554"),
        Expectation("bias", "refused", "biases stop the conversion", "convert_lora_to_gguf.py"),
        Expectation("tokens", "refused", "token rows stop the conversion", "convert_lora_to_gguf.py"),
        Expectation("rslora", "wrong", "the scale is written as alpha/r", "convert_lora_to_gguf.py, lines 528-539"),
        Expectation("alpha_pattern", "wrong", "one alpha is written for all", "convert_lora_to_gguf.py, lines 528-539"),
        Expectation("experts", "refused", "target_parameters is not read", "convert_lora_to_gguf.py"),
    ),
    "lorax": (
        Expectation("not_lora", "refused", "LoRA (and Medusa) only", "predibase/lorax docs"),
        Expectation("dora", "refused", "magnitude vectors are not read", "predibase/lorax docs"),
        Expectation(
            "no_base", "depends", "it then assumes that base and adapter fit", "predibase/lorax check_architectures"
        ),
    ),
    "mlx": (
        Expectation(
            "not_lora", "refused", "mlx-lm reads its own LoRA and DoRA files", "ml-explore/mlx-lm tuner/utils.py"
        ),
        Expectation("rslora", "wrong", "the scale in its config must be given as a number", "mlx-vlm#986"),
    ),
}
SERVERS["ollama"] = SERVERS["llama.cpp"]
