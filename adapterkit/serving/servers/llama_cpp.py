"""llama.cpp's llama-server."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from adapterkit.serving.server import PLAIN, Expectation, Launch, ModelFile, Server

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.gguf.reader import GGUFHeader
    from adapterkit.serving.live import Live, Serving

_TOOL = "llama.cpp convert_lora_to_gguf.py"
_GGUF = (
    "write it with all scalings folded in: adapterkit convert {adapter} --to gguf-lora --base {base} -o adapter.gguf"
)
EXPECTATIONS = (
    Expectation("not_lora", "refused", "the converter reads LoRA only", _TOOL, PLAIN),
    Expectation("dora", "refused", "magnitudes stop the conversion", "ggml-org/llama.cpp#6536", PLAIN),
    Expectation("residual", "wrong", "the base is not brought to the residual", _TOOL, PLAIN),
    Expectation("whole", "refused", "whole modules stop the conversion", "ggml-org/llama.cpp#11554"),
    Expectation("bias", "refused", "biases stop the conversion", _TOOL),
    Expectation("tokens", "refused", "token rows stop the conversion", _TOOL),
    Expectation("rslora", "wrong", "the scale is written as alpha/r", f"{_TOOL}, lines 528-539", _GGUF),
    Expectation("alpha_pattern", "wrong", "one alpha is written for all", f"{_TOOL}, lines 528-539", _GGUF),
    Expectation("experts", "refused", "target_parameters is not read", _TOOL, _GGUF),
)


def command(model: str, header: GGUFHeader, generation: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The command that serves a model, with its authors' sampling parameters (llama-server --help); of a LoRA file, the
    command that loads it beside a base, which the user knows alone."""
    from adapterkit.gguf.vocab import templates
    from adapterkit.serving.sampling import numbers

    if header.get("general.type") == "adapter":
        note = "put the base in the place of BASE.gguf in the command"
        return shlex.join(["llama-server", "-m", "BASE.gguf", "--lora", model]), (note,)
    parts = ["llama-server", "-m", model]
    if templates.of_header(header):
        parts.append("--jinja")
    for flag, value in numbers(generation, _FLAGS):
        parts += [flag, value]
    return shlex.join(parts), ()


def _listed(answers: Sequence[Any]) -> Serving:
    """``/lora-adapters``, a list of id, path and scale, and ``/v1/models``."""
    from adapterkit.serving.live import ServedAdapter, Serving, openai_models

    base = openai_models(answers[1:])
    rows = [row for row in answers[0] if isinstance(row, dict)] if isinstance(answers[0], list) else []
    adapters = (
        ServedAdapter(str(row["path"]), str(row["path"]), float(row.get("scale") or 0.0), row["id"])
        for row in rows
        if isinstance(row.get("id"), int) and isinstance(row.get("path"), str)
    )
    return Serving(base.names, base.names[0] if base.names else "", tuple(adapters))


def live() -> Live:
    from adapterkit.serving.live import MODELS, Call, Live, openai_answer, openai_probe

    return Live(
        "llama.cpp tools/server/server.cpp, server-context.cpp and README.md (LoRA adapters)",
        listing=(Call("GET", "/lora-adapters"), MODELS),
        listed=_listed,
        # What is not named gets a scale of 0. Without a cache, since keys and values are those of another adapter.
        scales=lambda scales: Call("POST", "/lora-adapters", [{"id": place, "scale": s} for place, s in scales]),
        probe=lambda adapter, base, prompt: openai_probe(base, prompt, cache_prompt=False),
        answer=openai_answer,
        gguf=True,
        splits=",",
        restart=lambda base, adapters: [
            *("llama-server", "-m", base, "--lora", ",".join(path for _, path in adapters)),
            "--lora-init-without-apply",
        ],
    )


_FLAGS = {
    "temperature": "--temp",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "min_p": "--min-p",
    "repetition_penalty": "--repeat-penalty",
}

SERVER = Server(
    "llama.cpp",
    expectations=EXPECTATIONS,
    launch=Launch(
        "llama-server -m {path}",
        "llama-server -m {base} --lora {each}",
        "ggml-org/llama.cpp, tools/server/README.md and common/arg.cpp",
        each="{path}",
        # An option that is given twice counts once, and all adapters are applied together unless told otherwise.
        between=",",
        several=" --lora-init-without-apply",
        after='{{"prompt": "...", "lora": [{{"id": {place}, "scale": 1.0}}]}}',
        after_one=False,
        gguf=True,
        hub=False,
    ),
    file=ModelFile("llama-server.sh", command, script=True, start="{path}"),
    live=live,
)
