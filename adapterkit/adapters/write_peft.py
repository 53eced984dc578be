"""Write a plain LoRA adapter as PEFT saves one: ``adapter_config.json`` and ``adapter_model.safetensors``.

Every scaling lies in the factors and alpha equals the rank, so a reader that knows nothing but ``alpha / r`` gets it right.
Layers of different ranks are padded with zeros to one rank, because vLLM and llama.cpp read a single alpha and vLLM a
single rank; or they keep their own in ``rank_pattern`` and ``alpha_pattern``, with exact module paths as keys.

The layout is that of PEFT 0.19.1 and later (`LAYOUT`), which matters for stacked experts only.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.adapters.adapter import WEIGHTS
from adapterkit.adapters.keys import PREFIX
from adapterkit.checkpoint.folder import ADAPTER_CONFIG
from adapterkit.checkpoint.header import build_header
from adapterkit.checkpoint.publish import publish
from adapterkit.checkpoint.tensor import Tensor
from adapterkit.dtypes import F32, DType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import BinaryIO

    import torch

    from adapterkit.adapters.factors import Slot
    from adapterkit.ops.lowrank import Factors

LAYOUT = "0.21.2"
SCRATCH = ".factors"

# The order in which expert modules register their parameters: PEFT's wrappers nest in it, the first innermost.
_REGISTERED = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias")


@dataclass(frozen=True)
class Extras:
    """What goes into the file beside the factors.

    Attributes:
        whole: whole parameters, by key without PEFT's prefix.
        tokens: token rows by module.
        magnitudes: DoRA's vectors by module.
        biases: ``lora_B.bias`` by module, float32, scaling folded in.
        side: small files to write beside it: a tokenizer, a card.
    """

    whole: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Mapping[str, tuple[tuple[int, ...], Tensor]] = field(default_factory=dict)
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    biases: Mapping[str, torch.Tensor] = field(default_factory=dict)
    side: Mapping[str, bytes] = field(default_factory=dict)


class InMemory(Tensor):
    """A small float32 tensor in memory, as a handle."""

    def __init__(self, name: str, values: torch.Tensor) -> None:
        self.name, self.dtype, self.shape = name, F32, tuple(values.shape)
        self._values = values.float().contiguous().view(-1)

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self._values[start:stop]


@dataclass(frozen=True)
class _Kept:
    """One delta in the scratch file: where it begins, and its rank."""

    offset: int
    rank: int


class PeftWriter:
    """Takes the factors of one module after the other and puts the adapter together when the last one is there.

    The ranks of an adapter may be known only at its end, so factors wait in a file of the hidden folder and never all in
    memory.

    Args:
        folder: the hidden folder that becomes the output (`publish.staging`).
        dtype: of the factors in the output.
    """

    def __init__(self, folder: Path, dtype: DType = F32) -> None:
        self._folder, self._dtype = folder, dtype
        self._scratch = open(disk.open_new_inside(folder, SCRATCH), "w+b")  # noqa: SIM115  (closed by `finish` or with the object)
        self._kept: dict[Slot, list[_Kept]] = {}

    def add(self, slot: Slot, found: Sequence[Factors]) -> None:
        """The deltas of one slot: one, or one per expert."""
        rows = []
        for one in found:
            rows.append(_Kept(self._scratch.tell(), one.rank))
            for tensor in (one.b, one.a):
                self._scratch.write(tensor.float().contiguous().numpy().data)
        self._kept[slot] = rows

    @property
    def rank(self) -> int:
        """The largest rank so far."""
        return max((one.rank for kept in self._kept.values() for one in kept), default=1)

    def finish(
        self,
        out: Path,
        config: Mapping[str, Any],
        extras: Extras,
        *,
        own_ranks: bool,
        force: bool,
        record: Callable[[Path], Mapping[str, bytes]] | None = None,
    ) -> dict[str, Any]:
        """Write the files and publish the folder; gives the config as written.

        Args:
            out: the target.
            config: fields that are not ours to decide: base, targets, task.
            extras: what goes in beside the factors.
            own_ranks: every module keeps its own rank.
            force: replace an existing folder.
            record: more small files, asked for when everything else lies in the hidden folder, which it is given.

        Raises:
            OutputError: it cannot be written.
        """
        largest = self.rank
        ranks = {slot: max(k.rank for k in kept) if own_ranks else largest for slot, kept in self._kept.items()}
        nested = _wrappers(self._kept)
        names = _names(ranks, nested)
        said = {**config, **_ranks_config(ranks)}
        try:
            with open(disk.open_new_inside(self._folder, WEIGHTS), "wb") as file:
                self._write(file, ranks, names, extras)
                file.flush()
                disk.fsync(file.fileno())
            self._scratch.close()
            files = {**extras.side, ADAPTER_CONFIG: (json.dumps(said, indent=2, sort_keys=True) + "\n").encode()}
            for name, data in files.items():
                disk.write_inside(self._folder, name, data)
            for name, data in (record(self._folder) if record is not None else {}).items():
                disk.write_inside(self._folder, name, data)
                files[name] = data
            publish(self._folder, out, keep={WEIGHTS, *(name.partition("/")[0] for name in files)}, force=force)
        except OSError as error:
            raise disk.refused(error, str(out), out.parent) from error
        return said

    def close(self) -> None:
        """Let go of the scratch file."""
        self._scratch.close()

    def _write(
        self, file: BinaryIO, ranks: Mapping[Slot, int], names: Mapping[Slot, tuple[str, str]], extras: Extras
    ) -> None:
        carried = dict(_carried(extras, Counter(slot.module for slot in ranks)))
        entries = []
        for slot, rank in ranks.items():
            for name, shape in zip(names[slot], _shapes(slot, rank), strict=True):
                entries.append((PREFIX + name, self._dtype, shape))
        for module, bias in extras.biases.items():
            entries.append((f"{PREFIX}{module}.lora_B.bias", self._dtype, tuple(bias.shape)))
        for name, tensor in carried.items():
            entries.append((PREFIX + name, tensor.dtype, tensor.shape))
        header, _ = build_header(entries, {"format": "pt"})
        file.write(header)
        for slot, rank in ranks.items():
            for stored in _stored(slot, [self._read(slot, kept) for kept in self._kept[slot]], rank):
                file.write(_bytes(stored, self._dtype))
        for bias in extras.biases.values():
            file.write(_bytes(bias, self._dtype))
        for tensor in carried.values():
            for start in range(0, tensor.numel, 1 << 22):
                part = tensor.read(start, min(start + (1 << 22), tensor.numel))
                file.write(_raw(part))

    def _read(self, slot: Slot, kept: _Kept) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        m, n = slot.shape
        size = kept.rank * (m + n)
        self._scratch.seek(kept.offset)
        flat = torch.frombuffer(bytearray(self._scratch.read(4 * size)), dtype=torch.float32)
        return flat[: m * kept.rank].view(m, kept.rank), flat[m * kept.rank :].view(kept.rank, n)


def _bytes(tensor: torch.Tensor, dtype: DType) -> bytes:
    return _raw(tensor.to(dtype.torch))


def _raw(tensor: torch.Tensor) -> bytes:
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _shapes(slot: Slot, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B as PEFT stores them."""
    m, n = slot.shape
    if slot.kind == "embedding":
        return (rank, m), (n, rank)
    if slot.kind == "stacked":
        a, b = (m, n) if slot.swapped else (n, m)
        return (slot.count * rank, a), (b, rank * slot.count)
    if slot.kind == "conv":
        channels = n
        for size in slot.kernel:
            channels //= size
        return (rank, channels, *slot.kernel), (m, rank, *(1 for _ in slot.kernel))
    return (rank, n), (m, rank)


