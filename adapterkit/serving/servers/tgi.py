"""Text Generation Inference."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.serving.punica import expectations
from adapterkit.serving.server import Server, StoredForms

if TYPE_CHECKING:
    from adapterkit.serving.live import Live


def live() -> Live:
    from adapterkit.serving.live import Call, Live, generate_answer, generate_probe, info_listed

    return Live(
        "text-generation-inference router/src/server.rs; server/text_generation_server/utils/adapter.py and "
        "models/flash_causal_lm.py",
        listing=(Call("GET", "/info"),),
        listed=info_listed,
        probe=lambda adapter, base, prompt: generate_probe(prompt, **({"adapter_id": adapter} if adapter else {})),
        answer=generate_answer,
        # Without a word it answers as its base where a request names an adapter that it was not started with.
        knows=False,
        splits="=@,",  # NAME=PATH@REVISION (`parse_lora_adapters`)
        restart=lambda base, adapters: [
            *("text-generation-launcher", "--model-id", base),
            *("--lora-adapters", ",".join(f"{name}={path}" for name, path in adapters)),
        ],
    )


SERVER = Server(
    "tgi",
    expectations=expectations("text-generation-inference server/text_generation_server/adapters/lora.py"),
    stored=StoredForms(
        ("awq", "bitsandbytes", "compressed-tensors", "eetq", "exl2", "fp8", "gptq", "marlin"),
        "text-generation-inference docs, Conceptual Guides, Quantization",
    ),
    live=live,
)
