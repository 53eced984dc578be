"""Checkpoints of sharded training as adapter folders: torch.distributed.checkpoint (FSDP) and DeepSpeed ZeRO."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

from adapterkit.checkpoint.files import LocalFile
from adapterkit.checkpoint.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from adapterkit.checkpoint.listing import read_json
from adapterkit.checkpoint.sharded import KINDS
from adapterkit.errors import CheckpointError, NotFound
from adapterkit.pickles.apart import answered

if TYPE_CHECKING:
    from pathlib import Path

    from adapterkit.checkpoint.sharded import Sharded

# What of a whole model's state belongs to an adapter, beside the endings of its method's keys.
_ALWAYS = (".modules_to_save.", ".token_adapter.", "trainable_tokens_delta")


def gather(found: Sharded, place: Path) -> None:
    """Write the adapter of a sharded checkpoint into the folder ``place``.

    Raises:
        NotFound: there is no config of the adapter.
        CheckpointError: the checkpoint is damaged, a part is missing, or it holds no adapter.
    """
    from adapterkit.adapters.methods import METHODS

    if found.config is None:
        raise NotFound(
            f"{found.folder} is {KINDS[found.kind]} without an {ADAPTER_CONFIG}, so its rank and alpha are not known",
            f"put the {ADAPTER_CONFIG} of the training run beside it",
        )
    config = read_json(LocalFile(found.config, str(found.config)))
    method = METHODS.get(str(config.get("peft_type") or "").upper())
    if method is None:
        raise CheckpointError(f"{found.config} names no peft_type that is known here", "give the adapter's own config")
    stems = {f".{suffix.removesuffix('.weight').removesuffix('.bias')}" for suffix in method.suffixes}
    wanted = [*stems, *(f"{name}." for name in method.shared), *_ALWAYS]
    answered("gather.py", found.kind, str(found.folder), str(place / ADAPTER_WEIGHTS), more=(json.dumps(wanted),))
    shutil.copyfile(found.config, place / ADAPTER_CONFIG)
