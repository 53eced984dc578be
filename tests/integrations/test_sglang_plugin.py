"""The plug-in for SGLang, on classes that follow SGLang 0.5.23: ``sglang/srt/plugins/hook_registry.py`` (``HookRegistry``,
``HookType``, an AROUND hook gets the original function first), ``sglang/srt/lora/lora_registry.py`` (``LoRARef``), and of
``sglang/srt/managers/tokenizer_manager.py`` what ``_validate_and_resolve_lora`` and ``_resolve_lora_path`` do with a name."""

from __future__ import annotations

import asyncio
import functools
import importlib.metadata
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from models import plain_adapter, plain_base

from adapterkit.errors import UsageError
from adapterkit.integrations import ALIASES, SOURCES, resolving, sglang
from adapterkit.provenance.register import register
from adapterkit.registry import verbs

BASE = "org/base"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@dataclass(frozen=True)
class LoRARef:
    lora_name: str
    lora_path: str
    pinned: bool | None = None


@dataclass
class Request:
    lora_path: str | list[str | None] | None = None
    lora_id: Any = None

    def __getitem__(self, number: int) -> Request:
        cache = self.__dict__.setdefault("_sub_obj_cache", {})
        assert isinstance(self.lora_path, list)
        return cache.setdefault(number, Request(self.lora_path[number]))  # type: ignore[no-any-return]


class HookType(Enum):
    AROUND = "around"


class HookRegistry:
    hooks: list[tuple[str, Callable[..., Any], HookType]] = []  # noqa: RUF012

    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType) -> None:
        cls.hooks.append((target, hook, hook_type))


@dataclass
class TokenizerManager:
    """A server that holds two adapters: the least used is unloaded, and stays in ``lora_ref_cache``."""

    model_path: str = BASE
    enable_lora: bool = True
    most: int = 2
    lora_ref_cache: dict[str, LoRARef] = field(default_factory=dict)
    loaded: dict[str, str] = field(default_factory=dict)

    async def _validate_and_resolve_lora(self, obj: Request) -> None:
        if not obj.lora_path:
            return
        if not self.enable_lora:
            raise ValueError("LoRA is not enabled")
        asked = obj.lora_path if isinstance(obj.lora_path, list) else [obj.lora_path]
        for name in asked:
            if name is None or name in self.loaded:
                continue
            if name not in self.lora_ref_cache:
                raise ValueError(f"Got LoRA adapter that has never been loaded: {name}")
            self.loaded[name] = self.lora_ref_cache[name].lora_path
            while len(self.loaded) > self.most:
                del self.loaded[next(iter(self.loaded))]
        obj.lora_id = [name and self.loaded[name] for name in asked]
        for number, single in obj.__dict__.get("_sub_obj_cache", {}).items():
            single.lora_id = obj.lora_id[number]


