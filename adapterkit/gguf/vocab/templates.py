"""Chat templates: where they are written, whether they parse, and how GGUF keeps several."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING, Any

from adapterkit.errors import CheckpointError
from adapterkit.gguf.metadata import Entry, array, text
from adapterkit.gguf.reader import STRING
from adapterkit.gguf.vocab.sources import SETTINGS

if TYPE_CHECKING:
    from adapterkit.gguf.reader import GGUFHeader
    from adapterkit.gguf.vocab.sources import Sources

DEFAULT = "default"
TEMPLATE, NAMES = "tokenizer.chat_template", "tokenizer.chat_templates"
JINJA, JSON, MORE = "chat_template.jinja", "chat_template.json", "additional_chat_templates/"
MAX_TEMPLATE = 1 << 20  # characters; the longest published ones have 30,000
_PLAIN = frozenset(string.ascii_letters + string.digits)


def templates(sources: Sources) -> dict[str, str]:
    """Chat templates by name; the usual one is ``default``.

    ``chat_template.jinja`` goes before ``tokenizer_config.json``, as in transformers.

    Raises:
        CheckpointError: one does not parse.
    """
    found, where = _find(sources)
    for name, template in found.items():
        check(template, where if name == DEFAULT else f"{where} ({name})")
    return found


def _find(sources: Sources) -> tuple[dict[str, str], str]:
    if JINJA in sources:
        found = {DEFAULT: _text(sources.files[JINJA], JINJA)}
        for path in sorted(sources.files):
            if path.startswith(MORE) and path.endswith(".jinja"):
                found[path.removeprefix(MORE).removesuffix(".jinja")] = _text(sources.files[path], path)
        return found, JINJA
    said = sources.settings.get("chat_template")
    if isinstance(said, str):
        return {DEFAULT: said}, SETTINGS
    if isinstance(said, list):
        return {
            str(one["name"]): one["template"]
            for one in said
            if isinstance(one, dict) and isinstance(one.get("template"), str) and one.get("name")
        }, SETTINGS
    said = sources.json(JSON).get("chat_template")
    return ({DEFAULT: said}, JSON) if isinstance(said, str) else ({}, JSON)


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{where} is not UTF-8", "copy it again") from None


def check(template: str, where: str) -> None:
    """Parse a template, without running it; nothing is checked where jinja2 is not installed.

    Raises:
        CheckpointError: it does not parse.
    """
    if len(template) > MAX_TEMPLATE:
        raise CheckpointError(f"the chat template of {where} has {len(template)} characters", "use a plausible one")
    try:
        from jinja2.exceptions import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ModuleNotFoundError:
        return
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions())
    try:
        environment.parse(template)
    except (TemplateSyntaxError, RecursionError) as error:
        line = getattr(error, "lineno", 0)
        reason = getattr(error, "message", "") or "it nests too deeply"
        message = f"the chat template of {where} does not parse: line {line}: {reason}"
        raise CheckpointError(message, "repair it, or remove it to write none") from None


def extensions() -> list[Any]:
    """What chat templates may use beside jinja2 itself, as transformers has it."""
    return ["jinja2.ext.loopcontrols", _generation_tag()]


def _generation_tag() -> Any:
    """``{% generation %}``, with which transformers marks the assistant's tokens; it means nothing to a server."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation


def entries(found: dict[str, str]) -> list[Entry]:
    named = {"".join(c if c in _PLAIN else "_" for c in name): one for name, one in found.items() if name != DEFAULT}
    written = [text(f"{TEMPLATE}.{name}", one) for name, one in named.items()]
    if named:
        written.append(array(NAMES, STRING, list(named)))
    if DEFAULT in found:
        written.append(text(TEMPLATE, found[DEFAULT]))
    return written


def of_header(header: GGUFHeader) -> dict[str, str]:
    """The chat templates of a GGUF file by name."""
    names = header.get(NAMES, [])
    keys = {DEFAULT: TEMPLATE} | {str(name): f"{TEMPLATE}.{name}" for name in names}
    return {name: str(header[key]) for name, key in keys.items() if key in header.keys}
