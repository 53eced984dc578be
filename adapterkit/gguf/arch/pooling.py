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
    """How this model is pooled: by its head, if it is a classifier, or as its ``modules.json`` says.

    Raises:
        CheckpointError: in a way that GGUF has no number for.
    """
    if is_classifier(config):
        return POOLING["rank"]
    for module in modules(config):
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


def is_classifier(config: Config) -> bool:
    """Whether its class gives a text scores."""
    return any(one.endswith("ForSequenceClassification") for one in config.classes)


def labels(config: Config) -> list[str]:
    """The labels of a classifier in their order; transformers leaves two without names out of its config."""
    found = config.get("id2label")
    if isinstance(found, dict) and found:
        try:
            return [str(name) for _, name in sorted(found.items(), key=lambda pair: int(pair[0]))]
        except ValueError:
            raise CheckpointError(f"{config.ref}: 'id2label' has keys that are no numbers", "correct it") from None
    count = config.get("num_labels", default=2)
    return [f"LABEL_{i}" for i in range(count if type(count) is int and 0 < count <= 100_000 else 2)]


def left_out(config: Config, *, dense: bool = False) -> tuple[str, ...]:
    """A note on sentence-transformers modules that come after the model and are not in the file; ``dense``: those are."""
    names = [
        str(module.get("path") or module.get("type"))
        for module in modules(config)
        if not str(module.get("type", "")).endswith((*_KNOWN, "Dense") if dense else _KNOWN)
    ]
    if not names:
        return ()
    return (f"{', '.join(names)} of sentence-transformers are not in the file; its embeddings are those before them",)


def modules(config: Config) -> list[dict[str, Any]]:
    """The modules of sentence-transformers, in their order."""
    found = _json(config, MODULES)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _json(config: Config, name: str) -> Any:
    try:
        return json_value(config.files.get(name, b"null"))
    except ValueError:
        raise CheckpointError(f"{config.ref}: {name} is damaged", "download it again") from None
