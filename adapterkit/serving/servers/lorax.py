"""LoRAX."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.serving.punica import expectations
from adapterkit.serving.server import NAMED, Expectation, Launch, Server

if TYPE_CHECKING:
    from adapterkit.serving.live import Live


def live() -> Live:
    from adapterkit.serving.live import Call, Live, generate_answer, generate_probe, info_listed

    return Live(
        "lorax router/src/server.rs; server/lorax_server/utils/sources/local.py; docs/models/adapters/index.md",
        listing=(Call("GET", "/info"),),
        listed=info_listed,
        probe=lambda adapter, base, prompt: generate_probe(
            prompt, **({"adapter_id": adapter, "adapter_source": "local"} if adapter else {})
        ),
        answer=generate_answer,
        by_path=True,
        knows=False,
    )


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
    live=live,
)
