"""What serving software makes of an adapter, as data: one row per feature and server, with its source.

``refused`` means the server says no, ``wrong`` that it goes on and computes something else than what was trained, ``depends``
that it can be started or addressed so that it works.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.adapters.methods.lora import B_BIAS, EMBEDDING_A, MAGNITUDE
from adapterkit.adapters.methods.tokens import KEY as TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterkit.adapters.adapter import Adapter


_LAYER = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.")


def _has(*endings: str) -> Callable[[Adapter], bool]:
    return lambda adapter: any(key.endswith(endings) for key in adapter.tensors)


def _says(field: str) -> Callable[[Adapter], bool]:
    return lambda adapter: bool(adapter.config.get(field))


def _largest_rank(adapter: Adapter) -> int:
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
    """What one server does with one feature, where that is written, and what to do about it.

    ``{adapter}`` and ``{base}`` in ``fix`` stand for what `check` was given.
    """

    feature: str
    verdict: str
    says: str
    source: str
    fix: str = "merge the adapter and serve the result: adapterkit merge {base} {adapter} -o merged"


_NAME = "set base_model_name_or_path to the name under which the base is served"
_SCALED = "fold the scalings into the factors: adapterkit convert {adapter} --to peft --plain -o plain"
_PLAIN = "make plain LoRA of it: adapterkit convert {adapter} --to peft --plain --base {base} -o plain"
_GGUF = (
    "write it with all scalings folded in: adapterkit convert {adapter} --to gguf-lora --base {base} -o adapter.gguf"
)
_FOLDED = "fold it in: adapterkit merge {base} {adapter} -o merged.gguf --for ollama"
_MLX = "adapterkit convert {adapter} --to mlx --base {base} -o mlx"
_VLLM = "vllm/lora/peft_helper.py"
_VLLM_TESTS = "vllm tests/lora/test_peft_helper.py"
_TGI = "text-generation-inference server/text_generation_server/adapters/lora.py"
_LORAX = "lorax server/lorax_server/adapters/lora.py"
_GGUF_TOOL = "llama.cpp convert_lora_to_gguf.py"


def _punica(source: str) -> tuple[Expectation, ...]:
    """LoRAX, and TGI, whose adapters' code comes from it: pairs of A and B by name and one scale; the rest is not read."""
    return (
        Expectation("not_lora", "refused", "only LoRA adapters are loaded", source, _PLAIN),
        Expectation("dora", "wrong", "magnitudes are not read", source, _PLAIN),
        Expectation("alpha_pattern", "wrong", "one alpha/r is used for all modules", source, _SCALED),
        Expectation("rank_pattern", "wrong", "one alpha/r is used for all modules", source, _SCALED),
        Expectation("residual", "wrong", "the base is not brought to the residual", source, _PLAIN),
        Expectation("whole", "wrong", "whole modules are not read", source),
        Expectation("bias", "wrong", "biases are not read", source),
        Expectation("tokens", "wrong", "token rows are not read", source),
        Expectation("embedding", "wrong", "factors of embeddings are not read", source),
        Expectation("experts", "wrong", "target_parameters is not read", source),
        Expectation(
            "some_layers", "wrong", "a kind of module that lacks factors in one layer is left out in all", source
        ),
    )


