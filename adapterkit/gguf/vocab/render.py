"""Chat templates rendered in a process of their own: sandboxed, with a limit in time, since templates come with models.

Run as ``python -m adapterkit.gguf.vocab.render``: a template, the names of special tokens and conversations as JSON on
standard input, a text or null for each conversation on standard output.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

LIMIT = 20.0  # seconds
MEMORY = 1 << 30  # bytes of addresses of the process; a template needs some megabytes
LONGEST = 1 << 20  # characters of a rendered text
Turn = tuple[str, str]  # role, content


def render(
    template: str, conversations: Sequence[tuple[Sequence[Turn], bool]], tokens: Mapping[str, str]
) -> list[str | None] | None:
    """The text of each conversation (turns, and whether an answer is to follow); None where the template refuses it.

    None for all of them when the template cannot be rendered at all: jinja2 is missing, or it takes too long.
    """
    asked = json.dumps([template, [[list(turns), more] for turns, more in conversations], dict(tokens)])
    command = [sys.executable, "-m", "adapterkit.gguf.vocab.render"]
    try:
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=LIMIT, encoding="utf-8")
        found: list[str | None] = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return None
    return found


def bound(memory: int, seconds: float) -> None:
    """Limit what this process may use from now on, where the system can; it ends when it needs more."""
    try:
        import resource
    except ImportError:  # Windows: the limit in time of the parent is left
        return
    for which, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, int(seconds))):
        hard = resource.getrlimit(which)[1]
        try:
            resource.setrlimit(which, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
        except (ValueError, OSError):
            pass


def main() -> None:
    bound(MEMORY, LIMIT)
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    from adapterkit.gguf.vocab.templates import extensions

    template, conversations, tokens = json.load(sys.stdin)
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions())
    environment.filters["tojson"] = lambda value, **more: json.dumps(value, ensure_ascii=False, **more)

    def refuse(message: str) -> Any:
        raise TemplateError(message)

    environment.globals["raise_exception"] = refuse
    compiled = environment.from_string(template)
    found: list[str | None] = []
    for turns, more in conversations:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            found.append(_text(compiled.generate(messages=messages, add_generation_prompt=more, **tokens)))
        except Exception:  # whatever a template raises, it does not take this conversation
            found.append(None)
    json.dump(found, sys.stdout)


def _text(pieces: Iterable[str]) -> str:
    text = ""
    for piece in pieces:
        text += piece
        if len(text) > LONGEST:
            raise ValueError("a template that writes without an end")
    return text


if __name__ == "__main__":
    main()
