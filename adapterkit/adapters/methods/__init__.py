"""The table of methods, by ``peft_type``."""

from __future__ import annotations

from adapterkit.adapters.method import Method
from adapterkit.adapters.methods import lora, tokens, unmergeable

METHODS: dict[str, Method] = {method.peft_type: method for method in (*lora.METHODS, *tokens.METHODS)}
UNMERGEABLE = unmergeable.REASONS
