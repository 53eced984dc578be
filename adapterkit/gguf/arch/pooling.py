"""How an embedding model is pooled, from the files that sentence-transformers writes beside it."""

from __future__ import annotations

from typing import Any

from adapterkit.errors import CheckpointError
from adapterkit.foreign import json_value
from adapterkit.gguf.arch.config import Config

POOLING = {"none": 0, "mean": 1, "cls": 2, "last": 3, "rank": 4}
MODULES = "modules.json"
MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_WORDS = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
_KNOWN = ("Transformer", "Pooling", "Normalize")  # modules that a server has by itself


def pooling(config: Config) -> int | None:
    """How sentence-transformers pools this model, when its ``modules.json`` says it.

    Raises:
        CheckpointError: in a way that GGUF has no number for.
    """
    for module in _modules(config):
        if str(module.get("type", "")).endswith("Pooling"):
            found = _json(config, f"{module.get('path')}/config.json")
            if not isinstance(found, dict):
                return None
            mode = next((word for key, word in MODES.items() if found.get(key)), None)
            mode = mode or _WORDS.get(str(found.get("pooling_mode")))
            if mode is None:
                raise CheckpointError(f"{config.ref}: GGUF has no number for how it is pooled", "use mean, cls or last")
            return POOLING[mode]
    return None


def left_out(config: Config) -> tuple[str, ...]:
    """A note on sentence-transformers modules that come after the model and are in no GGUF file."""
    names = [
        str(module.get("path") or module.get("type"))
        for module in _modules(config)
        if not str(module.get("type", "")).endswith(_KNOWN)
    ]
    if not names:
        return ()
    return (f"{', '.join(names)} of sentence-transformers are not in the file; its embeddings are those before them",)


def _modules(config: Config) -> list[dict[str, Any]]:
    found = _json(config, MODULES)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _json(config: Config, name: str) -> Any:
    try:
        return json_value(config.files.get(name, b"null"))
    except ValueError:
        raise CheckpointError(f"{config.ref}: {name} is damaged", "download it again") from None
