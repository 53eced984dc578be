"""A plug-in for SGLang: a request that names an adapter which is not loaded yet gets it from the registry, verified.

    pip install adapterkit          # in SGLang's own environment; the entry point is found there
    ADAPTERKIT_RESOLVER_SOURCES=registry,oci://registry.example.com/adapters \\
        python -m sglang.launch_server --model-path BASE --enable-lora --max-lora-rank 64 --lora-target-modules all

SGLang loads the functions of the entry point group ``sglang.srt.plugins`` in each of its processes, and lets them hook its
own (``sglang/srt/plugins/`` of SGLang 0.5.23). The hook is around ``TokenizerManager._validate_and_resolve_lora``, where a
request's ``lora_path`` (or the part of ``model`` behind the colon) becomes an adapter. A name that SGLang does not know is
looked up. What it means is put where SGLang keeps the adapters that it may load again (``lora_ref_cache``), under the name with
its digest, and the request goes on with that name. SGLang then loads it by itself, and drops the least used when there are more
than its ``--max-loaded-loras``.

So an alias that moves is followed: what it means is asked again when the last answer is ten seconds old
(``ADAPTERKIT_RESOLVE_SECONDS``).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from typing import TYPE_CHECKING, Any

from adapterkit.integrations import SOURCES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

SECONDS = "ADAPTERKIT_RESOLVE_SECONDS"
TARGET = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_and_resolve_lora"
log = logging.getLogger("sglang.adapterkit")


def register() -> None:
    """What SGLang calls by the entry point ``sglang.srt.plugins``, in every process of its own."""
    said = os.environ.get(SOURCES, "")
    if not said:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from adapterkit.integrations.resolving import sources_of

    HookRegistry.register(TARGET, AdapterLookup(sources_of(said)).around, HookType.AROUND)


class AdapterLookup:
    """What names of adapters mean, and when that was asked.

    Args:
        sources: where adapters may come from, see `adapterkit.integrations.resolving.sources_of`.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self.sources = tuple(sources)
        self.known: dict[str, tuple[float, str]] = {}

    async def around(self, original: Callable[[Any, Any], Awaitable[None]], manager: Any, request: Any) -> None:
        """Give the names of a request that the server does not know their meaning, then let the server go on.

        Args:
            original: SGLang's own function, of the manager and the request.
            manager: its ``TokenizerManager``.
            request: a ``GenerateReqInput`` or ``EmbeddingReqInput``; its ``lora_path`` is a name, or a list with a name or
                None for each prompt.
        """
        asked = request.lora_path
        if not asked or not manager.enable_lora:
            await original(manager, request)
            return
        names = [asked] if isinstance(asked, str) else list(asked)
        new = {name: await self._served(manager, name) for name in dict.fromkeys(names) if name}
        request.lora_path = new[asked] if isinstance(asked, str) else [new[name] if name else name for name in names]
        for number, single in request.__dict__.get(
            "_sub_obj_cache", {}
        ).items():  # prompts of a batch that it has cut out
            single.lora_path = request.lora_path[number] if isinstance(request.lora_path, list) else request.lora_path
        await original(manager, request)

    async def _served(self, manager: Any, name: str) -> str:
        """The name under which the server has, or can load, what ``name`` means; ``name`` itself where nobody knows."""
        if name in manager.lora_ref_cache:
            return name
        at, served = self.known.get(name, (0.0, ""))
        if served in manager.lora_ref_cache and time.monotonic() - at < float(os.environ.get(SECONDS, "10")):
            return served
        from adapterkit.integrations.resolving import answer

        find = functools.partial(answer, name, str(manager.model_path), self.sources, log)
        found = await asyncio.to_thread(find)
        if found is None:
            return name
        if found.served not in manager.lora_ref_cache:
            from sglang.srt.lora.lora_registry import LoRARef

            log.warning("adapterkit: '%s' is %s (%s)", name, found.served, found.record.ref)
            manager.lora_ref_cache[found.served] = LoRARef(
                lora_name=found.served, lora_path=str(found.folder.absolute()), pinned=False
            )
        self.known[name] = (time.monotonic(), found.served)
        return found.served
