"""Run in a process of its own: ``python -I gather.py KIND FOLDER OUT DTYPES WANTED MEMORY``; imports nothing of adapterkit.

Puts the tensors of a sharded checkpoint together and writes those whose names hold one of WANTED as a safetensors file.
KIND is ``dcp`` (torch.distributed.checkpoint), ``mcore`` (the same of Megatron) or ``zero`` (DeepSpeed); of ``mcore``, the file
OUT.parts says in how many pieces the rows of each tensor were saved. Classes that a pickle names and that are not tensors or
the layout itself are stood in for by an empty one, so nothing of theirs runs. The last line of stdout is JSON: the names, or
what went wrong.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import sys
import types
from math import ceil, prod
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

_PLAIN = {
    ("collections", "OrderedDict"), ("collections", "defaultdict"), ("builtins", "set"), ("builtins", "frozenset"),
    ("builtins", "slice"), ("builtins", "complex"), ("builtins", "list"), ("builtins", "dict"), ("builtins", "tuple"),
    ("torch", "Size"), ("torch", "device"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor"),
    ("torch.serialization", "_get_layout"), ("datetime", "timedelta"),
}  # fmt: skip
_LAYOUT = {
    "torch.distributed.checkpoint.metadata": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint._extension": None,
}


# Parts of the names of an optimizer's state, which holds the names of the parameters too.
_OPTIMIZER = {"optim", "optims", "optimizer", "optimizers", "optimizer_state", "optimizer_state_dict"}


# What else Megatron writes into a checkpoint.
_STATE = {
    "rng_state",
    "rerun_state_machine_state",
    "opt_param_scheduler",
    "lr_schedulers",
    "scheduler",
    "loops",
    "dataloader",
}


class Broken(Exception):
    """The folder is not what it should be: what, in one sentence."""


class Stub:
    """In the place of an object that is no part of the weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Stub:
        return self

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __hash__(self) -> int:
        return id(self)


def _data_of_parameter(data: Any, *rest: Any) -> Any:
    """A parameter's tensor: what a trainer hung on the parameter stays out."""
    return data


def _without_attributes(build: Any, kind: Any, given: Any, state: Any) -> Any:
    """A tensor that had attributes, without them: ``build`` is one of the functions that `Unpickler` gave."""
    return build(*given)


class Unpickler(pickle.Unpickler):
    """Builds tensors, containers and the layout of a checkpoint; a `Stub` for everything else."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) in _PLAIN:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name == "ZeroStageEnum":
            return int
        if module == "torch._utils" and name.startswith("_rebuild_parameter"):
            return _data_of_parameter
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _without_attributes
        if module in ("torch", "torch.storage") and re.fullmatch(r"\w*Storage", name):
            return super().find_class(module, name)
        names = _LAYOUT.get(module, ())
        if names is None and re.fullmatch(r"_?[A-Z]\w+", name):
            return super().find_class(module, name)
        if names and name in names:
            return super().find_class(module, name)
        return Stub


def _module() -> Any:
    """What `torch.load` takes for ``pickle_module``."""
    made = types.ModuleType("careful_pickle")
    made.Unpickler = Unpickler  # type: ignore[attr-defined]
    made.load = lambda file, **_: Unpickler(file).load()  # type: ignore[attr-defined]
    made.UnpicklingError = pickle.UnpicklingError  # type: ignore[attr-defined]
    return made


def _load(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_module())
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Broken(f"{path.name} cannot be read ({(str(error).splitlines() or ['damaged'])[0][:200]})") from None


def dcp(folder: Path, wanted: list[str]) -> dict[str, Any]:
    """The wanted tensors of a torch.distributed.checkpoint folder."""
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint

    entries, metadata = _metadata(folder)
    for place in list((metadata.storage_data or {}).values()):
        name = getattr(place, "relative_path", None)
        if not isinstance(name, str) or "/" in name or "\\" in name or name.startswith("."):
            raise Broken(f".metadata points to {str(name)[:80]!r}, out of its folder")
        if not (folder / name).is_file():
            raise Broken(f"{name} is missing, in which .metadata says that tensors are")

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return metadata

    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and _is_wanted(name, wanted) and not _is_optimizer(name)
    }
    for name in found:
        held = sum(prod(chunk.sizes) for chunk in entries[name].chunks)
        if held < prod(entries[name].size):
            raise Broken(
                f"it holds {held} of the {prod(entries[name].size)} numbers of {name}; a process saved nothing"
            )
    if found:
        try:
            load_checkpoint(found, storage_reader=Reader(folder), no_dist=True)
        except Exception as error:  # torch wraps whatever went wrong in its own, which differ by release
            raise Broken(f"its tensors cannot be read ({(str(error).splitlines() or ['damaged'])[0][:200]})") from None
    return found


def mcore(folder: Path, wanted: list[str], out: str) -> dict[str, Any]:
    """The adapter in a checkpoint of Megatron: nothing but tensors of an adapter may be in it, beside an optimizer's."""
    entries, _ = _metadata(folder)
    tensors = {name: entry for name, entry in entries.items() if hasattr(entry, "chunks") and not _is_optimizer(name)}
    other = [name for name in tensors if not _is_wanted(name, wanted) and not _is_state(name)]
    if other:
        more = f" and {len(other) - 1} others" if len(other) > 1 else ""
        raise Broken(f"it holds '{other[0]}'{more} beside the adapter, and nothing there says whether that was trained")
    parts = {}
    for name, entry in tensors.items():
        axis = len(entry.size) - (1 if name.endswith("weight_magnitude") else 2)
        if _is_wanted(name, wanted):
            parts[name] = len({int(chunk.offsets[axis]) for chunk in entry.chunks}) if axis >= 0 else 1
    with open(out + ".parts", "w", encoding="utf-8") as file:
        json.dump(parts, file)
    return dcp(folder, wanted)


