"""A config field that the runtime does not read, because it has one value built in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkit.gguf.arch.config import Config


@dataclass(frozen=True)
class Fixed:
    """A config field that the runtime does not read.

    Attributes:
        field: in the config; ``rope.NAME`` for one of ``rope_parameters``.
        value: what llama.cpp computes with, or what gives it for a config.
        does: what llama.cpp does, for the sentence that refuses: "llama.cpp ...".
        default: what a config without the field means, where that is not ``value``.
        when: whether the field matters in a config; always by default.
        limit: for a difference that shows only past a limit: "texts of more than 8 tokens" for a config.
    """

    field: str
    value: Any
    does: str
    default: Any = None
    when: Callable[[Config], bool] | None = None
    limit: Callable[[Config], str] | None = None

    def differs(self, config: Config) -> tuple[Any, Any] | None:
        """What the config says and what llama.cpp computes with, where these are not the same."""
        if self.when is not None and not self.when(config):
            return None
        place, _, inner = self.field.partition(".")
        said = config.rope.get(inner) if place == "rope" and inner else config.get(self.field)
        said = self.default if said is None else said
        wanted = self.value(config) if callable(self.value) else self.value
        return None if said is None or _same(said, wanted) else (said, wanted)


# Spellings of one activation function. ggml's GELU is the approximation by tanh, which is 1e-3 from the exact one.
_SPELLINGS = {
    **dict.fromkeys(("silu", "swish"), "silu"),
    **dict.fromkeys(("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python", "gelu_accurate"), "gelu"),
    **dict.fromkeys(("relu2", "relu_squared", "squared_relu"), "relu2"),
}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str) and isinstance(other, str):
        return _SPELLINGS.get(one, one) == _SPELLINGS.get(other, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return abs(one - other) <= 1e-6 * max(abs(one), abs(other))
    return bool(one == other)
