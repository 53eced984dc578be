"""Ollama."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.serving.server import Expectation, Launch, ModelFile, Server
from adapterkit.serving.servers.llama_cpp import EXPECTATIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.gguf.reader import GGUFHeader

_FOLDED = "fold it in: adapterkit merge {base} {adapter} -o merged.gguf --for ollama"


def _modelfile(model: str, header: GGUFHeader, generation: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    from adapterkit.serving.modelfile import modelfile

    return modelfile(model, header, generation)


# Ollama took adapters as llama.cpp has them, until it took none: what is wrong with one is mended by folding it in.
SERVER = Server(
    "ollama",
    expectations=(
        Expectation(
            "adapter",
            "refused",
            "releases from 0.34.1 create no model from a Modelfile with ADAPTER; older ones load it as GGUF, and as "
            "safetensors of Llama, Mistral and Gemma; a model that an older one created still runs",
            "ollama/ollama#14969; generative-computing/mellea#1651; docs.ollama.com, Importing a Model",
            _FOLDED,
        ),
        *(replace(row, says=f"up to 0.34.0, {row.says}", fix=_FOLDED) for row in EXPECTATIONS),
    ),
    launch=Launch(
        "FROM {path}",
        "FROM {base}\nADAPTER {each}",
        "docs.ollama.com, Modelfile Reference and Importing a Model; ollama/ollama#14969",
        each="{path}",
        single=True,
        parts=True,
        shell=False,
        hub=False,
        note="Ollama takes ADAPTER up to 0.34.0 only; for a newer one fold it in: adapterkit merge BASE.gguf {ref} -o OUT.gguf",
    ),
    file=ModelFile("Modelfile", _modelfile, script=False, start="ollama create NAME -f {path}"),
)
