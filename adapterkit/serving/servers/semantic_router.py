"""vLLM Semantic Router: the adapters that it may choose between, as its config.yaml names them.

It stands before vLLM, which serves them: what vLLM makes of an adapter holds here too.
"""

from __future__ import annotations

from dataclasses import replace

from adapterkit.serving.server import Launch
from adapterkit.serving.servers.vllm import SERVER as VLLM

SERVER = replace(
    VLLM,
    name="semantic-router",
    launch=Launch(
        "routing:\n  modelCards:\n    - name: {json}",
        "routing:\n  modelCards:\n    - name: {json}\n      loras:\n{each}",
        "vllm-project/semantic-router, deploy/kubernetes/ai-gateway/semantic-router-values (config version v0.3)",
        each='        - name: "{name}"\n          description: {about}',
        between="\n",
        shell=False,
        note="vLLM serves them under these names by `adapterkit serve-args ... --for vllm`; a decision of the router names "
        "one by modelRefs: model, lora_name. `register --meta description=...` is what it is told of one",
    ),
    live=None,
)
