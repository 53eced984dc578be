"""The resolver for vLLM, on classes with the published signatures of vLLM 0.33: ``vllm/lora/resolver.py`` (``LoRAResolver``,
``_LoRAResolverRegistry``), ``vllm/lora/request.py`` (``LoRARequest``), and what ``OpenAIServingModels.resolve_lora`` in
``vllm/entrypoints/openai/models/serving.py`` does with the answer."""

from __future__ import annotations

import asyncio
import importlib.metadata
import inspect
import logging
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from models import plain_adapter, plain_base

from adapterkit.errors import UsageError
from adapterkit.integrations import ALIASES, SOURCES, resolving, vllm
from adapterkit.provenance.register import register
from adapterkit.registry import verbs
from adapterkit.registry.home import Home

BASE = "org/base"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    base_model_name: str | None = None
    load_inplace: bool = False
    is_3d_lora_weight: bool = False

    def __post_init__(self) -> None:
        if self.lora_int_id < 1:
            raise ValueError(f"id must be > 0, got {self.lora_int_id}")
        assert self.lora_path, "lora_path cannot be empty"


class LoRAResolver(ABC):
    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None: ...


class Registry:
    def __init__(self) -> None:
        self.resolvers: dict[str, LoRAResolver] = {}

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver


class Serving:
    """``OpenAIServingModels`` as far as resolvers go: a name is asked for once."""

    def __init__(self, model: str, registry: Registry) -> None:
        self.model, self.registry, self.count = model, registry, 0
        self.lora_requests: dict[str, LoRARequest] = {}

    def resolve(self, name: str) -> LoRARequest | None:
        if name in self.lora_requests:
            return self.lora_requests[name]
        self.count += 1
        for one in self.registry.resolvers.values():
            found = asyncio.run(one.resolve_lora(self.model, name))  # type: ignore[arg-type]
            if found is not None:
                found.lora_int_id = self.count
                self.lora_requests[name] = found
                return found
        return None


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    found = Registry()
    for name, members in {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": found},
    }.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv(SOURCES, raising=False)
    monkeypatch.delenv(ALIASES, raising=False)
    resolving._verified.clear()
    return found


@pytest.fixture
def tickets(home: Path, tmp_path: Path) -> Path:
    base = plain_base(tmp_path / "base")
    for seed in (1, 2):
        register(plain_adapter(tmp_path / f"a{seed}", base, seed=seed, base_model_name_or_path=BASE), "tickets")
    verbs.tag("tickets@1", "prod")
    return home


@pytest.fixture
def serving(registry: Registry, tickets: Path, monkeypatch: pytest.MonkeyPatch) -> Serving:
    monkeypatch.setenv(SOURCES, "registry")
    vllm.register()
    return Serving(BASE, registry)


def short(version: int) -> str:
    return f"tickets@{verbs.show(f'tickets@{version}').record.content[:12]}"


def test_it_is_found_by_the_entry_point_and_idle_until_it_is_asked_for(registry: Registry) -> None:
    vllm.register()
    assert registry.resolvers == {}
    (entry,) = [
        one for one in importlib.metadata.entry_points(group="vllm.general_plugins") if one.name == "adapterkit"
    ]
    assert entry.load() is vllm.register


def test_its_signature_is_that_of_vllm(registry: Registry) -> None:
    mine = inspect.signature(type(vllm.resolver(["registry"])).resolve_lora)
    assert list(mine.parameters) == list(inspect.signature(LoRAResolver.resolve_lora).parameters)
    assert inspect.iscoroutinefunction(vllm.resolver(["registry"]).resolve_lora)


