"""Checkpoints of sharded training, recognised by the names of their files: torch.distributed.checkpoint and DeepSpeed ZeRO."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from adapterkit.checkpoint.folder import ADAPTER_CONFIG, ADAPTER_INDEX, ADAPTER_WEIGHTS
from adapterkit.disk import read_regular
from adapterkit.errors import CheckpointError

KINDS = {"dcp": "a torch.distributed.checkpoint folder (FSDP)", "zero": "a DeepSpeed ZeRO checkpoint"}
_STEP = re.compile(r"global_step\d+")


@dataclass(frozen=True)
class Sharded:
    """A checkpoint of sharded training.

    Attributes:
        kind: a key of `KINDS`.
        folder: where its files lie.
        config: the ``adapter_config.json`` of the training run.
    """

    kind: str
    folder: Path
    config: Path | None


def sharded_checkpoint(folder: Path) -> Sharded | None:
    """What kind of sharded checkpoint a folder is, or holds; None if it is none, or an adapter already.

    Raises:
        CheckpointError: the part of it that says where its tensors are is missing.
    """
    if not folder.is_dir() or any((folder / name).exists() for name in (ADAPTER_WEIGHTS, ADAPTER_INDEX)):
        return None
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())]
    config = next((one / ADAPTER_CONFIG for one in (folder, folder.parent) if (one / ADAPTER_CONFIG).is_file()), None)
    steps = [path for path in places if _STEP.fullmatch(path.name)]
    latest = folder / "latest"
    # A link to the last step, or a file that names it. What is neither is refused: which step is meant is not guessed.
    if latest.exists() and not latest.is_dir():
        named = read_regular(latest, 1 << 12).decode("utf-8", "replace").strip()
        steps = [path for path in steps if path.name == named] or steps
    for place in (*steps[-1:], folder):
        if any(place.glob("*_optim_states.pt")) or any(place.glob("zero_pp_rank_*_model_states.pt")):
            return Sharded("zero", place, config)
    places.sort(key=lambda place: place != folder and place.name.startswith("optim"))  # FSDP's optimizer lies beside
    for place in places:
        if (place / ".metadata").is_file():
            return Sharded("dcp", place, config)
        if any(place.glob("*.distcp")):
            raise CheckpointError(
                f"{place} holds parts of a distributed checkpoint and no .metadata, which says where its tensors are",
                "copy that file too; its name begins with a dot",
            )
    return None
