"""What travels beside merged weights: the base's files, the adapter's own tokenizer, and a config that tells the truth."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.brought import with_brought
from adapterkit.adapters.classes import FLAG, flag_keys
from adapterkit.adapters.heads import with_head
from adapterkit.adapters.names import TEXT_CONFIGS, Names
from adapterkit.checkpoint.pipeline import component_configs
from adapterkit.errors import TargetError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.fold import Folded
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.dtypes import DType


def side_files(
    base: Checkpoint, folded: Folded, adapters: Sequence[Adapter], dtype: DType | None
) -> tuple[dict[str, bytes], list[str]]:
    """Side files by name, and notes.

    Raises:
        TargetError: see `_of_pipeline`.
    """
    if component_configs(base.config):
        return _of_pipeline(base, folded, adapters)
    files, notes = with_brought({file.name: file.bytes() for file in base.side_files}, adapters)
    config = patched_config(base, folded, adapters, dtype)
    if config != base.config:
        files["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    return files, notes


def _of_pipeline(base: Checkpoint, folded: Folded, adapters: Sequence[Adapter]) -> tuple[dict[str, bytes], list[str]]:
    """The files of a pipeline, with the configs of the components that got another size.

    Raises:
        TargetError: a vocabulary would change, or one of several tensors that share their values, which a component alone
            is merged with.
    """
    files, notes = {file.name: file.bytes() for file in base.side_files}, []
    before, after = component_configs(base.config), component_configs(folded.checkpoint.config)
    for name, config in before.items():
        _check_vocabulary(base, folded, name, config)
        if after[name] != config:
            files[f"{name}/config.json"] = (json.dumps(after[name], indent=2, ensure_ascii=False) + "\n").encode()
    for adapter in adapters:
        if adapter.side_files:
            named = ", ".join(sorted(file.name for file in adapter.side_files)[:4])
            notes.append(f"{adapter.ref}: {named} beside it are left out: a pipeline has its own")
    return files, notes


def _check_vocabulary(base: Checkpoint, folded: Folded, name: str, config: Mapping[str, Any]) -> None:
    lead, hint = f"{name}.", f"merge into that component alone: {base.ref.rstrip('/')}/{name}"
    touched = {one.removeprefix(lead) for one in folded.touched if one.startswith(lead)}
    for one in sorted(touched):
        if lead + one in base and base[lead + one].shape[:1] != folded.checkpoint[lead + one].shape[:1]:
            raise TargetError(f"the adapter gives '{lead}{one}' another number of rows than the pipeline has", hint)
    if not touched or "model_type" not in config:
        return
    shapes = {one.removeprefix(lead): tensor.shape for one, tensor in base.items() if one.startswith(lead)}
    names = Names(shapes, config)
    for pair in names.declared_ties():
        found = [target for parameter in pair if (target := names.find(parameter)) is not None]
        shared = sorted(tensor for target in found for tensor in target.tensors if tensor in touched)
        if shared:
            raise TargetError(
                f"the adapter changes '{lead}{shared[0]}', whose values other layers of {name} may share", hint
            )


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