@pytest.mark.parametrize("which", ["digest", "long", "1", "prod"])
def test_a_name_gives_the_folder_of_exactly_that_version(which: str, serving: Serving) -> None:
    content = verbs.show("tickets@1").record.content
    asked = {"digest": short(1), "long": f"tickets@{content}"}.get(which, f"tickets@{which}")
    found = serving.resolve(asked)
    assert found is not None
    assert found.lora_name == short(1)  # so the answer to a request says which version it was
    assert {path.name for path in Path(found.lora_path).iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not found.load_inplace


def test_after_a_move_of_the_alias_the_digest_still_means_the_same(
    serving: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "vllm.adapterkit"):
        serving.resolve("tickets@prod")
    assert f"'tickets@prod' is {short(1)}" in caplog.text
    verbs.tag("tickets@2", "prod")
    assert serving.resolve("tickets@prod").lora_name == short(1)  # type: ignore[union-attr]  # vLLM's memory, said openly
    del serving.lora_requests["tickets@prod"]  # /v1/unload_lora_adapter
    assert serving.resolve("tickets@prod").lora_name == short(2)  # type: ignore[union-attr]
    assert serving.resolve(short(1)).lora_name == short(1)  # type: ignore[union-attr]


def test_aliases_can_be_refused(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(ALIASES, "0")
    for asked in ("tickets@prod", "tickets", "tickets@latest"):
        assert serving.resolve(asked) is None
    assert "aliases may not be used" in caplog.text
    assert serving.resolve("tickets@2") is not None


def test_what_is_not_there_or_does_not_suit_is_no_adapter(
    serving: Serving, registry: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for asked in (
        "nothing@prod",
        "tickets@9",
        "tickets@000000000000",
        "../../etc",
        "tickets@../x",
        "org/name",
        "",
        "@",
    ):
        assert serving.resolve(asked) is None, asked
    register(tmp_path / "base", "model", kind="merged")
    assert serving.resolve("model") is None
    assert Serving("org/other", registry).resolve("tickets@1") is None
    assert "trained on org/base, and the server has org/other" in caplog.text


def test_a_base_in_a_folder_is_compared_by_its_weights(home: Path, registry: Registry, tmp_path: Path) -> None:
    from models import random_tensors, read_tensors, write_checkpoint

    base = plain_base(tmp_path / "base")
    shapes = {name: tuple(t.shape) for name, t in read_tensors(base).items()}
    sibling = write_checkpoint(tmp_path / "sibling", random_tensors(shapes, "bfloat16", 9))
    register(plain_adapter(tmp_path / "a", base, base_model_name_or_path=BASE), "tickets", base=base)
    assert resolving.find_adapter("tickets", base=str(base)).served == short(1)
    registry.register_resolver("x", vllm.resolver(["registry"]))
    assert Serving(str(sibling), registry).resolve("tickets") is None


def test_bytes_that_rotted_are_not_served(serving: Serving, tickets: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = next(file for file in verbs.show("tickets@1").record.files if file.path.endswith(".safetensors"))
    blob = Home(tickets).blob(file.sha256)
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
    assert serving.resolve("tickets@1") is None
    assert "is not what its record says" in caplog.text
    assert serving.resolve("tickets@2") is not None


def test_from_an_oci_registry_and_the_hub(
    tickets: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "oci"))
    from memory_registry import answer_in_memory

    from adapterkit.oci.push import push_oci

    answer_in_memory("127.0.0.1:5000", monkeypatch)
    push_oci("tickets@1", "oci://127.0.0.1:5000/team/tickets:prod")
    push_oci("tickets@2", "oci://127.0.0.1:5000/team/tickets:latest")
    first, second = short(1), short(2)
    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "server"))
    monkeypatch.setenv(SOURCES, "registry, oci://127.0.0.1:5000/team")
    vllm.register()
    serving = Serving(BASE, registry)
    assert serving.resolve(second).lora_name == second  # type: ignore[union-attr]
    assert serving.resolve("tickets@prod").lora_name == first  # type: ignore[union-attr]
    assert serving.resolve(first).lora_name == first  # type: ignore[union-attr]  # it is in the server's registry now
    assert serving.resolve("tickets@000000000000") is None
    assert serving.resolve("nothing@prod") is None


@pytest.mark.parametrize("text", ["ftp://bucket", "hub:", "hub:org/name", "folder"])
def test_other_sources_are_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="no place for adapters"):
        resolving.sources_of(text)


def test_buckets_of_every_store_are_sources() -> None:
    assert resolving.sources_of("s3://b/x, gs://b/x,az://c") == ("s3://b/x", "gs://b/x", "az://c")


def test_from_the_hub(tickets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hub import TOKEN, client_of
    from hub_writes import WritableHub

    from adapterkit.hub.push import push

    with WritableHub() as served, client_of(served, tmp_path / "cache" / "hub", monkeypatch, TOKEN):
        push("tickets@1", "team/tickets", tag="prod")
        found = resolving.find_adapter("tickets@prod", sources=["hub:team"], home=tmp_path / "server")
        assert found.served == short(1)
        assert found.record.origin is not None
        again = resolving.find_adapter(short(1), sources=["registry"], home=tmp_path / "server")
        assert again.folder == found.folder
