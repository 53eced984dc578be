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

# What of a whole model's state belongs to an adapter, beside its method's tensors.
_ALWAYS = (".modules_to_save.", ".trainable_tokens_delta")
_TOKENS = "token_adapter"


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
    stems = {suffix.partition(".")[0] for suffix in method.suffixes} - {_TOKENS}
    wanted = [*(f".{stem}" for stem in sorted(stems)), *(f".{name}." for name in method.shared), *_ALWAYS]
    wanted += _biases(str(config.get("bias") or "none"))
    answered("gather.py", found.kind, str(found.folder), str(place / ADAPTER_WEIGHTS), more=(json.dumps(wanted),))
    shutil.copyfile(found.config, place / ADAPTER_CONFIG)


def _biases(trained: str) -> list[str]:
    """What the names of trained biases hold, by the config's ``bias``: those of the wrapped modules, or all."""
    return [] if trained == "none" else [".bias"] if trained == "all" else [".base_layer.bias"]
