"""Ollama's Modelfile: template, stops and parameters of a GGUF model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from adapterkit.gguf.vocab import special, templates
from adapterkit.gguf.vocab.turns import ANSWER, SYSTEM, USER, Turns, turns_of
from adapterkit.serving.sampling import numbers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.gguf.reader import GGUFHeader

# Architectures whose adapters Ollama loads: Llama (and Mistral, whose architecture is the same in GGUF) and Gemma, by
# docs/modelfile.mdx.
ADAPTERS = ("llama", "gemma", "gemma2")
# What docs/modelfile.mdx of Ollama calls the keys of generation_config.json.
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


def modelfile(model: str, header: GGUFHeader, generation: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The Modelfile of a model, and what of the model it cannot say."""
    if header.get("general.type") == "adapter":
        return _of_adapter(model, header)
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
    lines += [f"PARAMETER {name} {value}" for name, value in numbers(generation, _PARAMETERS)]
    return "\n".join(lines) + "\n", tuple(notes)


def _of_adapter(model: str, header: GGUFHeader) -> tuple[str, tuple[str, ...]]:
    """The Modelfile of a LoRA file. Which base it belongs to is known to the user alone: Ollama takes a GGUF file or a
    model of its own after ``FROM``."""
    base, arch = str(header.get("general.base_model.0.name") or ""), str(header.get("general.architecture"))
    lines = [
        f"# The base{f', {base},' if base else ''} as a GGUF file, or as a model that Ollama has.",
        "FROM BASE.gguf",
    ]
    notes = ["put the base in the place of BASE.gguf in the Modelfile"]
    if arch not in ADAPTERS:
        notes.append(f"Ollama names {', '.join(ADAPTERS)} as the architectures whose adapters it loads; merge a {arch}")
    return "\n".join([*lines, f"ADAPTER {model}"]) + "\n", tuple(notes)


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
