"""What travels beside merged weights: the base's files, the adapter's own tokenizer, and a config that tells the truth."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.brought import with_brought
from adapterkit.adapters.classes import FLAG, flag_keys
from adapterkit.adapters.heads import with_head
from adapterkit.adapters.names import TEXT_CONFIGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.fold import Folded
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.dtypes import DType


def side_files(
    base: Checkpoint, folded: Folded, adapters: Sequence[Adapter], dtype: DType | None
) -> tuple[dict[str, bytes], list[str]]:
    """Side files by name, and notes."""
    files, notes = with_brought({file.name: file.bytes() for file in base.side_files}, adapters)
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
    if folded.flag_off:
        untie(config)
    if dtype is not None:
        name_dtype(config, dtype)
    with_head(config, folded.head)
    return config


def untie(config: dict[str, Any]) -> None:
    """Say everywhere in a parsed ``config.json`` that embeddings are not tied.

    A model of several parts takes the flag of its language model where its own is off, so both say it.
    """
    own = set(flag_keys(config)) - {FLAG}
    parts = [config, *(part for name, part in config.items() if isinstance(part, dict) and _has_words(name, part))]
    for part in parts:
        part[FLAG] = False
        part.update({key: False for key in own if key in part})
        if "scale_decoder_outputs" in part:  # T5's own name for what its flag decides
            part["scale_decoder_outputs"] = False


def _has_words(name: str, part: dict[str, Any]) -> bool:
    return name in TEXT_CONFIGS or "vocab_size" in part or FLAG in part


def name_dtype(config: dict[str, Any], dtype: DType) -> None:
    """Write ``dtype`` wherever a ``config.json`` names the dtype of its weights."""
    for part in [config, *(part for part in config.values() if isinstance(part, dict))]:
        for key in ("torch_dtype", "dtype"):
            if isinstance(part.get(key), str):
                part[key] = dtype.torch_name
