"""Checkpoints of sharded training, recognised by the names of their files: torch.distributed.checkpoint and DeepSpeed ZeRO."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from adapterkit.checkpoint.folder import ADAPTER_CONFIG, ADAPTER_INDEX, ADAPTER_WEIGHTS
from adapterkit.disk import read_regular
from adapterkit.errors import CheckpointError

KINDS = {
    "dcp": "a torch.distributed.checkpoint folder (FSDP)",
    "mcore": "a checkpoint of Megatron (Megatron-Bridge, NeMo)",
    "zero": "a DeepSpeed ZeRO checkpoint",
}
_ITERATION = re.compile(r"iter_\d{7}")
_TRACKER = "latest_checkpointed_iteration.txt"
_RUN = ("run_config.yaml", "../context/model.yaml", "../run_config.yaml")  # Megatron-Bridge, NeMo 2, put there by hand
_NAMED = re.compile(rb"\.adapter\.[\w.]{0,40}linear_in\.weight")  # as Megatron calls a factor
_LARGEST = 1 << 30  # bytes of a .metadata
_STEP = re.compile(r"global_step\d+")


@dataclass(frozen=True)
class Sharded:
    """A checkpoint of sharded training.

    Attributes:
        kind: a key of `KINDS`.
        folder: where its files lie.
        config: the ``adapter_config.json`` of the training run.
        run: the config that a run of Megatron wrote.
    """

    kind: str
    folder: Path
    config: Path | None
    run: Path | None = None


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
    places = _last(folder, places)
    for place in places:
        if (place / ".metadata").is_file():
            if _NAMED.search(read_regular(place / ".metadata", _LARGEST)):
                run = next((place / name for name in _RUN if (place / name).is_file()), None)
                return Sharded("mcore", place, config, run)
            return Sharded("dcp", place, config)
        if any(place.glob("*.distcp")):
            raise CheckpointError(
                f"{place} holds parts of a distributed checkpoint and no .metadata, which says where its tensors are",
                "copy that file too; its name begins with a dot",
            )
    return None


def _last(folder: Path, places: list[Path]) -> list[Path]:
    """The same without the iterations of Megatron that are not the last one.

    Raises:
        CheckpointError: nothing says which is.
    """
    iterations = [place for place in places if _ITERATION.fullmatch(place.name) and (place / ".metadata").is_file()]
    if len(iterations) < 2:
        return places
    tracker = folder / _TRACKER
    text = read_regular(tracker, 1 << 12).decode("utf-8", "replace").strip() if tracker.is_file() else ""
    last = next((place for place in iterations if text.isdigit() and place.name == f"iter_{int(text):07d}"), None)
    if last is None:
        names = ", ".join(place.name for place in iterations[:4])
        raise CheckpointError(f"{folder} holds several iterations ({names}) and no {_TRACKER}", "name one of them")
    return [place for place in places if place not in iterations or place == last]