def _is_optimizer(name: str) -> bool:
    return bool(_OPTIMIZER & set(name.split(".")))


def _is_state(name: str) -> bool:
    """Whether an entry is a trainer's own: the state of random numbers, of the data, of the scheduler."""
    return "_extra_state" in name or name.partition("/")[0].partition(".")[0] in _STATE


def _metadata(folder: Path) -> tuple[dict[str, Any], Any]:
    """What ``.metadata`` says of every entry, and all of it."""
    with open(folder / ".metadata", "rb") as file:
        try:
            metadata = Unpickler(file).load()
            return dict(metadata.state_dict_metadata), metadata
        except Exception as error:  # a damaged pickle fails in any of the ways that an object can
            raise Broken(f".metadata is damaged ({(str(error).splitlines() or ['unreadable'])[0][:200]})") from None


def zero(folder: Path, wanted: list[str]) -> dict[str, Any]:
    """The wanted tensors of a DeepSpeed ZeRO checkpoint, in float32 from the optimizer's own copies.

    Layout: deepspeed/utils/zero_to_fp32.py. Stage 1 and 2 cut each group of parameters, end to end, in equal parts for the
    processes; stage 3 cuts every parameter by itself.
    """
    states = sorted(folder.glob("*_optim_states.pt"), key=_rank)
    models = sorted(folder.glob("*_model_states.pt"), key=_rank)
    if not states or not models:
        raise Broken("it has no *_optim_states.pt or no *_model_states.pt, so it is no whole ZeRO checkpoint")
    parallel = next((path for path in (*states, *models) if re.search(r"mp_rank_0*[1-9]|expp_rank", path.name)), None)
    if parallel is not None:
        raise Broken(f"{parallel.name} says that it was saved with model or expert parallelism, which is not read here")
    optimizers = []
    for path in states:
        found = _load(path)
        inside = found.get("optimizer_state_dict") if isinstance(found, dict) else None
        if not isinstance(inside, dict) or "zero_stage" not in inside:
            raise Broken(f"{path.name} holds no state of a ZeRO optimizer")
        optimizers.append(inside)
    stage = optimizers[0]["zero_stage"]
    count = optimizers[0].get("partition_count")
    count = max(count) if isinstance(count, (list, tuple)) else count
    if not isinstance(count, int) or isinstance(stage, Stub) or int(stage) not in (1, 2, 3):
        raise Broken(f"{states[0].name} does not say its stage and number of processes")
    have = {_rank(path) for path in states}
    if have != set(range(count)):
        lost = sorted(set(range(count)) - have)
        raise Broken(
            f"it was saved by {count} processes, and the optimizer states of rank {lost[0] if lost else '?'} are missing"
        )
    model = _load(models[0])
    shapes = model.get("param_shapes") if isinstance(model, dict) else None
    if not isinstance(shapes, (list, tuple)) or not all(isinstance(group, dict) for group in shapes):
        raise Broken(f"{models[0].name} has no param_shapes, which say what the flat states are made of")
    trained = _split_over_processes if int(stage) == 3 else _end_to_end
    tensors = trained(optimizers, shapes, wanted)
    tensors.update(_frozen(model, models, count if int(stage) == 3 else 1, wanted))
    for name, source in (model.get("shared_params") or {}).items():
        if source in tensors and _is_wanted(name, wanted):
            tensors[name] = tensors[source]
    return tensors


