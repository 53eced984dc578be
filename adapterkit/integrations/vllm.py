"""A resolver for vLLM: a request that names an adapter which is not loaded yet gets it from the registry, verified.

    pip install adapterkit          # in vLLM's own environment; the entry point is found there
    ADAPTERKIT_RESOLVER_SOURCES=registry,oci://registry.example.com/adapters VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 \\
        vllm serve BASE --enable-lora

It follows ``vllm/lora/resolver.py`` and ``vllm/plugins/lora_resolvers/`` of vLLM 0.33. vLLM loads every plug-in that it finds,
so nothing is done until ``ADAPTERKIT_RESOLVER_SOURCES`` says where adapters may come from (see `resolving.sources_of`).

vLLM asks once for each name and then remembers the answer until the adapter is unloaded: after an alias has moved it goes on
with the old version. The answers to requests name the version with its digest, and ``ADAPTERKIT_RESOLVE_ALIASES=0`` refuses
aliases; to follow one, use `adapterkit deploy`.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from adapterkit.integrations import SOURCES

if TYPE_CHECKING:
    from collections.abc import Sequence

NAME = "adapterkit"
log = logging.getLogger("vllm.adapterkit")


def register() -> None:
    """What vLLM calls by the entry point ``vllm.general_plugins``, in every process of its own."""
    said = os.environ.get(SOURCES, "")
    if not said:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    from adapterkit.integrations.resolving import sources_of

    LoRAResolverRegistry.register_resolver(NAME, resolver(sources_of(said)))


def resolver(sources: Sequence[str]) -> Any:
    """A resolver of vLLM's class; the class is made here, since vLLM is imported only where it is."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    class RegistryResolver(LoRAResolver):  # type: ignore[misc]
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """The request that loads an adapter; None where no source has it, or where it does not suit."""
            import asyncio

            return await asyncio.to_thread(_answer, base_model_name, lora_name, tuple(sources), LoRARequest)

    return RegistryResolver()


def _answer(base: str, asked: str, sources: tuple[str, ...], request: Any) -> Any:
    from adapterkit.integrations.resolving import answer

    found = answer(asked, base, sources, log)  # where there is none, other resolvers may have it
    if found is None:
        return None
    if found.served != asked:
        log.warning("adapterkit: '%s' is %s (%s) until it is unloaded", asked, found.served, found.record.ref)
    # vLLM gives it a number of its own afterwards.
    return request(lora_name=found.served, lora_int_id=1, lora_path=str(found.folder.absolute()))