def _stored(
    slot: Slot, found: Sequence[tuple[torch.Tensor, torch.Tensor]], rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B as PEFT stores them, padded with zeros to ``rank``."""
    import torch

    pairs = []
    for b, a in found:
        extra = rank - b.shape[1]
        wide, tall = torch.nn.functional.pad(b, (0, extra)), torch.nn.functional.pad(a, (0, 0, 0, extra))
        pairs.append((wide / slot.applied, tall))
    shape_a, shape_b = _shapes(slot, rank)
    if slot.kind == "stacked":
        # A has the expert slowest, B has it fastest.
        lower = [b.T if slot.swapped else a for b, a in pairs]
        upper = [a.T if slot.swapped else b for b, a in pairs]
        return torch.cat(lower).reshape(shape_a), torch.stack(upper, 2).reshape(shape_b)
    ((b, a),) = pairs
    if slot.kind == "embedding":
        return b.T.reshape(shape_a), a.T.reshape(shape_b)
    return a.reshape(shape_a), b.reshape(shape_b)


def _wrappers(slots: Mapping[Slot, Any]) -> dict[Slot, int]:
    """How many wrappers stand around each stacked parameter's own: PEFT nests those of one module."""
    modules: dict[str, list[Slot]] = {}
    for slot in slots:
        if slot.kind == "stacked":
            modules.setdefault(slot.module, []).append(slot)
    found = {}
    for group in modules.values():
        group.sort(key=lambda slot: _order(slot.parameter.rpartition(".")[2]), reverse=True)
        found.update({slot: depth for depth, slot in enumerate(group)})
    return found


def _order(leaf: str) -> tuple[int, str]:
    return _REGISTERED.index(leaf) if leaf in _REGISTERED else len(_REGISTERED), leaf


def _names(ranks: Mapping[Slot, int], nested: Mapping[Slot, int]) -> dict[Slot, tuple[str, str]]:
    """Keys of A and B, without the prefix."""
    found = {}
    for slot in ranks:
        if slot.kind == "embedding":
            found[slot] = (f"{slot.module}.lora_embedding_A", f"{slot.module}.lora_embedding_B")
        else:
            path = slot.module + ".base_layer" * nested.get(slot, 0)
            found[slot] = (f"{path}.lora_A.weight", f"{path}.lora_B.weight")
    return found


def _ranks_config(ranks: Mapping[Slot, int]) -> dict[str, Any]:
    """``r`` and ``lora_alpha``, and the patterns of the modules that differ from them."""
    if not ranks:
        return {"r": 1, "lora_alpha": 1, "rank_pattern": {}, "alpha_pattern": {}}
    common = Counter(ranks.values()).most_common(1)[0][0]
    # A pattern also matches the end of a longer path; where paths end alike, it is anchored.
    keys = {slot: slot.parameter if slot.kind in ("stacked", "parameter") else slot.module for slot in ranks}
    ends = Counter(path[at:] for path in set(keys.values()) for at in _starts(path))
    pattern = {
        ("^" if ends[keys[slot]] > 1 else "") + keys[slot]: rank for slot, rank in ranks.items() if rank != common
    }
    return {"r": common, "lora_alpha": common, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}


def _starts(path: str) -> Iterator[int]:
    yield 0
    for at, character in enumerate(path):
        if character == ".":
            yield at + 1


def _carried(extras: Extras, wrappers: Mapping[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are written as they are, by key; what a wrapped module holds lies in its ``base_layer``."""
    for module, tensor in extras.magnitudes.items():
        yield f"{module}.lora_magnitude_vector", tensor
    for module, (_, rows) in extras.tokens.items():
        yield f"{module}.token_adapter.trainable_tokens_delta", rows
    for key, tensor in extras.whole.items():
        module, _, leaf = ".".join(part for part in key.split(".") if part != "base_layer").rpartition(".")
        around = wrappers.get(module, 0)
        yield (f"{module}{'.base_layer' * around}.{leaf}" if around else key), tensor


def peft_config(
    slots: Sequence[Slot],
    configs: Sequence[Mapping[str, Any]],
    extras: Extras,
    *,
    base: str | None = None,
    dora: bool = False,
) -> dict[str, Any]:
    """Every field of the config but the ranks.

    Args:
        slots: what the adapter acts on.
        configs: of the adapters that it came from, the first one counts most; none for one made from nothing.
        extras: what goes in beside the factors.
        base: what to call the base when no config names it.
        dora: the magnitudes of ``extras`` are DoRA's.
    """
    plain = [slot for slot in slots if slot.kind not in ("stacked", "parameter")]
    named = sorted({slot.parameter for slot in slots if slot.kind in ("stacked", "parameter")})
    saved = _union(configs, "modules_to_save")
    wrapped = {slot.module for slot in slots}
    some = any(key.endswith(".bias") and key.rpartition(".")[0] in wrapped for key in extras.whole)
    biases = {str(config.get("bias") or "none") for config in configs} - {"none"}
    tokens = {module: list(ids) for module, (ids, _) in extras.tokens.items()}
    return {
        "peft_type": "LORA",
        "peft_version": LAYOUT,
        "auto_mapping": _first(configs, "auto_mapping"),
        "task_type": _first(configs, "task_type"),
        "base_model_name_or_path": _first(configs, "base_model_name_or_path") or base,
        "revision": _first(configs, "revision"),
        "inference_mode": True,
        "target_modules": _targets(plain, configs),
        "target_parameters": _leaves(named, configs) or None,
        "modules_to_save": saved or None,
        "trainable_token_indices": tokens or None,
        "bias": (biases.pop() if len(biases) == 1 else "all") if biases else "lora_only" if some else "none",
        "lora_bias": bool(extras.biases),
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(config.get("fan_in_fan_out") is True for config in configs),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": dora,
        "layer_replication": _first(configs, "layer_replication"),
        "ensure_weight_tying": any(config.get("ensure_weight_tying") is True for config in configs),
    }


def _first(configs: Sequence[Mapping[str, Any]], name: str) -> Any:
    return next((config[name] for config in configs if config.get(name) is not None), None)


def _union(configs: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    found: dict[str, None] = {}
    for config in configs:
        value = config.get(name) or ()
        found.update(dict.fromkeys((value,) if isinstance(value, str) else value))
    return list(found)


_SELECTING = ("layers_to_transform", "layers_pattern", "exclude_modules")


def _targets(slots: Sequence[Slot], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names that the adapters gave, where they were plain names of all such modules; else exact paths."""
    plain = all(
        isinstance(config.get("target_modules"), list) and not any(config.get(name) for name in _SELECTING)
        for config in configs
    )
    names = set(_union(configs, "target_modules")) if plain else set()
    modules = {slot.module for slot in slots}
    matched = {m for m in modules if any(m == name or m.endswith("." + name) for name in names)}
    useful = {n for n in names if any(m == n or m.endswith("." + n) for m in modules)}
    return sorted(useful | (modules - matched))


def _leaves(parameters: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    names = _union(configs, "target_parameters")
    matched = {p for p in parameters if any(p == name or p.endswith("." + name) for name in names)}
    return sorted(
        {n for n in names if any(p == n or p.endswith("." + n) for p in parameters)} | (set(parameters) - matched)
    )
