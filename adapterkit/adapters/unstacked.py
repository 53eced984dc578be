"""`unstacked`: experts that a file stores as one stack, one by one, as llm-compressor writes them and servers load them.

Where a model class reads both forms, the table of names says what the single experts are called: a stack is taken apart only
if that table puts the parts together again to the same parameter, row by row. transformers then loads the parts, too.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from adapterkit.adapters.merged import StoredWeights
from adapterkit.adapters.names import Names
from adapterkit.checkpoint.tensor import BLOCK, Tensor

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.target import Target
    from adapterkit.checkpoint.checkpoint import Checkpoint

_STACK = re.compile(r"(.*\bexperts)\.(gate_up_proj|down_proj)")
# What single experts are called: gate, up, down; and the module around them, by that of the stack.
CALLED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
AROUND = ((".mlp.experts", ".block_sparse_moe.experts"), ("", ""))


class _Stack:
    """A tensor that several handles read; it is let go when all of them are."""

    def __init__(self, target: Target, tensors: Mapping[str, Tensor]) -> None:
        (name,) = target.tensors
        self.tensor, self.weights = tensors[name], StoredWeights(target, tensors)
        self.turned = any(piece.transposed for piece in target.pieces)
        self._lock, self._left = threading.Lock(), set[str]()

    def held(self, name: str) -> None:
        with self._lock:
            self._left.add(name)

    def release(self, name: str) -> None:
        with self._lock:
            self._left.discard(name)
            if not self._left:
                self.tensor.release()


class OfStack(Tensor):
    """The matrix of one expert: some rows of a parameter that holds all of them.

    Attributes:
        stack: the tensor that holds them all.
        turned: its rows are the columns of this matrix.
    """

    def __init__(self, name: str, rows: range, shared: _Stack) -> None:
        self.name, self.shape = name, (len(rows), shared.weights.shape[1])
        self._first, self._shared = rows.start, shared
        self.stack, self.turned = shared.tensor.name, shared.turned
        self._inner = shared.tensor
        self.dtype = self._inner.dtype
        shared.held(name)

    @property
    def block(self) -> int:
        return max(1, BLOCK // self.shape[1]) * self.shape[1]

    @property
    def memory(self) -> int:
        return self._inner.memory + 8 * self.numel

    @property
    def how(self) -> str:
        inner = self._inner.how
        return "one expert of a stack" if inner == "copy" else f"{inner}, one expert of a stack"

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.read_wide(start, stop).to(self.dtype.torch)

    def read_wide(self, start: int, stop: int) -> torch.Tensor:
        columns = self.shape[1]
        first, last = start // columns, -(-stop // columns)
        found = self._shared.weights.read(self._first + first, self._first + last).view(-1)
        return found[start - first * columns : stop - first * columns]

    def release(self) -> None:
        self._shared.release(self.name)


@dataclass(frozen=True)
class _Part:
    """One matrix of a stack: its name, and its rows in the parameter."""

    name: str
    rows: range


def unstacked(checkpoint: Checkpoint, wanted: Callable[[str, list[Tensor]], bool]) -> Checkpoint:
    """The checkpoint with its stacks of experts taken apart, as far as the class of the model reads single experts.

    Args:
        wanted: of the module of a layer's experts and of their matrices, whether they are to be taken apart.
    """
    names = Names(checkpoint.shapes, checkpoint.config)
    layers: dict[str, list[Target]] = {}
    for parameter in names.parameters():
        target = None if _STACK.fullmatch(parameter) is None else names.find(parameter)
        if target is None or len(target.shape) != 3 or len(target.tensors) != 1:
            continue
        found = _STACK.fullmatch(target.tensors[0])  # single experts stand where the file has the stack
        if found is not None and len(checkpoint[found[0]].shape) == 3:
            layers.setdefault(found[1], []).append(target)
    # Of a layer all or none: the up projections of Nemotron-H are stacks of another name.
    taken = {target.tensors[0] for targets in layers.values() for target in targets}
    for name, tensor in checkpoint.items():
        if len(tensor.shape) == 3 and name not in taken:
            layers.pop(name.removesuffix(".weight").rpartition(".")[0], None)
    called = next((_called(checkpoint, stem, targets) for stem, targets in layers.items()), None)  # layers are alike
    if called is None:
        return checkpoint
    apart: dict[str, list[tuple[Target, list[_Part]]]] = {}
    parts: dict[str, list[OfStack]] = {}  # by the tensor that is taken apart
    for stem, targets in layers.items():
        made = [(target, _parts(target, _stem(stem, called), called[2:])) for target in targets]
        matrices = {target.tensors[0]: _matrices(target, mine, checkpoint.tensors) for target, mine in made}
        if wanted(stem, [one for mine in matrices.values() for one in mine]):
            apart[stem] = made
            parts |= matrices
    after = Names(_shapes(checkpoint, [one for made in apart.values() for one in made]), checkpoint.config)
    for made in apart.values():
        if not all(mine and _same(after.find(target.parameter), target, mine) for target, mine in made):
            for target, _ in made:  # a layer of another kind
                del parts[target.tensors[0]]
    if not parts:
        return checkpoint
    tensors: dict[str, Tensor] = {}
    shards: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        for one in parts.get(name, [tensor]):
            tensors[one.name] = one
            if name in checkpoint.shards:
                shards[one.name] = checkpoint.shards[name]
    return replace(checkpoint, tensors=tensors, shards=shards, index=None)


def _matrices(target: Target, parts: list[_Part], tensors: Mapping[str, Tensor]) -> list[OfStack]:
    shared = _Stack(target, tensors)
    return [OfStack(part.name, part.rows, shared) for part in parts]


def _shapes(checkpoint: Checkpoint, made: list[tuple[Target, list[_Part]]]) -> dict[str, tuple[int, ...]]:
    """Of the tensors, when some stacks are taken apart."""
    shapes = dict(checkpoint.shapes)
    for target, parts in made:
        del shapes[target.tensors[0]]
        shapes |= {part.name: (len(part.rows), target.matrix[1]) for part in parts}
    return shapes


def _stem(stem: str, called: tuple[str, ...]) -> str:
    return stem.replace(called[0], called[1]) if called[0] else stem


def _called(checkpoint: Checkpoint, stem: str, targets: list[Target]) -> tuple[str, ...] | None:
    """What the single experts of a layer are called, so that the table of names makes the same parameters of them."""
    for around in AROUND:
        for words in CALLED:
            called = (*around, *words)
            found = [(target, _parts(target, _stem(stem, called), words)) for target in targets]
            if (around[0] and around[0] not in stem) or not all(parts for _, parts in found):
                continue
            names = Names(_shapes(checkpoint, found), checkpoint.config)
            if all(_same(names.find(target.parameter), target, parts) for target, parts in found):
                return called
    return None


def _parts(target: Target, stem: str, words: tuple[str, ...]) -> list[_Part]:
    """The matrices of a stack ``[experts, out, in]``; of one that joins two projections, first all of the first."""
    experts, height, _ = target.shape
    gate, up, down = words
    joined = target.parameter.endswith("gate_up_proj")
    if joined and height % 2:
        return []
    each = height // 2 if joined else height
    leaves = (gate, up) if joined else (down,)
    return [
        _Part(f"{stem}.{expert}.{leaf}.weight", range(start, start + each))
        for expert in range(experts)
        for start, leaf in zip(range(expert * height, (expert + 1) * height, each), leaves, strict=True)
    ]


def _same(found: Target | None, wanted: Target, parts: list[_Part]) -> bool:
    """Whether a parameter is made of just these matrices, in this order of rows."""
    if found is None or found.shape != wanted.shape:
        return False
    rows = {part.name: part.rows for part in parts}
    there: dict[str, int] = {}
    for piece in found.pieces:
        mine = rows.get(piece.tensor)
        if mine is None or piece.transposed or piece.row_step != 1 or piece.at_step != 1:
            return False
        if piece.row != mine.start + piece.at:
            return False
        there[piece.tensor] = there.get(piece.tensor, 0) + piece.count
    return there == {name: len(mine) for name, mine in rows.items()}
