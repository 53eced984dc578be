"""An adapter in the form of another trainer's files: PEFT, PEFT with scalings folded in, MLX."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.adapter import WEIGHTS as PEFT_WEIGHTS
from adapterkit.adapters.edits import method_of
from adapterkit.adapters.formats import mlx
from adapterkit.adapters.formats.plain import PlainFactors, resolved
from adapterkit.adapters.formats.views import FunctionTensor, turned
from adapterkit.adapters.keys import PREFIX
from adapterkit.checkpoint.folder import ADAPTER_CONFIG
from adapterkit.checkpoint.tensor import Renamed
from adapterkit.dtypes import F32
from adapterkit.errors import UnsupportedAdapter, option

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Tensor


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter in one of the formats: what its folder holds.

    Attributes:
        weights: name of the weight file.
        tensors: handles by the keys they get in it.
        side: the config and other small files.
        notes: what a user should know.
        metadata: of the weight file.
    """

    weights: str
    tensors: Mapping[str, Tensor]
    side: Mapping[str, bytes]
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})


def as_peft(adapter: Adapter, base: Checkpoint | None = None) -> AdapterFiles:
    """An adapter as PEFT saves it, whatever it was read from; ``base`` is needed where that has flat names.

    Raises:
        UsageError: the base is needed.
        TargetError: a flat name fits none of its modules.
        UnsupportedAdapter: PEFT has no such method.
    """
    adapter = resolved(adapter, base)
    method = method_of(adapter)
    if method.only_in_files:
        raise UnsupportedAdapter(
            f"{adapter.ref} holds what PEFT has no form for ({method.peft_type})",
            f"add {option('plain', True)} for a LoRA of it, or fold it in with merge",
        )
    top = method.shared
    tensors: dict[str, Tensor] = {}
    for key, tensor in adapter.tensors.items():
        shared = any(key == name or key.startswith(name + ".") for name in top)
        tensors[("base_model." if shared else PREFIX) + key] = tensor
    config = dict(adapter.config.raw)
    config.setdefault("target_modules", _leaves(_paths(adapter)))
    return _files(PEFT_WEIGHTS, tensors, config, adapter)


def as_plain(adapter: Adapter, factors: Sequence[PlainFactors], whole: Mapping[str, Tensor]) -> AdapterFiles:
    """What `scaled_factors` gave, as LoRA of one rank and one alpha that every server and converter reads alike."""
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
    notes = ["whole parameters come along, which not every server takes: " + ", ".join(kept)] if kept else []
    return _files(PEFT_WEIGHTS, tensors, config, adapter, notes)


def as_mlx(
    adapter: Adapter, factors: Sequence[PlainFactors], whole: Mapping[str, Tensor], *, layers: int = -1
) -> AdapterFiles:
    """What `scaled_factors` gave, as mlx-lm loads it: LoRA with one scale and one rank.

    Args:
        layers: ``num_layers`` of the config: how many layers, from the last, mlx-lm prepares; -1 for all.

    Raises:
        UnsupportedAdapter: it brings whole parameters, which mlx-lm loads only as a full fine-tune.
    """
    if whole:
        raise UnsupportedAdapter(
            f"{adapter.ref} brings whole parameters ({next(iter(whole))}), which an MLX LoRA has no place for",
            "merge it and convert the model",
        )
    same = _uniform(factors)
    size = max((one.rank for one in factors), default=1)
    tensors: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    nested = mlx.is_nested(one.path for one in factors)
    for one in factors:
        path, expert = mlx.mlx_path(one.path, nested)
        names = [f"{path}.lora_a", f"{path}.lora_b"]
        pair = _pair(one, names, size, same)
        if expert is None:
            tensors |= {name: turned(name, tensor) for name, tensor in pair.items()}
        else:
            stacks.setdefault(path, {})[expert] = (pair[names[0]], pair[names[1]])
    count = 1 + max((expert for experts in stacks.values() for expert in experts), default=0)
    for path, experts in stacks.items():
        for side, name in enumerate((f"{path}.lora_a", f"{path}.lora_b")):
            tensors[name] = _stack(name, {expert: pair[side] for expert, pair in experts.items()}, count)
    paths = {name.rpartition(".")[0] for name in tensors}
    # mlx-vlm finds modules by whole names only; mlx-lm by these and by names in a layer.
    keys = paths if nested else {re.sub(r"^.*\.(?:layers|h|blocks)\.\d+\.", "", path) for path in paths}
    scale = factors[0].scale if factors and same else 1.0
    config = {
        "fine_tune_type": "lora",
        "num_layers": layers,
        "lora_parameters": {"rank": size, "scale": scale, "dropout": 0.0, "keys": sorted(keys)},
        "model": adapter.config.base,
    }
    return _files(mlx.WEIGHTS, tensors, config, adapter)


def _uniform(factors: Sequence[PlainFactors]) -> bool:
    """Whether one scale and one rank fit all modules as they are."""
    return len({(one.scale, one.rank) for one in factors}) == 1


def _pair(one: PlainFactors, names: list[str], size: int, same: bool) -> dict[str, Tensor]:
    """A and B under these names: as stored when nothing has to be folded in, else padded with zeros and B scaled."""
    if same:
        return {name: Renamed(name, tensor) for name, tensor in zip(names, one.stored, strict=True)}

    def folded(side: int) -> torch.Tensor:
        import torch

        factor = one.load()[side].float()
        missing = size - one.rank
        if side == 0:
            return torch.nn.functional.pad(factor, (0, 0, 0, missing))
        return torch.nn.functional.pad(factor * one.scale, (0, missing))

    a, b = one.stored
    shapes = ((size, a.shape[1]), (b.shape[0], size))
    return {
        name: FunctionTensor(name, F32, shape, partial(folded, side), "scaling folded in", 4 * shape[0] * shape[1])
        for side, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }


def _stack(name: str, parts: Mapping[int, Tensor], count: int) -> Tensor:
    """One side of the factors of all experts, `[experts, ...]`; zeros for an expert that is not trained.

    Raises:
        UnsupportedAdapter: they differ in shape.
    """
    first = next(iter(parts.values()))
    odd = next((part for part in parts.values() if part.shape != first.shape), None)
    if odd is not None:
        raise UnsupportedAdapter(
            f"'{odd.name}' is {list(odd.shape)} for one expert and {list(first.shape)} for another, which MLX stacks",
            "merge it and convert the model",
        )

    def make() -> torch.Tensor:
        import torch

        found = torch.zeros((count, *first.shape), dtype=first.dtype.torch)
        for expert, part in parts.items():
            found[expert] = part.read(0, part.numel).view(part.shape)
        return found

    read = sum(part.nbytes for part in parts.values())
    return FunctionTensor(name, first.dtype, (count, *first.shape), make, f"{len(parts)} experts stacked", read)


def _paths(adapter: Adapter) -> list[str]:
    return [key.partition(".lora_")[0] for key in adapter.tensors if ".lora_" in key]


def _leaves(paths: list[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _files(
    weights: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], adapter: Adapter, notes: Sequence[str] = ()
) -> AdapterFiles:
    named = {key: tensor if tensor.name == key else Renamed(key, tensor) for key, tensor in tensors.items()}
    text = json.dumps({key: value for key, value in config.items() if value is not None}, indent=2) + "\n"
    side = {ADAPTER_CONFIG: text.encode()} | {file.name: file.bytes() for file in adapter.side_files}
    return AdapterFiles(weights, named, side, tuple(notes))
