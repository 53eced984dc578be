"""What travels beside merged weights: the base's files, the adapter's own tokenizer, and a config that tells the truth."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.fold import Folded
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.dtypes import DType

# Of a base's tokenizer, what would contradict a newer one that lacks these files.
_STALE = frozenset({"added_tokens.json", "special_tokens_map.json"})

_HEADS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}


def side_files(
    base: Checkpoint, folded: Folded, adapters: Sequence[Adapter], dtype: DType | None
) -> tuple[dict[str, bytes], list[str]]:
    """Side files by name, and notes."""
    files = {file.name: file.bytes() for file in base.side_files}
    notes = []
    brought = [adapter for adapter in adapters if any("token" in file.name for file in adapter.side_files)]
    if brought:
        kept = brought[0]
        for name in _STALE:
            files.pop(name, None)
        files.update({file.name: file.bytes() for file in kept.side_files})
        notes.append(f"tokenizer taken from {kept.ref}")
        if len(brought) > 1:
            notes.append(f"{len(brought)} adapters bring a tokenizer; the first one's was taken")
    config = patched_config(base, folded, adapters, dtype)
    if config != base.config:
        files["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return files, notes


def patched_config(
    base: Checkpoint, folded: Folded, adapters: Sequence[Adapter], dtype: DType | None
) -> dict[str, Any]:
    """``config.json`` with what the merge changed: vocabulary, tie, depth, dtype, a classification head."""
    config: dict[str, Any] = deepcopy(dict(folded.checkpoint.config))
    if not config:
        return config
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    if folded.vocab is not None:
        old, new = folded.vocab
        sized = [p for p in parts if isinstance(p.get("vocab_size"), int) and 0 < p["vocab_size"] <= old]
        for part in [p for p in sized if p["vocab_size"] == old] or sized[:1]:
            part["vocab_size"] = new
    if folded.untied:
        config["tie_word_embeddings"] = False
        for part in parts:
            if "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    if dtype is not None:
        name_dtype(config, dtype)
    for labels in list(folded.heads.values())[:1]:
        _add_head(config, labels, adapters)
    return config


def name_dtype(config: dict[str, Any], dtype: DType) -> None:
    """Write ``dtype`` wherever a ``config.json`` names the dtype of its weights."""
    for part in [config, *(part for part in config.values() if isinstance(part, dict))]:
        for key in ("torch_dtype", "dtype"):
            if isinstance(part.get(key), str):
                part[key] = dtype.torch_name


def _add_head(config: dict[str, Any], labels: int, adapters: Sequence[Adapter]) -> None:
    ending = next((_HEADS[t] for a in adapters if (t := str(a.config.get("task_type", ""))) in _HEADS), None)
    names = config.get("architectures")
    if ending and isinstance(names, list) and names:
        stem = str(names[0]).partition("For")[0].removesuffix("LMHeadModel").removesuffix("Model")
        config["architectures"] = [stem + ending]
    if len(config.get("id2label") or {}) != labels:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
