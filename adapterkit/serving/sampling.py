"""Sampling parameters that a model's authors give in ``generation_config.json``, in a server's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def numbers(generation: Mapping[str, Any], words: Mapping[str, str]) -> list[tuple[str, str]]:
    """Name and value of each parameter that the file gives and the server knows.

    Args:
        generation: the file.
        words: what the server calls each of the file's keys.
    """
    if generation.get("do_sample") is False:
        return [(words["temperature"], "0")]
    return [
        (word, f"{generation[name]:g}")
        for name, word in words.items()
        if isinstance(generation.get(name), int | float) and not isinstance(generation[name], bool)
    ]
