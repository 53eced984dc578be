"""`serve-args`: what is printed is what the servers' documentation asks for, with paths that exist."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml
from models import plain_adapter, plain_base

from adapterkit.errors import AdapterkitError, NotFound, UsageError
from adapterkit.provenance.register import register
from adapterkit.serving.command import serve_args


@pytest.fixture(autouse=True)
def _versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAPTERKIT_HOME", str(tmp_path / "home"))
    base = plain_base(tmp_path / "base")
    for name, rank in (("support", 4), ("billing", 24)):
        folder = plain_adapter(tmp_path / name, base, rank=rank, base_model_name_or_path="org/base")
        register(folder, name)
    register(plain_adapter(tmp_path / "stray", base, base_model_name_or_path="org/other"), "stray")
    register(base, "model", kind="merged")
    (tmp_path / "lora.gguf").write_bytes(b"GGUF")
    register(tmp_path / "lora.gguf", "lora", kind="adapter")
    (tmp_path / "other.gguf").write_bytes(b"GGUF!")
    register(tmp_path / "other.gguf", "other", kind="adapter")


def test_vllm_gets_every_adapter_and_a_rank_that_it_takes() -> None:
    words = shlex.split(serve_args(["support@1", "billing"], "vllm").text)
    assert words[:3] == ["vllm", "serve", "org/base"]
    assert words[words.index("--max-loras") + 1] == "2"
    assert words[words.index("--max-lora-rank") + 1] == "32"
    modules = dict(word.split("=") for word in words[words.index("--lora-modules") + 1 :])
    assert set(modules) == {"support", "billing"}
    assert all((Path(path) / "adapter_model.safetensors").is_file() for path in modules.values())


def test_sglang_and_lorax() -> None:
    words = shlex.split(serve_args(["billing"], "sglang").text)
    assert words[words.index("--max-lora-rank") + 1] == "24"
    assert words[words.index("--lora-paths") + 1].startswith("billing=/")
    found = serve_args(["billing"], "lorax")
    assert shlex.split(found.text) == ["lorax-launcher", "--model-id", "org/base"]
    assert json.loads(found.requests[0])["parameters"] == {"adapter_source": "local", "adapter_id": found.paths[0]}


def test_two_versions_of_one_name_are_two_adapters(tmp_path: Path) -> None:
    register(plain_adapter(tmp_path / "more", tmp_path / "base", rank=2, base_model_name_or_path="org/base"), "support")
    words = shlex.split(serve_args(["support@1", "support@2"], "vllm").text)
    assert {word.partition("=")[0] for word in words if "=/" in word} == {"support-1", "support-2"}


def test_the_table_of_a_router(tmp_path: Path) -> None:
    """The keys are those of the project's own values of deploy/kubernetes/ai-gateway (config version v0.3)."""
    said = 'Bills: "when", and how much'
    folder = plain_adapter(tmp_path / "bills", tmp_path / "base", rank=2, base_model_name_or_path="org/base")
    register(folder, "true", meta={"description": said})
    found = serve_args(["true", "support"], "semantic-router")
    assert yaml.safe_load(found.text) == {
        "routing": {
            "modelCards": [
                {
                    "name": "org/base",
                    "loras": [
                        {"name": "true", "description": said},
                        {"name": "support", "description": "support@1, lora"},
                    ],
                }
            ]
        }
    }
    vllm = shlex.split(serve_args(["true", "support"], "vllm").text)
    assert [word.partition("=")[0] for word in vllm if "=/" in word] == ["true", "support"]
    assert yaml.safe_load(serve_args(["model"], "semantic-router").text)["routing"]["modelCards"][0]["name"]


def test_gguf_servers(tmp_path: Path) -> None:
    found = serve_args(["lora"], "llama.cpp", base="base.gguf")
    assert shlex.split(found.text) == ["llama-server", "-m", "base.gguf", "--lora", found.paths[0]]
    assert Path(found.paths[0]).read_bytes() == b"GGUF"
    assert found.requests == ()  # a single one is applied to every request
    copied = serve_args(["support"], "ollama", base="llama3.2", copy=tmp_path / "served")
    assert copied.text == f"FROM llama3.2\nADAPTER {tmp_path}/served/support-1"
    assert not any(path.is_symlink() for path in (tmp_path / "served").rglob("*"))


def test_llama_server_keeps_several_adapters_apart() -> None:
    """A second --lora would take the place of the first, and without the last flag both would be applied at once."""
    found = serve_args(["lora", "other"], "llama.cpp", base="base.gguf")
    paths = ",".join(found.paths)
    assert shlex.split(found.text) == ["llama-server", "-m", "base.gguf", "--lora", paths, "--lora-init-without-apply"]
    assert [json.loads(request)["lora"] for request in found.requests] == [
        [{"id": 0, "scale": 1.0}],
        [{"id": 1, "scale": 1.0}],
    ]


def test_a_set_of_gguf_files(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    (tmp_path / "parts").mkdir()
    writer = GGUFWriter(tmp_path / "parts" / "m.gguf", "llama", split_max_tensors=1)
    writer.add_string("general.name", "in parts")
    for name in ("token_embd.weight", "output.weight"):
        writer.add_tensor(name, np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    register(tmp_path / "parts", "parts", kind="quantized")
    words = shlex.split(serve_args(["parts"], "llama.cpp").text)
    assert words[words.index("-m") + 1].endswith("/m-00001-of-00002.gguf")
    found = serve_args(["parts"], "ollama")
    (line,) = [line for line in found.text.splitlines() if line.startswith("FROM ")]
    assert line.endswith("/m-*.gguf")
    assert not any("0.34.0" in note for note in found.notes)  # which is about adapters


def test_what_newer_versions_of_ollama_refuse_is_said() -> None:
    assert "up to 0.34.0" in serve_args(["lora"], "ollama", base="llama3.2").notes[0]


def test_a_whole_model_is_served_as_it_is() -> None:
    found = serve_args(["model"], "vllm")
    assert shlex.split(found.text) == ["vllm", "serve", found.paths[0]]
    assert (Path(found.paths[0]) / "config.json").is_file()


@pytest.mark.parametrize(
    ("refs", "server", "error", "words"),
    [
        (["support"], "nobody", UsageError, "known: "),
        (["support", "stray"], "vllm", UsageError, "several bases"),
        (["support", "model"], "vllm", UsageError, "one"),
        (["support", "billing"], "ollama", UsageError, "one adapter"),
        (["support"], "llama.cpp", UsageError, "convert"),
        (["support"], "ollama", NotFound, "base="),
        (["nobody"], "vllm", NotFound, "registry"),
    ],
)
def test_what_cannot_be_served(refs: list[str], server: str, error: type[AdapterkitError], words: str) -> None:
    with pytest.raises(error) as raised:
        serve_args(refs, server)
    assert words in str(raised.value)
