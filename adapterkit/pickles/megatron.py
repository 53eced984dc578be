"""Adapters in checkpoints of Megatron (Megatron-Bridge, NeMo 2) as folders of PEFT."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.formats.megatron import MAGNITUDE, MegatronRun, as_peft
from adapterkit.checkpoint.files import LocalFile
from adapterkit.checkpoint.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from adapterkit.checkpoint.listing import read_json
from adapterkit.checkpoint.sharded import KINDS
from adapterkit.errors import AdapterError, NotFound, UnsupportedAdapter
from adapterkit.pickles.apart import answered

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.sharded import Sharded

_WANTED = (".linear_in.weight", ".linear_out.weight", f".{MAGNITUDE}")
_KNOWN = {"LoRA": False, "CanonicalLoRA": False, "VLMLoRA": False, "DoRA": True}
_LARGEST = 4 << 20  # bytes of a run's config


def gather_megatron(found: Sharded, room: Path, place: Path, base: Checkpoint) -> None:
    """Write the adapter of a checkpoint of Megatron as the folder ``place``.

    Args:
        room: a temporary folder.
        base: what it was trained on; says the heads, and what its modules are called.

    Raises:
        NotFound: no config says alpha.
        UnsupportedAdapter, TargetError, AdapterError: see `adapterkit.adapters.formats.megatron.as_peft`.
        CheckpointError: the checkpoint is damaged, or holds more than an adapter.
    """
    from adapterkit.adapters.names import Names
    from adapterkit.checkpoint.header import parse_header
    from adapterkit.checkpoint.plan import plan_file
    from adapterkit.checkpoint.tensor import Stored
    from adapterkit.checkpoint.write import Writing, write_together
    from adapterkit.foreign import json_value

    run = _run(found)
    raw = room / ".raw" / "all.safetensors"
    raw.parent.mkdir()
    answered("gather.py", "mcore", str(found.folder), str(raw), more=(json.dumps(_WANTED),))
    parts = json_value(raw.with_name(raw.name + ".parts").read_text(encoding="utf-8"))
    source = LocalFile(raw, str(raw))
    header = parse_header(source.read, source.size, source.name)
    stored = {name: Stored(name, t.dtype, t.shape, source, t.start) for name, t in header.tensors.items()}
    config, tensors = as_peft(stored, parts, run, Names(base.shapes, base.config), base.config)
    side = {ADAPTER_CONFIG: (json.dumps(config, indent=2) + "\n").encode()}
    plan = plan_file(ADAPTER_WEIGHTS, list(tensors.values()), {"format": "pt"})
    write_together([Writing(plan, tensors, (source,), place, side)], force=[False])


def _run(found: Sharded) -> MegatronRun:
    """What the config beside a checkpoint says.

    Raises:
        NotFound: there is none that says alpha.
        AdapterError: it is damaged.
        UnsupportedAdapter: it is of another method.
    """
    if found.run is not None:
        return _of_run(found.run)
    if found.config is not None:
        config = read_json(LocalFile(found.config, str(found.config)))
        alpha, rank = _number(config.get("lora_alpha")), _number(config.get("r"))
        plain = not any(config.get(name) for name in ("use_rslora", "alpha_pattern", "rank_pattern"))
        if alpha is not None and plain:
            # It says nothing of ranks: whether the adapter of grouped experts is that of all of them is not known.
            return MegatronRun(
                str(found.config), alpha, int(rank or 0), config.get("use_dora") is True, expert_parallel=0
            )
    raise NotFound(
        f"{found.folder} is {KINDS['mcore']} without the config of its run, and alpha is in none of its tensors",
        f"put the run's run_config.yaml (NeMo: context/model.yaml) beside it, or an {ADAPTER_CONFIG} with its lora_alpha and r",
    )


def _of_run(path: Path) -> MegatronRun:
    data = _yaml(path)
    peft = data.get("peft") or data.get("model_transform")
    if not isinstance(peft, dict):
        raise AdapterError(f"{path} names no adapter (peft, or model_transform)", "give the config of the training run")
    kind = str(peft.get("_target_") or "").rpartition(".")[2]
    if kind not in _KNOWN:
        raise UnsupportedAdapter(
            f"{path} says that the adapter is {kind or 'of no class'}; known are {', '.join(_KNOWN)}",
            "export it with the tool that trained it",
        )
    alpha, dim = _number(peft.get("alpha")), _number(peft.get("dim"))
    if alpha is None or dim is None or dim != int(dim) or dim < 1:
        raise AdapterError(f"{path} says no alpha and dim of its adapter", "give the config of the training run")
    model: Mapping[str, Any] = next(
        (data[name] for name in ("model", "config") if isinstance(data.get(name), dict)), {}
    )
    heads = {
        name: value
        for name in ("num_attention_heads", "num_query_groups", "kv_channels")
        if type(value := model.get(name)) is int
    }
    experts = model.get("expert_model_parallel_size")
    return MegatronRun(
        str(path),
        alpha,
        int(dim),
        _KNOWN[kind],
        experts if type(experts) is int else 1,
        peft.get("normalize_moe_lora") is True,
        heads,
    )


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
        return None
    return value


def _yaml(path: Path) -> Mapping[str, Any]:
    """A config as data: no objects, and no keys that are merged out of others, which can grow without bound.

    Raises:
        AdapterError: it is none.
    """
    import yaml

    from adapterkit.disk import read_regular

    class Plain(yaml.SafeLoader):
        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            pass

    try:
        found = yaml.load(read_regular(path, _LARGEST).decode("utf-8"), Plain)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = getattr(error, "problem", None) or "it cannot be read"
        raise AdapterError(f"{path} is no YAML: {what}", "copy it again") from None
    if not isinstance(found, dict):
        raise AdapterError(f"{path} holds no config", "give the config of the training run")
    return found