def _is_wanted(name: str, wanted: list[str]) -> bool:
    return any(one in name for one in wanted)


def _split_over_processes(optimizers: list[Any], shapes: Any, wanted: list[str]) -> dict[str, Any]:
    """Stage 3: every process has its part of each parameter."""
    import torch

    count, tensors = len(optimizers), {}
    flats = [torch.cat([part.flatten() for part in o["fp32_flat_groups"]]) for o in optimizers]
    offset = 0
    for group in shapes:
        for name, shape in group.items():
            size = prod(shape)
            part = ceil(size / count)
            if any(offset + part > flat.numel() for flat in flats):
                raise Broken(f"the flat states end before {name}; a file is cut short")
            if _is_wanted(name, wanted):
                pieces = [flat[offset : offset + part] for flat in flats]
                tensors[name] = torch.cat(pieces)[:size].view(tuple(shape)).clone()
            offset += part
    return tensors


def _end_to_end(optimizers: list[Any], shapes: Any, wanted: list[str]) -> dict[str, Any]:
    """Stages 1 and 2: the parameters of a group stand end to end, and every process has a part of that."""
    import torch

    tensors: dict[str, Any] = {}
    paddings = optimizers[0].get("param_alignment_paddings")  # since DeepSpeed 0.18: what stands between two parameters
    for index, group in enumerate(shapes):
        flat = torch.cat([o["single_partition_of_fp32_groups"][index].flatten() for o in optimizers])
        between = paddings[index] if isinstance(paddings, (list, tuple)) else [0] * len(group)
        if len(between) != len(group):
            raise Broken(f"it holds {len(between)} paddings for {len(group)} parameters")
        offset = 0
        for (name, shape), padding in zip(group.items(), between, strict=True):
            size = prod(shape)
            if offset + size > flat.numel():
                raise Broken(f"the flat states end before {name}; a file is cut short")
            if _is_wanted(name, wanted):
                tensors[name] = flat[offset : offset + size].view(tuple(shape)).clone()
            offset += size + padding
    return tensors


def _frozen(model: dict[str, Any], models: list[Path], count: int, wanted: list[str]) -> dict[str, Any]:
    """What of an adapter was not trained: parameters that the method freezes (the A of LoRA-FA), and buffers.

    At stage 3 every one of ``count`` processes has its part of a frozen parameter.
    """
    import torch

    shapes = {
        name: shape for name, shape in (model.get("frozen_param_shapes") or {}).items() if _is_wanted(name, wanted)
    }
    tensors: dict[str, Any] = {}
    if shapes:
        have = {_rank(path) for path in models}
        if count > 1 and have != set(range(count)):
            lost = sorted(set(range(count)) - have)
            raise Broken(
                f"it was saved by {count} processes, and the model states of rank {lost[0] if lost else '?'} are missing"
            )
        parts = [model, *(_load(path) for path in models[1:])] if count > 1 else [model]
        for name, shape in shapes.items():
            pieces = [part["frozen_param_fragments"][name].flatten() for part in parts]
            flat = torch.cat(pieces)
            if flat.numel() < prod(shape):
                raise Broken(f"{name} is not whole in the model states; a file is cut short")
            tensors[name] = flat[: prod(shape)].view(tuple(shape)).clone()
    module = model.get("module") or {}
    buffers = [name for name in model.get("buffer_names") or () if _is_wanted(name, wanted)]
    tensors.update({name: module[name].clone() for name in buffers if name in module})
    return tensors


def _rank(path: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(found.group(1)) if found else 0


def main() -> dict[str, object]:
    from child import bound, write  # type: ignore[import-not-found]

    kind, folder, out = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    names, wanted = json.loads(sys.argv[4]), json.loads(sys.argv[5])
    bound(int(sys.argv[6]))
    try:
        found = mcore(folder, wanted, out) if kind == "mcore" else {"dcp": dcp, "zero": zero}[kind](folder, wanted)
    except Broken as error:
        return {"error": str(error)}
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return {"error": f"its parts do not fit together ({(str(error).splitlines() or ['unknown'])[0][:200]})"}
    if not found:
        return {"error": "it holds no tensors of an adapter"}
    answer: dict[str, object] = write(out, found, names)
    return answer


if __name__ == "__main__":
    print(json.dumps(main()))
