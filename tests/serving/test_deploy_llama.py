"""`deploy` to llama.cpp's own server: scales of adapters that it was started with, and a script where it was not."""

from __future__ import annotations

import json
import shlex
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")
from llama_server import llama_server, tiny_base

from adapterkit import convert
from adapterkit.errors import CheckFailed, UsageError
from adapterkit.provenance.register import register
from adapterkit.registry import endpoints, verbs
from adapterkit.registry.checkout import checkout
from adapterkit.registry.home import Home
from adapterkit.verbs.deploy import deploy, undeploy
from adapterkit.verbs.deployed import status

PROMPT = [1, 5, 17, 200]
TOO_LONG = [5] * 500


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and two adapters, each as PEFT saves it and as a GGUF file."""
    from models import make_adapter
    from peft import LoraConfig

    top = tmp_path_factory.mktemp("llama")
    tiny_base(top / "hf")
    convert(top / "hf", top / "base.gguf", to="gguf")
    for seed in (1, 2):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
        make_adapter(top / f"a{seed}", top / "hf", config, seed=seed)
        convert(top / f"a{seed}", top / f"a{seed}.gguf", to="gguf-lora", base=top / "hf")
    return top


def scales(url: str) -> list[float]:
    with urllib.request.urlopen(f"{url}/lora-adapters", timeout=900) as answer:
        return [row["scale"] for row in json.loads(answer.read())]


def answer(url: str, lora: list[dict[str, Any]] | None = None) -> Any:
    body = {"prompt": PROMPT, "n_predict": 4, "temperature": 0.0, "n_probs": 1, "cache_prompt": False}
    body |= {"lora": lora} if lora is not None else {}
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=900) as found:
        return [one["logprob"] for one in json.loads(found.read())["completion_probabilities"]]


def test_llama_server_applies_the_version_and_goes_back(made: Path, home: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        register(made / f"a{seed}.gguf", "tickets")
    register(made / "a1", "folder")
    verbs.tag("tickets@1", "prod")
    first = checkout("tickets@1") / "a1.gguf"
    with llama_server(made / "base.gguf", [first, made / "a2.gguf"]) as url:
        bare = answer(url)
        found = deploy("tickets@prod", url, kind="llama.cpp")
        assert scales(url) == [1.0, 0.0]
        assert any("same" in text for text in found.notes)  # the base of the GGUF's own record
        one = answer(url)
        assert one == answer(url, [{"id": 0, "scale": 1.0}]) != bare
        assert not deploy("tickets@prod", url).new
        verbs.tag("tickets@2", "prod")
        # The second file is a copy elsewhere: its bytes say which version it is.
        assert deploy("tickets@prod", url).before == "tickets@1"
        assert scales(url) == [0.0, 1.0]
        assert answer(url) not in (one, bare)
        verbs.tag("tickets@1", "prod")
        deploy("tickets@prod", url)
        assert answer(url) == one
        assert status()[0].ok
        with pytest.raises(UsageError, match="is no GGUF file"):
            deploy("folder", url)
        undeploy("tickets", found.server)
        assert answer(url) == bare
        # A prompt longer than its context: the scales come back.
        with pytest.raises(CheckFailed, match="context"):
            deploy("tickets@prod", url, probe=TOO_LONG)
        assert scales(url) == [0.0, 0.0]
        assert endpoints.deployed(Home(home), found.server, "tickets") is None


def test_what_it_was_not_started_with_needs_a_restart(made: Path, home: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        register(made / f"a{seed}.gguf", f"tickets-{seed}")
    script = tmp_path / "start.sh"
    with llama_server(made / "base.gguf", [made / "a1.gguf"]) as url:
        with pytest.raises(CheckFailed, match="only when it starts"):
            deploy("tickets-2", url, kind="llama.cpp", restart_file=script)
        words = shlex.split(script.read_text().splitlines()[1])
        assert words[:4] == ["exec", "llama-server", "-m", str(made / "base.gguf")]
        paths = words[words.index("--lora") + 1].split(",")
        assert paths[0] == str(made / "a1.gguf")
        assert "--lora-init-without-apply" in words
    with llama_server(Path(words[3]), paths) as url:
        deploy("tickets-2", url, kind="llama.cpp")
        assert scales(url) == [0.0, 1.0]
        with pytest.raises(CheckFailed, match="applies all adapters together"):
            deploy("tickets-1", url, kind="llama.cpp")
        assert scales(url) == [0.0, 1.0]
