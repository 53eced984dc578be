"""Text Generation Inference."""

from __future__ import annotations

from adapterkit.serving.punica import expectations
from adapterkit.serving.server import Server, StoredForms

SERVER = Server(
    "tgi",
    expectations=expectations("text-generation-inference server/text_generation_server/adapters/lora.py"),
    stored=StoredForms(
        ("awq", "bitsandbytes", "compressed-tensors", "eetq", "exl2", "fp8", "gptq", "marlin"),
        "text-generation-inference docs, Conceptual Guides, Quantization",
    ),
)
