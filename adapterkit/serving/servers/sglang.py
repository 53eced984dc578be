"""SGLang."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.serving.server import PLAIN, SCALED, Expectation, Launch, Server, StoredForms

if TYPE_CHECKING:
    from adapterkit.serving.live import Live

_CONFIG = "sglang srt/lora/lora_config.py"


def live() -> Live:
    from adapterkit.serving.live import MODELS, Call, Live, openai_answer, openai_models, openai_probe

    return Live(
        "python/sglang/srt/entrypoints/http_server.py; srt/managers/io_struct.py and tokenizer_control_mixin.py",
        listing=(MODELS,),
        listed=openai_models,
        load=lambda name, path: Call("POST", "/load_lora_adapter", {"lora_name": name, "lora_path": path}),
        unload=lambda name: Call("POST", "/unload_lora_adapter", {"lora_name": name}),
        # The adapter is named in its own field: a model's name is taken apart at a colon.
        probe=lambda adapter, base, prompt: openai_probe(base, prompt, **({"lora_path": adapter} if adapter else {})),
        answer=openai_answer,
        allow="start it with --enable-lora, --max-lora-rank and --lora-target-modules",
    )


SERVER = Server(
    "sglang",
    expectations=(
        Expectation("not_lora", "refused", "only LoRA adapters are loaded", "sglang docs, LoRA serving", PLAIN),
        Expectation("rslora", "wrong", "the scale is taken as alpha/r", "sgl-project/sglang#40835", SCALED),
        Expectation("alpha_pattern", "refused", "other alphas are refused at load", _CONFIG, SCALED),
        Expectation("rank_pattern", "refused", "other ranks are refused at load", _CONFIG, SCALED),
        Expectation("experts", "wrong", "target_parameters is not read", "sgl-project/sglang#27381"),
        Expectation(
            "tower",
            "wrong",
            "factors outside the language model are left out, or taken for the language model's",
            "sgl-project/sglang#28784",
        ),
    ),
    stored=StoredForms(
        ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4", "quark", "torchao"),
        "docs.sglang.io, Advanced Features, Quantization",
    ),
    launch=Launch(
        "python -m sglang.launch_server --model-path {path}",
        "python -m sglang.launch_server --model-path {base} --enable-lora --max-loras-per-batch {count} "
        "--max-lora-rank {rank} --lora-paths {each}",
        "docs.sglang.io, Advanced Features, LoRA Serving",
        each="{name}={path}",
    ),
    live=live,
)
