"""LoRAX."""

from __future__ import annotations

from adapterkit.serving.punica import expectations
from adapterkit.serving.server import NAMED, Expectation, Launch, Server

SERVER = Server(
    "lorax",
    expectations=(
        *expectations("lorax server/lorax_server/adapters/lora.py"),
        Expectation(
            "no_base", "depends", "it then assumes that base and adapter fit", "lorax check_architectures", NAMED
        ),
    ),
    launch=Launch(
        "lorax-launcher --model-id {path}",
        "lorax-launcher --model-id {base}",
        "predibase/lorax, docs/models/adapters/index.md",
        after='{{"inputs": "...", "parameters": {{"adapter_source": "local", "adapter_id": {json}}}}}',
    ),
)
