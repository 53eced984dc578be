"""What serves a GGUF file: Ollama's Modelfile, with template, stops and parameters, or the command of llama-server."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.checkpoint.files import LocalFile
from adapterkit.errors import UsageError
from adapterkit.gguf.checkpoint import read_header
from adapterkit.gguf.vocab import special, templates
from adapterkit.gguf.vocab.sources import GENERATION
from adapterkit.gguf.vocab.turns import ANSWER, SYSTEM, USER, Turns, turns_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.gguf.reader import GGUFHeader

# generation_config.json: (Ollama's parameter, llama-server's flag); docs/modelfile.mdx of Ollama, llama-server --help.
PARAMETERS = {
    "temperature": ("temperature", "--temp"),
    "top_k": ("top_k", "--top-k"),
    "top_p": ("top_p", "--top-p"),
    "min_p": ("min_p", "--min-p"),
    "repetition_penalty": ("repeat_penalty", "--repeat-penalty"),
}
# Server: what the file beside the model is called after the model's own name.
SUFFIXES = {"ollama": "Modelfile", "llama.cpp": "llama-server.sh"}


@dataclass(frozen=True)
class Handover:
    """``text`` loads the model in the server; ``path`` is where it was written, if it was."""

    server: str
    text: str
    notes: tuple[str, ...] = ()
    path: str = ""


def handover(model: str | Path, server: str, *, generation: Mapping[str, Any] | None = None) -> Handover:
    """What loads a GGUF model in a server.

    Args:
        model: the ``.gguf`` file, or the first of a set.
        server: ``ollama`` or ``llama.cpp``.
        generation: the model's ``generation_config.json``; by default that of no model.

    Raises:
        UsageError: another server.
        CheckpointError: no GGUF file.
    """
    check_server(server)
    header = read_header(LocalFile(Path(model)))
    settings = dict(generation or {})
    if server == "llama.cpp":
        return Handover(server, _command(str(model), header, settings))
    text, notes = _modelfile(str(model), header, settings)
    return Handover(server, text, notes)


def check_server(server: str) -> None:
    if server not in SUFFIXES:
        raise UsageError(f"a GGUF file is not handed over to '{server}' here", f"use {' or '.join(SUFFIXES)}")


def write_handover(model: Path, server: str, *, beside: Path | None = None) -> Handover:
    """Write it beside the model, as ``MODEL.gguf.Modelfile`` or ``MODEL.gguf.llama-server.sh``; see `handover`.

    Args:
        model: the file that was written; of a set, the name it was asked for by.
        beside: a folder with the model's ``generation_config.json``.
    """
    first = next(
        path for path in (model, *sorted(model.parent.glob(f"{model.stem}-00001-of-*.gguf"))) if path.is_file()
    )
    found = handover(first, server, generation=_generation(beside))
    local = found.text.replace(str(first), f"./{first.name}")  # both files stay together
    target = model.with_name(f"{model.name}.{SUFFIXES[server]}")
    if server == "llama.cpp":
        local = f'#!/bin/sh\ncd "$(dirname "$0")" || exit\nexec {local} "$@"\n'
    with disk.writing(target.name, target.parent):
        disk.write_file(target, local.encode(), mode=0o755 if server == "llama.cpp" else 0o666)
    return Handover(server, local, found.notes, str(target))


def _generation(folder: Path | None) -> dict[str, Any]:
    try:
        found = json.loads((folder / GENERATION).read_bytes()) if folder is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _numbers(generation: Mapping[str, Any], place: int) -> list[tuple[str, str]]:
    """Sampling parameters that the model's authors give, in a server's words."""
    if generation.get("do_sample") is False:
        return [(PARAMETERS["temperature"][place], "0")]
    return [
        (words[place], f"{generation[name]:g}")
        for name, words in PARAMETERS.items()
        if isinstance(generation.get(name), int | float) and not isinstance(generation[name], bool)
    ]


def _command(model: str, header: GGUFHeader, generation: Mapping[str, Any]) -> str:
    parts = ["llama-server", "-m", model]
    if templates.of_header(header):
        parts.append("--jinja")
    for flag, value in _numbers(generation, 1):
        parts += [flag, value]
    return shlex.join(parts)


def _modelfile(model: str, header: GGUFHeader, generation: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    lines, notes = [f"FROM {model}"], []
    template = templates.of_header(header).get(templates.DEFAULT)
    if template is not None:
        turns = turns_of(template, _texts(header))
        written = go_template(_without_first(turns, header)) if turns is not None else None
        if written is None:
            notes.append(
                "its chat template does more than put texts around turns; the Modelfile has no TEMPLATE for it"
            )
        else:
            lines.append(f'TEMPLATE """{written}"""')
            if turns is not None and SYSTEM not in turns.before:
                notes.append("its chat template takes no system turn; a SYSTEM in the Modelfile would be left out")
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in stops(header)]
    lines += [f"PARAMETER {name} {value}" for name, value in _numbers(generation, 0)]
    return "\n".join(lines) + "\n", tuple(notes)


def _texts(header: GGUFHeader) -> dict[str, str]:
    """Special tokens under the names that templates use."""
    tokens = header.get("tokenizer.ggml.tokens", [])
    found = {}
    for role, key in special.KEYS.items():
        number = header.get(key)
        if isinstance(number, int) and 0 <= number < len(tokens):
            found[f"{role}_token"] = str(tokens[number])
    return found


def stops(header: GGUFHeader) -> list[str]:
    """The texts at which an answer ends: those that the file names, and tokens of it that llama.cpp knows as such."""
    texts = _texts(header)
    found = [texts[f"{role}_token"] for role in ("eos", "eot", "eom") if f"{role}_token" in texts]
    types = header.get("tokenizer.ggml.token_type", [])
    tokens = header.get("tokenizer.ggml.tokens", [])
    found += [text for text, kind in zip(tokens, types, strict=False) if kind == 3 and text in special.STOPS]
    return list(dict.fromkeys(found))


def _without_first(turns: Turns, header: GGUFHeader) -> Turns:
    """Without the token that the server puts before a text itself."""
    first = _texts(header).get("bos_token", "")
    if not first or not header.get(special.ADDS["bos"], False) or not turns.start.startswith(first):
        return turns
    return Turns(turns.start[len(first) :], turns.default, turns.before, turns.after, turns.answer, turns.inside)


def go_template(turns: Turns) -> str | None:
    """The same in Go's template language, as Ollama runs it; None for texts that a Modelfile cannot hold."""
    texts = (turns.start, turns.default, turns.answer, *turns.before.values(), *turns.after.values())
    if any("{{" in text or "}}" in text or '"""' in text or text.endswith('"') for text in texts):
        return None
    opening = turns.before[USER]
    if turns.inside and opening:
        opening = "{{ if not (and $.System (eq $i 1)) }}" + opening + "{{ end }}"
    last = "(eq (len (slice $.Messages $i)) 1)"
    known = SYSTEM in turns.before
    branches = [
        (SYSTEM, turns.before[SYSTEM] + "{{ .Content }}" + turns.after[SYSTEM] if known else ""),
        (USER, opening + "{{ .Content }}" + turns.after[USER]),
        (ANSWER, turns.before[ANSWER] + "{{ .Content }}{{ if not " + last + " }}" + turns.after[ANSWER] + "{{ end }}"),
    ]
    words = ("if", "else if", "else if")
    chosen = "".join(
        "{{ " + word + f' eq .Role "{role}" ' + "}}" + text for word, (role, text) in zip(words, branches, strict=True)
    )
    start = turns.start + ("{{ if not .System }}" + turns.default + "{{ end }}" if turns.default else "")
    more = "{{ if and " + last + ' (ne .Role "assistant") }}' + turns.answer + "{{ end }}"
    return start + "{{ range $i, $_ := .Messages }}" + chosen + "{{ end }}" + more + "{{ end }}"