SERVERS: dict[str, tuple[Expectation, ...]] = {
    "vllm": (
        Expectation("not_lora", "refused", "only LoRA adapters are loaded", _VLLM, _PLAIN),
        Expectation("dora", "refused", "DoRA is refused", _VLLM_TESTS, _PLAIN),
        Expectation("whole", "refused", "modules_to_save is refused at load", "vllm-project/vllm#9280"),
        Expectation("bias", "refused", "biases are refused", _VLLM_TESTS),
        Expectation("tokens", "refused", "trained token rows are an unsupported weight", _VLLM),
        Expectation(
            "alpha_pattern", "wrong", "releases before the summer of 2026 use one alpha/r", _VLLM_TESTS, _SCALED
        ),
        Expectation(
            "rank_pattern", "wrong", "releases before the summer of 2026 use one alpha/r", _VLLM_TESTS, _SCALED
        ),
        Expectation(
            "residual",
            "refused",
            "such initialisations are refused; older releases go wrong",
            _VLLM_TESTS,
            _PLAIN,
        ),
        Expectation("block_diagonal", "refused", "BD-LoRA is refused", _VLLM_TESTS, _PLAIN),
        Expectation("pooled", "refused", "QA-LoRA is refused", _VLLM_TESTS, _PLAIN),
        Expectation("experts", "wrong", "the factors' order is taken from an older PEFT", "vllm-project/vllm#52194"),
        Expectation(
            "rank_16",
            "depends",
            "16 is the largest rank it loads unless told otherwise",
            "vllm-project/vllm#2847",
            "start it with --max-lora-rank of at least the rank",
        ),
        Expectation(
            "rank_512",
            "refused",
            "512 is the largest rank it can be started with",
            "vllm-project/vllm#2847",
            "bring it to a smaller one: adapterkit resize {adapter} --rank 512 -o smaller",
        ),
        Expectation(
            "no_base", "depends", "the file-system resolver compares names as text", "fastino-ai/GLiNER2#108", _NAME
        ),
        Expectation(
            "local_base", "depends", "the file-system resolver compares names as text", "fastino-ai/GLiNER2#108", _NAME
        ),
    ),
    "sglang": (
        Expectation("not_lora", "refused", "only LoRA adapters are loaded", "sglang docs, LoRA serving", _PLAIN),
        Expectation("rslora", "wrong", "the scale is taken as alpha/r", "sgl-project/sglang#40835", _SCALED),
        Expectation(
            "alpha_pattern", "refused", "other alphas are refused at load", "sglang srt/lora/lora_config.py", _SCALED
        ),
        Expectation(
            "rank_pattern", "refused", "other ranks are refused at load", "sglang srt/lora/lora_config.py", _SCALED
        ),
        Expectation("experts", "wrong", "target_parameters is not read", "sgl-project/sglang#27381"),
    ),
    "tgi": _punica(_TGI),
    "lorax": (
        *_punica(_LORAX),
        Expectation(
            "no_base", "depends", "it then assumes that base and adapter fit", "lorax check_architectures", _NAME
        ),
    ),
    "llama.cpp": (
        Expectation("not_lora", "refused", "the converter reads LoRA only", _GGUF_TOOL, _PLAIN),
        Expectation("dora", "refused", "magnitudes stop the conversion", "ggml-org/llama.cpp#6536", _PLAIN),
        Expectation("residual", "wrong", "the base is not brought to the residual", _GGUF_TOOL, _PLAIN),
        Expectation("whole", "refused", "whole modules stop the conversion", "ggml-org/llama.cpp#11554"),
        Expectation("bias", "refused", "biases stop the conversion", _GGUF_TOOL),
        Expectation("tokens", "refused", "token rows stop the conversion", _GGUF_TOOL),
        Expectation("rslora", "wrong", "the scale is written as alpha/r", f"{_GGUF_TOOL}, lines 528-539", _GGUF),
        Expectation("alpha_pattern", "wrong", "one alpha is written for all", f"{_GGUF_TOOL}, lines 528-539", _GGUF),
        Expectation("experts", "refused", "target_parameters is not read", _GGUF_TOOL, _GGUF),
    ),
    "mlx": (
        Expectation("not_lora", "refused", "mlx-lm reads its own LoRA and DoRA files", "mlx-lm tuner/utils.py", _MLX),
        Expectation("rslora", "wrong", "the scale in its config must be given as a number", "mlx-vlm#986", _MLX),
        Expectation("alpha_pattern", "refused", "it has one scale for all modules", "mlx-lm tuner/utils.py", _MLX),
        Expectation("rank_pattern", "refused", "it has one rank for all modules", "mlx-lm tuner/utils.py", _MLX),
        Expectation("whole", "refused", "it has no place for whole modules beside factors", "mlx-lm tuner/utils.py"),
        Expectation("experts", "refused", "it has its own layout of stacked experts", "mlx-lm tuner/utils.py"),
    ),
}
# Ollama took adapters as llama.cpp has them, until it took none: what is wrong with one is mended by folding it in.
SERVERS["ollama"] = (
    Expectation(
        "adapter",
        "refused",
        "releases from 0.34.1 create no model from a Modelfile with ADAPTER; older ones load it as GGUF, and as "
        "safetensors of Llama, Mistral and Gemma; a model that an older one created still runs",
        "ollama/ollama#14969; generative-computing/mellea#1651; docs.ollama.com, Importing a Model",
        _FOLDED,
    ),
    *(replace(row, says=f"up to 0.34.0, {row.says}", fix=_FOLDED) for row in SERVERS["llama.cpp"]),
)
