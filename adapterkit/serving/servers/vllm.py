"""vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.serving.server import NAMED, PLAIN, SCALED, Expectation, Launch, Ranks, Server, StoredForms

if TYPE_CHECKING:
    from adapterkit.serving.live import Live

_HELPER = "vllm/lora/peft_helper.py"
_TESTS = "vllm tests/lora/test_peft_helper.py"
_OLDER = "releases before the summer of 2026 use one alpha/r"
_RESOLVER = "the file-system resolver compares names as text"


def live() -> Live:
    from adapterkit.serving.live import MODELS, Call, Live, openai_answer, openai_models, openai_probe

    return Live(
        "vllm/entrypoints/serve/lora/api_router.py and protocol.py; vllm/entrypoints/openai/models/serving.py",
        listing=(MODELS,),
        listed=openai_models,
        # `load_inplace` stays off: a name is loaded once, so it cannot come to mean other weights.
        load=lambda name, path: Call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path}),
        unload=lambda name: Call("POST", "/v1/unload_lora_adapter", {"lora_name": name}),
        probe=lambda adapter, base, prompt: openai_probe(adapter or base, prompt),
        answer=openai_answer,
        allow="start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
    )


SERVER = Server(
    "vllm",
    expectations=(
        Expectation("not_lora", "refused", "only LoRA adapters are loaded", _HELPER, PLAIN),
        Expectation("dora", "refused", "DoRA is refused", _TESTS, PLAIN),
        Expectation("whole", "refused", "modules_to_save is refused at load", "vllm-project/vllm#9280"),
        Expectation("bias", "refused", "biases are refused", _TESTS),
        Expectation("tokens", "refused", "trained token rows are an unsupported weight", _HELPER),
        Expectation("alpha_pattern", "wrong", _OLDER, _TESTS, SCALED),
        Expectation("rank_pattern", "wrong", _OLDER, _TESTS, SCALED),
        Expectation("residual", "refused", "such initialisations are refused; older releases go wrong", _TESTS, PLAIN),
        Expectation("block_diagonal", "refused", "BD-LoRA is refused", _TESTS, PLAIN),
        Expectation("pooled", "refused", "QA-LoRA is refused", _TESTS, PLAIN),
        Expectation("experts", "wrong", "the factors' order is taken from an older PEFT", "vllm-project/vllm#52194"),
        Expectation(
            "tower",
            "depends",
            "it adapts the language model only, unless it is told otherwise and the architecture can do it",
            "vllm-project/vllm#26674, #31479",
            "start it with --enable-tower-connector-lora, or merge: adapterkit merge {base} {adapter} -o merged",
        ),
        # Their projectors are plain nn.Linear, which vLLM does not wrap.
        Expectation(
            "tower",
            "refused",
            "the connector of audio models takes no LoRA",
            "vllm-project/vllm#45771",
            architectures=("qwen2_audio",),
        ),
        Expectation("no_base", "depends", _RESOLVER, "fastino-ai/GLiNER2#108", NAMED),
        Expectation("local_base", "depends", _RESOLVER, "fastino-ai/GLiNER2#108", NAMED),
    ),
    ranks=Ranks(
        largest=512,
        default=16,
        option="--max-lora-rank",
        source="vllm-project/vllm#2847; vllm/config/lora.py",
        steps=(8, 16, 32, 64, 128, 256, 320, 512),
    ),
    stored=StoredForms(
        (
            "awq",
            "bitsandbytes",
            "compressed-tensors",
            "fbgemm_fp8",
            "fp8",
            "gptq",
            "modelopt",
            "mxfp4",
            "quark",
            "torchao",
        ),
        "docs.vllm.ai, Features, Quantization",
    ),
    launch=Launch(
        "vllm serve {path}",
        "vllm serve {base} --enable-lora --max-loras {count} --max-lora-rank {rank} --lora-modules {each}",
        "docs.vllm.ai, Features, LoRA Adapters; vllm/config/lora.py",
        each="{name}={path}",
    ),
    live=live,
)
