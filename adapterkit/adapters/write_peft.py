"""Write a plain LoRA adapter as PEFT saves one: ``adapter_config.json`` and ``adapter_model.safetensors``.

Every scaling lies in the factors and alpha equals the rank, so a reader that knows nothing but ``alpha / r`` gets it right.
Layers of different ranks are padded with zeros to one rank, because vLLM and llama.cpp read a single alpha and vLLM a
single rank; or they keep their own in ``rank_pattern`` and ``alpha_pattern``, with exact module paths as keys.

The layout is that of PEFT 0.19.1 and later (`LAYOUT`), which matters for stacked experts only.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from adapterkit import disk
from adapterkit.adapters.keys import PREFIX
from adapterkit.checkpoint.journal import block_digest, tensor_digest
from adapterkit.checkpoint.tensor import Renamed, Tensor
from adapterkit.dtypes import F32, DType
from adapterkit.foreign import json_value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

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


class Factor(Tensor):
    """One factor of a slot as PEFT stores it, computed when it is read."""

    def __init__(self, name: str, dtype: DType, shape: tuple[int, ...], load: Callable[[], torch.Tensor]) -> None:
        self.name, self.dtype, self.shape, self._load = name, dtype, shape, load

    @property
    def block(self) -> int:
        return max(1, self.numel)  # factors are small, and reading one in parts would compute it again for each

    @property
    def how(self) -> str:
        return "factor"

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self._load().reshape(-1)[start:stop].to(self.dtype.torch)


@dataclass(frozen=True)
class _Kept:
    """One delta in the scratch file: where it begins, and its rank."""

    offset: int
    rank: int


class FactorStore:
    """Takes the factors of one slot after the other, in a file of the hidden folder and never all in memory.

    The ranks of an adapter may be known only at its end. A journal beside the file has a line for every slot that is
    done, with a hash over its bytes and ``row``, what the caller wants to know of it again; a later run with ``resume``
    takes over the slots whose bytes still have that hash.

    Args:
        folder: the hidden folder that becomes the output (`publish.staging`).
        identity: of the inputs and the request; lines of another one are not used.
        resume: read what an earlier run left.
    """

    def __init__(self, folder: Path, identity: str, *, resume: bool = False) -> None:
        self._folder, self._journal = folder, f"{SCRATCH}.jsonl"
        self._first = json.dumps({"adapter": identity}).encode() + b"\n"
        self._fd = disk.open_kept_inside(folder, SCRATCH)
        self._kept: dict[str, list[_Kept]] = {}
        self.rows: dict[str, Any] = {}
        self._end = self._known() if resume else 0
        os.ftruncate(self._fd, self._end)
        lines = [self._line(name) for name in self._kept]
        self._log = disk.open_new_inside(folder, self._journal)
        os.write(self._log, self._first + b"".join(lines))

    def _known(self) -> int:
        """Take over what is proved; where it ends."""
        lines = (disk.read_inside(self._folder, self._journal) or b"").split(b"\n")
        if lines[0] + b"\n" != self._first:
            return 0
        end = 0
        for line in lines[1:-1]:
            try:
                said = json_value(line)
                kept = [_Kept(int(offset), int(rank)) for offset, rank in said["kept"]]
                start, stop = int(said["start"]), int(said["stop"])
                proved = start == end and tensor_digest([block_digest(disk.calls.pread(self._fd, stop - start, start))])
                if not proved or proved != said["digest"]:
                    break
                self._kept[said["slot"]], self.rows[said["slot"]], end = kept, said["row"], stop
            except (ValueError, KeyError, TypeError):
                break
        return end

    def add(self, slot: Slot, found: Sequence[Factors], row: Any) -> None:
        """The deltas of one slot, one or one per expert; ``row`` is plain JSON."""
        kept, start = [], self._end
        digests = []
        for one in found:
            kept.append(_Kept(self._end, one.rank))
            for part in factors_as_bytes(one):
                data = memoryview(part)
                digests.append(bytes(data))
                done = 0
                while done < len(data):
                    done += disk.calls.pwrite(self._fd, data[done:], self._end + done)
                self._end += len(data)
        self._kept[slot.parameter], self.rows[slot.parameter] = kept, row
        os.write(self._log, self._said(slot.parameter, start, self._end, b"".join(digests)))

    def _line(self, name: str) -> bytes:
        """The line of a slot that was taken over, from the bytes in the file."""
        names = list(self._kept)
        following = names[names.index(name) + 1 :]
        start = self._kept[name][0].offset if self._kept[name] else self._end
        stop = self._kept[following[0]][0].offset if following and self._kept[following[0]] else self._end
        return self._said(name, start, stop, disk.calls.pread(self._fd, stop - start, start))

    def _said(self, name: str, start: int, stop: int, data: bytes) -> bytes:
        said = {
            "slot": name,
            "kept": [[one.offset, one.rank] for one in self._kept[name]],
            "start": start,
            "stop": stop,
            "digest": tensor_digest([block_digest(data)]),
            "row": self.rows[name],
        }
        return json.dumps(said).encode() + b"\n"

    def ranks(self, slots: Sequence[Slot], *, own: bool) -> dict[Slot, int]:
        """The rank of each slot in the output: its own largest, or one for all."""
        kept = {slot.parameter: [one.rank for one in self._kept[slot.parameter]] for slot in slots}
        return ranks_of(slots, kept, own=own)

    def read(self, slot: Slot) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """B ``[m, r]`` and A ``[r, n]`` of a slot in float32, one pair per expert."""
        return [self._read(slot, kept) for kept in self._kept[slot.parameter]]

    def _read(self, slot: Slot, kept: _Kept) -> tuple[torch.Tensor, torch.Tensor]:
        nbytes = 4 * kept.rank * sum(slot.shape)
        return factors_at(disk.calls.pread(self._fd, nbytes, kept.offset), kept.rank, slot.shape)

    def close(self) -> None:
        """Let go of the files."""
        os.close(self._fd)
        os.close(self._log)


def ranks_of(slots: Sequence[Slot], kept: Mapping[str, Sequence[int]], *, own: bool) -> dict[Slot, int]:
    """The rank of each slot in the output: its own largest, or one for all.

    Args:
        kept: for each parameter, the ranks of its deltas.
    """
    found = {slot: max(kept[slot.parameter], default=1) for slot in slots}
    largest = max(found.values(), default=1)
    return found if own else dict.fromkeys(found, largest)


def factors_as_bytes(factors: Factors) -> tuple[bytes, bytes]:
    """B and A in float32."""
    return _bytes(factors.b), _bytes(factors.a)


def factors_at(data: bytes, rank: int, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """B ``[m, r]`` and A ``[r, n]`` of `factors_as_bytes`, end to end."""
    import torch

    m, n = shape
    flat = torch.frombuffer(bytearray(data or bytes(4)), dtype=torch.float32)
    return flat[: m * rank].view(m, rank), flat[m * rank : rank * (m + n)].view(rank, n)


def adapter_tensors(
    ranks: Mapping[Slot, int],
    extras: Extras,
    dtype: DType,
    read: Callable[[Slot], Sequence[tuple[torch.Tensor, torch.Tensor]]],
) -> list[Tensor]:
    """The tensors of the file, in its order: factors, biases, and what is carried over.

    Args:
        ranks: of the slots, in order.
        dtype: of factors and biases.
        read: gives B and A of a slot, one pair per expert.
    """
    names = _names(ranks, _wrappers(ranks))
    found: list[Tensor] = []
    for slot, rank in ranks.items():
        for side, (name, shape) in enumerate(zip(names[slot], _shapes(slot, rank), strict=True)):
            found.append(Factor(PREFIX + name, dtype, shape, partial(_side, slot, rank, side, read)))
    for module, bias in extras.biases.items():
        key = f"{PREFIX}{module}.lora_B.bias"
        found.append(Factor(key, dtype, tuple(bias.shape), lambda bias=bias: bias))  # type: ignore[misc]
    wrapped = Counter(slot.module for slot in ranks)
    found += [Renamed(PREFIX + name, tensor) for name, tensor in _carried(extras, wrapped)]
    return found


def _bytes(tensor: torch.Tensor) -> bytes:
    import torch

    return tensor.float().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _side(
    slot: Slot, rank: int, side: int, read: Callable[[Slot], Sequence[tuple[torch.Tensor, torch.Tensor]]]
) -> torch.Tensor:
    return _stored(slot, read(slot), rank)[side]


def config_json(config: Mapping[str, Any], ranks: Mapping[Slot, int]) -> dict[str, Any]:
    """The config as it is written: ``config`` with its ranks."""
    return {**config, **_ranks_config(ranks)}


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
