"""From the name of a parameter in a module tree to the rows of GGUF tensors that hold it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from adapterkit.adapters.names import HEAD, LONGEST, TEXT, Names
from adapterkit.adapters.target import Piece, Target
from adapterkit.errors import TargetError, UsageError
from adapterkit.gguf.archs import CONV1D, FUSED_QKV, INTERLEAVED, KNOWN, TURNED_EXPERTS, Run, plain
from adapterkit.gguf.archs import interleaved as interleave
from adapterkit.gguf.checkpoint import GGUFCheckpoint

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
EMBEDDING_MODULE, OUTPUT_MODULE = "model.embed_tokens.weight", "lm_head.weight"
_EXPERT = re.compile(r"(?P<stack>.*\.experts)\.(?P<expert>\d+)\.(?P<leaf>\w+)")
_LISTED = re.compile(r"(?P<stack>.*\.experts)\.(?P<leaf>gate_up_proj|down_proj)s\.(?P<expert>\d+)")
STACKS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)")


@dataclass(frozen=True)
class Model:
    """What the names of a GGUF model depend on.

    Attributes:
        arch: ``general.architecture``.
        layers: ``block_count``.
        heads, kv_heads: of every layer.
    """

    arch: str
    layers: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]

    @classmethod
    def of(cls, base: GGUFCheckpoint) -> Model:
        layers = base.number("block_count")
        heads = _per_layer(base.header.get(f"{base.arch}.attention.head_count"), layers)
        found = _per_layer(base.header.get(f"{base.arch}.attention.head_count_kv"), layers)
        return cls(base.arch, layers, heads, found if any(found) else heads)


def _per_layer(value: Any, layers: int) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value or 0] * layers
    return tuple(int(one) for one in values)


class GGUFNames(Names):
    """The parameters of a GGUF model, by the names that adapters give them.

    Args:
        shapes: of the GGUF tensors.
        config: what stands for the model's ``config.json``.
        model: its architecture.

    Raises:
        TargetError: an architecture whose order of rows is not known here.
        UsageError: ``gguf`` is not installed.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], model: Model) -> None:
        super().__init__(shapes, config)
        self._model = model
        self._found: dict[str, Target | None] = {}
        if model.arch not in KNOWN:
            raise TargetError(
                f"how GGUF stores the matrices of '{model.arch}' is not known here",
                "merge into the Hugging Face base and convert the result",
            )

    @property
    def arch(self) -> str:
        return self._model.arch

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the GGUF tensors, by name."""
        return self._shapes

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    def shapes_of(self, stored: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The tensors that a Hugging Face checkpoint of these shapes becomes; what has no name in GGUF is left out."""
        found: dict[str, tuple[int, ...]] = {}
        for name, shape in stored.items():
            stem, _, leaf = name.rpartition(".")
            expert = _EXPERT.fullmatch(stem)
            if expert is not None:
                tensor = self._map.get_name(f"{expert['stack']}.{expert['leaf']}")
                count = found.get(f"{tensor}.{leaf}", (0,))[0]
                found[f"{tensor}.{leaf}"] = (max(count, int(expert["expert"]) + 1), *shape)
            elif leaf in STACKS and len(shape) == 3:
                experts, out, width = shape[::2] + shape[1:2] if self.arch in TURNED_EXPERTS else shape
                for part in STACKS[leaf]:
                    found[f"{self._map.get_name(f'{stem}.{part}')}.weight"] = (experts, out // len(STACKS[leaf]), width)
            else:
                tensor = self._tensor(name)
                turned = stem.rpartition(".")[2] in CONV1D.get(self.arch, ()) and len(shape) == 2
                if tensor is not None:
                    found[tensor] = shape[::-1] if turned else shape
        return found

    def find(self, parameter: str) -> Target | None:
        if parameter not in self._found:
            found = {}
            for name in [parameter, *self._spellings(parameter)]:
                target = self._target(name)
                if target is not None:
                    found[target.pieces] = target
                if name == parameter and target is not None:
                    break
            one = next(iter(found.values())) if len(found) == 1 else None
            self._found[parameter] = None if one is None else Target(parameter, one.shape, one.pieces, one.stacked)
        return self._found[parameter]

    def tied(self, parameter: str) -> str | None:
        if OUTPUT in self._shapes or self._tensor(parameter) != OUTPUT or EMBEDDING not in self._shapes:
            return None
        return next((n for n in (EMBEDDING_MODULE, *self.parameters()) if self._tensor(n) == EMBEDDING), None)

    def sharers(self, parameter: str) -> list[str]:
        target = self.find(parameter)
        shared = target is not None and target.tensors == (EMBEDDING,) and OUTPUT not in self._shapes
        return [OUTPUT_MODULE] if shared else []

    def declared_ties(self) -> list[tuple[str, str]]:
        return [(EMBEDDING_MODULE, OUTPUT_MODULE)]

    def stored_name(self, parameter: str, beside: str) -> str:
        return self._tensor(parameter) or parameter

    def find_module(self, module: str) -> tuple[str, ...]:
        return tuple(p for p in (f"{module}.weight", f"{module}.bias") if self.find(p) is not None)

    def parameters(self) -> Iterator[str]:
        """Names under which gguf's table knows the tensors that are here; of several, those of ``model.layers``."""
        for name, (_, tensor) in self._map.mapping.items():
            if name.startswith(("model.", "lm_head")) and f"{tensor}.weight" in self._shapes:
                yield f"{name}.weight"

    @cached_property
    def _map(self) -> Any:
        try:
            import gguf
        except ImportError as error:
            raise UsageError(
                "names of GGUF tensors come from the package gguf", "pip install 'adapterkit[gguf]'"
            ) from error
        numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
        if self._model.arch not in numbers:
            raise TargetError(f"the installed gguf does not know '{self._model.arch}'", "pip install -U gguf")
        return gguf.get_tensor_name_map(numbers[self._model.arch], self._model.layers)

    def _spellings(self, name: str) -> list[str]:
        """The same parameter in models that stand alone or inside others."""
        found = []
        for family in (TEXT, HEAD):
            start = next((start for start in family if name.startswith(start)), None)
            if start is not None:
                found += [other + name[len(start) :] for other in family if other != start]
        if name.startswith("transformer."):
            found.append(name.removeprefix("transformer."))
        else:
            found += ["model." + name, "transformer." + name]
        return list(dict.fromkeys(found))

    def _tensor(self, name: str) -> str | None:
        """The GGUF name of a module-tree parameter, whether or not the file holds it."""
        for spelling in (name, *self._spellings(name)):
            stem, _, leaf = spelling.rpartition(".")
            found = self._map.get_name(stem) if leaf in ("weight", "bias") else None
            if found is not None:
                return f"{found}.{leaf}"
        return None

    def _target(self, name: str) -> Target | None:
        if len(name) > LONGEST:
            return None
        stem, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            return self._stack(stem, leaf, name)
        expert = _EXPERT.fullmatch(stem) or _LISTED.fullmatch(stem)
        if expert is not None:
            return self._expert(expert, leaf, name)
        tensor = self._map.get_name(stem)
        if tensor is None:
            return self._fused(stem, leaf, name)
        if f"{tensor}.{leaf}" not in self._shapes:
            return self._inside(tensor, leaf, name)
        return self._whole(f"{tensor}.{leaf}", stem, name)

    def _whole(self, tensor: str, stem: str, name: str) -> Target:
        shape = self._shapes[tensor]
        if stem.rpartition(".")[2] in CONV1D.get(self._model.arch, ()) and len(shape) == 2:
            return Target(name, shape[::-1], (Piece(tensor, shape[1], transposed=True),))
        return Target(name, shape, _pieces([(tensor, self._runs(tensor, shape[0]))]))

    def _runs(self, tensor: str, rows: int) -> list[Run]:
        """Where the rows of the checkpoint's matrix are in a tensor."""
        found = _LAYER.match(tensor)
        if found is None:
            return plain(rows)
        layer, kind = int(found[1]), found[2]
        heads, kv_heads = self._heads(layer)
        if kind == "attn_qkv" and self._model.arch in FUSED_QKV:
            return FUSED_QKV[self._model.arch](rows, heads, kv_heads)
        if kind in ("attn_q", "attn_k") and self._model.arch in INTERLEAVED:
            return interleave(rows, heads if kind == "attn_q" else kv_heads)
        return plain(rows)

    def _heads(self, layer: int) -> tuple[int, int]:
        heads, kv_heads = (
            counts[layer] if layer < len(counts) else 0 for counts in (self._model.heads, self._model.kv_heads)
        )
        if heads < 1 or kv_heads < 1:
            raise TargetError(
                f"the GGUF does not say how many attention heads layer {layer} has", "convert the base again"
            )
        return heads, kv_heads

    def _inside(self, tensor: str, leaf: str, name: str) -> Target | None:
        """q, k or v of a module tree that has them apart, in a file that has them in one."""
        found = re.fullmatch(r"(blk\.(\d+)\.)attn_([qkv])", tensor)
        whole = f"{found[1]}attn_qkv.{leaf}" if found is not None else ""
        if found is None or whole not in self._shapes or self._model.arch in (INTERLEAVED | frozenset(FUSED_QKV)):
            return None
        heads, kv_heads = self._heads(int(found[2]))
        shape = self._shapes[whole]
        width = shape[0] // (heads + 2 * kv_heads)
        at, count = {
            "q": (0, heads),
            "k": (heads * width, kv_heads),
            "v": ((heads + kv_heads) * width, kv_heads),
        }[found[3]]
        return Target(name, (count * width, *shape[1:]), (Piece(whole, count * width, at=at),))

    def _fused(self, stem: str, leaf: str, name: str) -> Target | None:
        """A projection that the module tree has in one, in a file that has its parts apart."""
        parent, _, last = stem.rpartition(".")
        names = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}.get(last, ())
        found = [self._map.get_name(f"{parent}.{part}") for part in names]
        tensors = [f"{tensor}.{leaf}" for tensor in found]
        if not found or None in found or not all(tensor in self._shapes for tensor in tensors):
            return None
        shapes = [self._shapes[tensor] for tensor in tensors]
        runs = [(t, self._runs(t, shape[0])) for t, shape in zip(tensors, shapes, strict=True)]
        return Target(name, (sum(shape[0] for shape in shapes), *shapes[0][1:]), _pieces(runs))

    def _expert(self, match: re.Match[str], leaf: str, name: str) -> Target | None:
        """A matrix of one expert of a stack: gate above up in a fused one, or each gate row before its up row."""
        tensors, shapes = self._parts_of(match["stack"], match["leaf"], leaf)
        number = int(match["expert"])
        if not tensors or number >= shapes[0][0]:
            return None
        heights = [shape[1] for shape in shapes]
        alternating = len(tensors) > 1 and TURNED_EXPERTS.get(self._model.arch, 1) > 1
        rows = [part if alternating else sum(heights[:part]) for part in range(len(tensors))]
        pieces = tuple(
            Piece(tensor, height, row=row, row_step=len(tensors) if alternating else 1, at=number * height)
            for tensor, height, row in zip(tensors, heights, rows, strict=True)
        )
        return Target(name, (sum(heights), *shapes[0][2:]), pieces)

    def _parts_of(self, stack: str, part: str, leaf: str) -> tuple[list[str], list[tuple[int, ...]]]:
        """The tensors that hold a parameter of a stack of experts, and their shapes; none when they are not all there."""
        found = [self._map.get_name(f"{stack}.{one}") for one in STACKS.get(part, (part,))]
        tensors = [f"{tensor}.{leaf}" for tensor in found]
        shapes = [self._shapes.get(tensor, ()) for tensor in tensors]
        alike = len({shape[:1] + shape[2:] for shape in shapes}) == 1 and len(shapes[0]) > 1
        return (tensors, shapes) if alike else ([], [])

    def _stack(self, stem: str, leaf: str, name: str) -> Target | None:
        """All experts in one parameter, gate above up in each; or on their side."""
        tensors, shapes = self._parts_of(stem, leaf, "weight") if stem.endswith("experts") else ([], [])
        if not tensors or len(shapes[0]) != 3:
            return None
        experts, _, columns = shapes[0]
        heights = [shape[1] for shape in shapes]
        step = TURNED_EXPERTS.get(self._model.arch)
        if step is not None:
            pieces = _turned(tensors, heights, columns, experts, step)
            return Target(name, (experts, columns, sum(heights)), pieces, stacked=True)
        runs = [
            (tensor, [Run(expert * height, 1, height)])
            for expert in range(experts)
            for tensor, height in zip(tensors, heights, strict=True)
        ]
        return Target(name, (experts, sum(heights), columns), _pieces(runs), stacked=True)


def _turned(tensors: list[str], heights: list[int], columns: int, experts: int, step: int) -> tuple[Piece, ...]:
    """Experts on their side: a tensor's rows are columns of the parameter, every ``step``-th or a run of them."""
    pieces = []
    for expert in range(experts):
        for part, (tensor, height) in enumerate(zip(tensors, heights, strict=True)):
            alternating = step > 1 and len(tensors) > 1
            pieces.append(
                Piece(
                    tensor,
                    columns,
                    row=expert * columns,
                    at=expert * height,
                    transposed=True,
                    column=part if alternating else sum(heights[:part]),
                    column_step=step if alternating else 1,
                    columns=height,
                )
            )
    return tuple(pieces)


def _pieces(parts: list[tuple[str, list[Run]]]) -> tuple[Piece, ...]:
    """Runs of tensor rows, in the order of the parameter's rows, as pieces."""
    pieces, row = [], 0
    for tensor, runs in parts:
        for run in runs:
            pieces.append(Piece(tensor, run.count, row=row, at=run.at, at_step=run.step))
            row += run.count
    return tuple(pieces)