@pytest.fixture
def server(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenizerManager:
    """SGLang after it has loaded its plug-ins; the registry holds tickets@1 and @2, and prod is @1."""
    found: list[tuple[str, Callable[..., Any], HookType]] = []
    monkeypatch.setattr(HookRegistry, "hooks", found)
    for name, members in {
        "sglang": {},
        "sglang.srt": {},
        "sglang.srt.plugins": {},
        "sglang.srt.plugins.hook_registry": {"HookRegistry": HookRegistry, "HookType": HookType},
        "sglang.srt.lora": {},
        "sglang.srt.lora.lora_registry": {"LoRARef": LoRARef},
    }.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv(SOURCES, raising=False)
    monkeypatch.delenv(ALIASES, raising=False)
    sglang.register()
    assert found == []  # idle until it is told where adapters may come from
    base = plain_base(tmp_path / "base")
    for seed in (1, 2):
        register(plain_adapter(tmp_path / f"a{seed}", base, seed=seed, base_model_name_or_path=BASE), "tickets")
    verbs.tag("tickets@1", "prod")
    resolving._verified.clear()
    monkeypatch.setenv(SOURCES, "registry")
    sglang.register()
    ((target, hook, kind),) = found
    assert target.rpartition(".")[2] in vars(TokenizerManager)
    assert kind is HookType.AROUND
    original = TokenizerManager._validate_and_resolve_lora
    wrapped = functools.wraps(original)(lambda *args, **kwargs: hook(original, *args, **kwargs))
    monkeypatch.setattr(TokenizerManager, "_validate_and_resolve_lora", wrapped)
    return TokenizerManager()


def ask(server: TokenizerManager, asked: str | list[str | None] | None) -> Request:
    request = Request(asked)
    asyncio.run(server._validate_and_resolve_lora(request))
    return request


def short(version: int) -> str:
    return f"tickets@{verbs.show(f'tickets@{version}').record.content[:12]}"


def test_it_is_found_by_the_entry_point() -> None:
    entries = importlib.metadata.entry_points(group="sglang.srt.plugins")
    (entry,) = [one for one in entries if one.name == "adapterkit"]
    assert entry.load() is sglang.register


@pytest.mark.parametrize("which", ["digest", "1", "prod"])
def test_a_name_is_served_under_its_digest(which: str, server: TokenizerManager) -> None:
    request = ask(server, short(1) if which == "digest" else f"tickets@{which}")
    assert request.lora_path == short(1)
    (folder,) = request.lora_id
    assert (Path(folder) / "adapter_model.safetensors").is_file()
    assert list(server.loaded) == [short(1)]


def test_each_prompt_of_a_batch_has_its_own(server: TokenizerManager) -> None:
    request = Request(["tickets@prod", None, "tickets@2", "tickets@1"])
    early = request[2]  # SGLang cuts a batch into its prompts before or after
    asyncio.run(server._validate_and_resolve_lora(request))
    assert request.lora_path == [short(1), None, short(2), short(1)]
    assert (early.lora_path, early.lora_id) == (short(2), server.loaded[short(2)])
    assert ask(server, None).lora_id is None


def test_an_alias_that_moves_is_followed(server: TokenizerManager, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(server, "tickets@prod").lora_path == short(1)
    verbs.tag("tickets@2", "prod")
    monkeypatch.setenv(sglang.SECONDS, "1e9")
    assert ask(server, "tickets@prod").lora_path == short(1)  # asked so shortly before
    monkeypatch.setenv(sglang.SECONDS, "0")
    assert ask(server, "tickets@prod").lora_path == short(2)
    assert set(server.loaded) == {short(1), short(2)}  # what runs on the old one goes on


def test_what_the_server_dropped_it_loads_again_and_what_it_knows_is_its_own(server: TokenizerManager) -> None:
    server.most = 1
    for version in (1, 2, 1):
        assert ask(server, f"tickets@{version}").lora_path == short(version)
    assert list(server.loaded) == [short(1)]
    server.lora_ref_cache["mine"] = LoRARef("mine", "/adapters/mine")
    assert ask(server, "mine").lora_id == ["/adapters/mine"]


def test_what_is_not_there_or_does_not_suit_is_sglangs_own_error(
    server: TokenizerManager, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for asked in ("nothing@prod", "tickets@9", "../../etc", "org/name", "@"):
        with pytest.raises(ValueError, match="never been loaded"):
            ask(server, asked)
    server.model_path = "org/other"
    with pytest.raises(ValueError, match="never been loaded"):
        ask(server, "tickets@1")
    assert "trained on org/base, and the server has org/other" in caplog.text
    server.model_path = BASE
    monkeypatch.setenv(ALIASES, "0")
    with pytest.raises(ValueError, match="never been loaded"):
        ask(server, "tickets@prod")
    assert ask(server, "tickets@2").lora_path == short(2)
    server.enable_lora = False
    with pytest.raises(ValueError, match="not enabled"):
        ask(server, "tickets@1")


def test_a_wrong_source_is_said_at_the_start(server: TokenizerManager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SOURCES, "somewhere")
    with pytest.raises(UsageError, match="no place for adapters"):
        sglang.register()
