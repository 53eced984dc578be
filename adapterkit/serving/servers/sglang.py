"""SGLang."""

from __future__ import annotations

from adapterkit.serving.server import PLAIN, SCALED, Expectation, Launch, Server, StoredForms

_CONFIG = "sglang srt/lora/lora_config.py"

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
)
