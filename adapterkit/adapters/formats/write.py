"""Writing an adapter: as PEFT, as plain PEFT, as MLX. The folder appears whole or not at all."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.adapter import PREFIX
from adapterkit.adapters.adapter import WEIGHTS as PEFT_WEIGHTS
from adapterkit.adapters.edits import method_of
from adapterkit.adapters.formats import mlx
from adapterkit.adapters.formats.plain import Factors, bake, resolved
from adapterkit.adapters.formats.views import Made, turned
from adapterkit.checkpoint.folder import ADAPTER_CONFIG
from adapterkit.checkpoint.plan import plan_file
from adapterkit.checkpoint.tensor import Renamed
from adapterkit.checkpoint.write import write_safetensors
from adapterkit.dtypes import F32
from adapterkit.errors import UnsupportedAdapter

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Tensor


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        path: the folder.
        rank: one rank for all modules, or None when the adapter was written as it is.
        errors: relative Frobenius error by module, where a delta was decomposed.
        notes: what a user should know.
    """

    path: str
    rank: int | None
    errors: Mapping[str, float]
    notes: tuple[str, ...] = ()


def write_peft(adapter: Adapter, out: str | Path, *, base: Checkpoint | None = None, force: bool = False) -> Written:
    """Write an adapter as PEFT saves it, whatever it was read from; ``base`` is needed where that has flat names.

    Raises:
        OutputError, UsageError, TargetError, AdapterkitError
    """
    adapter = resolved(adapter, base)
    top = method_of(adapter).shared
    tensors: dict[str, Tensor] = {}
    for key, tensor in adapter.tensors.items():
        shared = any(key == name or key.startswith(name + ".") for name in top)
        tensors[("base_model." if shared else PREFIX) + key] = tensor
    config = dict(adapter.config.raw)
    config.setdefault("target_modules", _leaves(_paths(adapter)))
    _write(tensors, config, PEFT_WEIGHTS, adapter, Path(out), force)
    return Written(str(out), None, {}, adapter.notes)


def write_plain(
    adapter: Adapter,
    out: str | Path,
    *,
    base: Checkpoint | None = None,
    rank: int | None = None,
    energy: float | None = None,
    force: bool = False,
) -> Written:
    """Write any adapter as plain LoRA of one rank and one alpha; see `bake` for the arguments and errors."""
    factors, whole = bake(adapter, base, rank=rank, energy=energy)
    same = _uniform(factors)
    size = max((one.rank for one in factors), default=1)
    tensors: dict[str, Tensor] = {}
    for one in factors:
        keys = ("lora_embedding_A", "lora_embedding_B") if one.embedding else ("lora_A.weight", "lora_B.weight")
        names = [f"{PREFIX}{one.path}.{key}" for key in keys]
        tensors.update(_pair(one, names, size, same))
    tensors.update((PREFIX + key, tensor) for key, tensor in whole.items())
    kept = sorted({key.rpartition(".")[0].rpartition(".")[2] for key in whole})
    old = adapter.config
    config = {
        "peft_type": "LORA",
        "task_type": old.get("task_type", "CAUSAL_LM"),
        "base_model_name_or_path": old.base,
        "revision": old.revision,
        "inference_mode": True,
        "r": size,
        "lora_alpha": _number(factors[0].scale * size) if factors and same else size,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(one.turned for one in factors),
        "init_lora_weights": True,
        "target_modules": _leaves([one.path for one in factors]),
        "modules_to_save": kept or None,
    }
    _write(tensors, config, PEFT_WEIGHTS, adapter, Path(out), force)
    notes = ["whole parameters come along, which not every server takes: " + ", ".join(kept)] if kept else []
    errors = {one.path: one.error for one in factors if one.stored is None}
    return Written(str(out), size, errors, tuple(notes))


def write_mlx(
    adapter: Adapter, out: str | Path, *, base: Checkpoint | None = None, layers: int = -1, force: bool = False
) -> Written:
    """Write LoRA as mlx-lm loads it, with one scale and one rank; other methods are baked first, against ``base``.

    Args:
        layers: ``num_layers`` of the config: how many layers, from the last, mlx-lm prepares; -1 for all.

    Raises:
        UnsupportedAdapter: it brings whole parameters, which mlx-lm loads only as a full fine-tune.
        UsageError: see `bake`.
    """
    factors, whole = bake(adapter, base)
    if whole:
        raise UnsupportedAdapter(
            f"{adapter.ref} brings whole parameters ({next(iter(whole))}), which an MLX LoRA has no place for",
            "merge it and convert the model",
        )
    same = _uniform(factors)
    size = max((one.rank for one in factors), default=1)
    tensors: dict[str, Tensor] = {}
    for one in factors:
        names = [f"{one.path}.lora_a", f"{one.path}.lora_b"]
        for name, tensor in _pair(one, names, size, same).items():
            tensors[name] = turned(name, tensor)
    keys = {re.sub(r"^.*\.(?:layers|h|blocks)\.\d+\.", "", one.path) for one in factors}
    scale = factors[0].scale if factors and same else 1.0
    config = {
        "fine_tune_type": "lora",
        "num_layers": layers,
        "lora_parameters": {"rank": size, "scale": scale, "dropout": 0.0, "keys": sorted(keys)},
        "model": adapter.config.base,
    }
    _write(tensors, config, mlx.WEIGHTS, adapter, Path(out), force)
    return Written(str(out), size, {one.path: one.error for one in factors if one.stored is None})


def _uniform(factors: list[Factors]) -> bool:
    """Whether one scale and one rank fit all modules as they are."""
    return len({(one.scale, one.rank) for one in factors}) == 1


def _pair(one: Factors, names: list[str], size: int, same: bool) -> dict[str, Tensor]:
    """A and B under these names: as stored when nothing has to be folded in, else padded with zeros and B scaled."""
    if same and one.stored is not None:
        return {name: Renamed(name, tensor) for name, tensor in zip(names, one.stored, strict=True)}
    scale = 1.0 if same else one.scale

    def folded(side: int) -> torch.Tensor:
        import torch

        factor = one.load()[side].float()
        missing = size - one.rank
        if side == 0:
            return torch.nn.functional.pad(factor, (0, 0, 0, missing))
        return torch.nn.functional.pad(factor * scale, (0, missing))

    a, b = one.load() if one.stored is None else one.stored
    shapes = ((size, a.shape[1]), (b.shape[0], size))
    return {
        name: Made(name, F32, shape, lambda side=side: folded(side), "scaling folded in", 4 * shape[0] * shape[1])  # type: ignore[misc]
        for side, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }


def _paths(adapter: Adapter) -> list[str]:
    return [key.partition(".lora_")[0] for key in adapter.tensors if ".lora_" in key]


def _leaves(paths: list[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _write(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str, adapter: Adapter, out: Path, force: bool
) -> None:
    named = {key: tensor if tensor.name == key else Renamed(key, tensor) for key, tensor in tensors.items()}
    plan = plan_file(name, list(named.values()), {"format": "pt"})
    text = json.dumps({key: value for key, value in config.items() if value is not None}, indent=2) + "\n"
    side = {ADAPTER_CONFIG: text.encode()} | {file.name: file.bytes() for file in adapter.side_files}
    # A loose file has no folder of its own that the output could spoil by lying in it.
    sources = [] if adapter.source.name == adapter.ref else [adapter.source]
    write_safetensors(plan, named, sources, out, side_files=side, jobs=1, force=force)
