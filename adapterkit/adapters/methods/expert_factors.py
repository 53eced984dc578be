"""LoRA on experts in the forms that trainers other than PEFT save: one edit for each stack of experts.

* factors in three dimensions, ``lora_A`` ``[experts, r, in]`` and ``lora_B`` ``[experts, out, r]``; a factor that all experts
  share has a leading 1 (Megatron-Bridge, SGLang; Tinker's ``w1``, ``w3`` and ``w2`` for gate, up and down);
* a linear layer for each expert, where the base keeps them as one parameter: ``gate_up_projs.N`` and ``down_projs.N`` of
  gpt-oss as Unsloth loads it in 4 bits, or ``experts.N.down_proj``.

All factors of one stack become one change: for each expert the products side by side, rank by rank.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.adapters.change import Change, Kernel, LowRank, StackedLowRank, Weights, matrix
from adapterkit.adapters.method import Context, Edit, Module, check_matrix
from adapterkit.dtypes import F64
from adapterkit.errors import AdapterError, TargetError
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.target import Target
    from adapterkit.checkpoint.tensor import Tensor

A, B = "lora_A.weight", "lora_B.weight"
# Names of one projection of an expert, that of transformers first.
GATE, UP, DOWN, FUSED = ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"), "gate_up_proj"
# Model types that keep gate and up of a fused projection in turns, not one after the other.
INTERLEAVED = frozenset({"gpt_oss"})
_LISTED = re.compile(r"(?P<parent>.+)\.(?P<leaf>gate_up_proj|down_proj|gate_proj|up_proj)s\.(?P<expert>\d{1,6})")
_NUMBERED = re.compile(r"(?P<parent>.+)\.(?P<expert>\d{1,6})\.(?P<leaf>\w+)")
_SCRATCH = "expert factors"


@dataclass(frozen=True)
class _Part:
    """The factors of one module.

    Attributes:
        expert: whose they are; None for one of each, or one for all.
        outputs: which outputs of the stack are the module's: ``all``, or its ``half`` of a fused projection.
    """

    module: Module
    a: Tensor
    b: Tensor
    scale: float
    expert: int | None = None
    outputs: str = "all"

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def key(self) -> str:
        return f"{self.module.path}.{A}"

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of the expert matrix that the factors are made for, the fused one where they are of a part."""
        return self.b.shape[-2] * (1 if self.outputs == "all" else 2), self.a.shape[-1]

    def where(self, outs: int) -> slice:
        """The module's outputs among the ``outs`` of the stack."""
        half = outs // 2
        known = {
            "all": slice(0, outs),
            "first": slice(0, half),
            "second": slice(half, outs),
            "even": slice(0, outs, 2),
            "odd": slice(1, outs, 2),
        }
        return known[self.outputs]


def in_three_dimensions(adapter: Adapter) -> bool:
    """Whether an adapter holds factors ``[experts, r, in]`` and ``[experts, out, r]``, which no convolution's are."""
    for key, a in adapter.tensors.items():
        b = adapter.tensors.get(key.removesuffix(A) + B) if key.endswith(f".{A}") else None
        if b is not None and len(a.shape) == 3 and len(b.shape) == 3 and b.shape[2] == a.shape[1] and b.shape[2] > 1:
            return True
    return False


def expert_edits(module: Module, context: Context) -> tuple[Edit, ...] | None:
    """The edits of a module in one of these forms, all those of its stack with the first of them; None if it has none.

    Raises:
        TargetError: the base has no such experts, or of other sizes.
        AdapterError: factors that contradict each other.
    """
    if _SCRATCH not in context.scratch:
        context.scratch[_SCRATCH] = _planned(context)
    found: tuple[Edit, ...] | TargetError | None = context.scratch[_SCRATCH].get((module.path, module.depth))
    if isinstance(found, TargetError):
        raise found
    return found


def _planned(context: Context) -> dict[tuple[str, int], tuple[Edit, ...] | TargetError]:
    """The edits, or what is wrong, of every module that is in one of the forms."""
    stacks: dict[str, tuple[Target, list[_Part]]] = {}
    done: dict[tuple[str, int], tuple[Edit, ...] | TargetError] = {}
    for module in context.siblings:
        key = (module.path, module.depth)
        try:
            place = _place(module, context)
            if place is None:
                continue
            target, part = place
            done[key] = ()
            if target is None:
                done[key] = tuple(_one_by_one(part, context))
            else:
                stacks.setdefault(target.parameter, (target, []))[1].append(part)
        except TargetError as error:
            done[key] = error
    for target, parts in stacks.values():
        first = parts[0].module
        try:
            done[first.path, first.depth] = (_stack(target, parts, context),)
        except TargetError as error:
            done[first.path, first.depth] = error
    return done


def _place(module: Module, context: Context) -> tuple[Target | None, _Part] | None:
    """The stack that a module's factors act on and which part of it; no stack where experts are matrices of their own."""
    a, b = module.tensors.get(A), module.tensors.get(B)
    if a is None or b is None or context.names.find(f"{module.path}.weight") is not None:
        return None
    expert = None
    if len(a.shape) == 3 and len(b.shape) == 3:
        parent, _, leaf = module.path.rpartition(".")
    elif len(a.shape) == 2 and len(b.shape) == 2:
        match = _LISTED.fullmatch(module.path) or _NUMBERED.fullmatch(module.path)
        if match is None:
            return None
        parent, expert = match["parent"], int(match["expert"])
        leaf = match["leaf"]
    else:
        return None
    stack = _stack_of(parent, leaf, context)
    if stack is None and expert is not None:
        return None
    key = f"{module.path}.{A}"
    other = sorted(set(module.tensors) - {A, B})
    if other:
        raise TargetError(
            f"{context.where}: {module.path} has {other[0]}, which has no form for experts", "train them without it"
        )
    if a.shape[-2] != b.shape[-1]:
        raise AdapterError(
            f"{context.where}: '{key}' has rank {a.shape[-2]} and its lora_B {b.shape[-1]}", "save the adapter again"
        )
    part = _Part(module, a, b, context.config.scaling(module.path, a.shape[-2]), expert)
    return (None, part) if stack is None else (stack[0], replace(part, outputs=stack[1]))


def _stack_of(parent: str, leaf: str, context: Context) -> tuple[Target, str] | None:
    """The stack that holds a projection, and which of its outputs are that projection's."""
    same = _names(leaf)
    for name in same:
        target = context.names.find(f"{parent}.{name}")
        if target is not None and len(target.shape) == 3 and target.stacked:
            return target, "all"
    target = context.names.find(f"{parent}.{FUSED}") if same in (GATE, UP) else None
    if target is None or len(target.shape) != 3 or not target.stacked:
        return None
    turns = bool(INTERLEAVED & context.names.model_types)
    return target, (("even" if turns else "first") if same is GATE else ("odd" if turns else "second"))


def _names(leaf: str) -> tuple[str, ...]:
    """All names of the projection that ``leaf`` is one of."""
    return next((names for names in (GATE, UP, DOWN) if leaf in names), (leaf,))


def _stack(target: Target, parts: list[_Part], context: Context) -> Edit:
    """One edit for all factors of a stack."""
    experts, first, second = target.shape
    wanted = parts[0].shape
    # Stored as [experts, in, out]: the shape says so, and where it is square the architecture.
    swapped = wanted == (second, first) if first != second else context.names.turned(target.parameter)
    outs, ins = (second, first) if swapped else (first, second)
    ranks = [0] * experts
    for part in parts:
        _check(part, target, (outs, ins), context)
        for expert in _experts(part, experts):
            ranks[expert] += part.rank
    width = max(ranks)

    def load(weights: Weights) -> Kernel:
        import torch

        kind = torch.float64 if weights.dtype is F64 else torch.float32
        left, right = (torch.zeros(shape, dtype=kind) for shape in ((experts, outs, width), (experts, width, ins)))
        used = [0] * experts
        for part in parts:
            a, b = (_stacked(matrix(tensor, weights.dtype)) for tensor in (part.a, part.b))
            b = b if part.scale == 1 else (b.double() * part.scale).to(kind)
            for expert in _experts(part, experts):
                beside = slice(used[expert], used[expert] + part.rank)
                right[expert, beside] = a[expert if len(a) > 1 else 0]
                left[expert, part.where(outs), beside] = b[expert if len(b) > 1 else 0]
                used[expert] += part.rank
        if swapped:
            left, right = right.mT.contiguous(), left.mT.contiguous()
        return StackedLowRank(left, right, 1.0)

    reads = sum(part.a.nbytes + part.b.nbytes for part in parts)
    return Edit(target, Change(f"lora r={width} x{experts}", load, reads, 4 * experts * width * (outs + ins)))


def _stacked(factor: torch.Tensor) -> torch.Tensor:
    return factor if factor.dim() == 3 else factor[None]


def _experts(part: _Part, count: int) -> Iterable[int]:
    return range(count) if part.expert is None else (part.expert,)


def _check(part: _Part, target: Target, shape: tuple[int, int], context: Context) -> None:
    """Whether a module's factors fit the stack.

    Raises:
        TargetError: they are for other experts, or more of them.
    """
    experts = target.shape[0]
    said = {tensor.shape[0] for tensor in (part.a, part.b) if len(tensor.shape) == 3} - {1, experts}
    if said or (part.expert is not None and part.expert >= experts):
        counted = f"{max(said)} experts" if said else f"expert number {part.expert}"
        raise TargetError(
            f"{context.where}: '{part.key}' is for {counted}, and {target.parameter} has {experts} experts",
            "give the base it was trained on",
        )
    if part.shape != shape:
        raise TargetError(
            f"{context.where}: '{part.key}' is made for experts of {part.shape[0]} x {part.shape[1]}, and those of "
            f"{target.parameter} are {shape[0]} x {shape[1]}",
            "give the base it was trained on",
        )


def _one_by_one(part: _Part, context: Context) -> Iterator[Edit]:
    """An edit for each expert, where the base is known only by the names of single experts.

    Raises:
        TargetError: there are none, or another number of them.
    """
    parent, _, leaf = part.module.path.rpartition(".")
    same = _names(leaf)
    name = next((one for one in same if context.names.find(f"{parent}.0.{one}.weight") is not None), same[0])
    count = 0
    while context.names.find(f"{parent}.{count}.{name}.weight") is not None:
        count += 1
    if count == 0:
        context.target(part.module.path, part.key)
    said = {part.a.shape[0], part.b.shape[0]} - {1, count}
    if said:
        raise TargetError(
            f"{context.where}: '{part.key}' is for {max(said)} experts, and the base has {count} below {parent}",
            "give the base it was trained on",
        )
    reads, held = (part.a.nbytes + part.b.nbytes) // count, 4 * (part.a.numel + part.b.numel)
    for expert in range(count):
        target = context.target(f"{parent}.{expert}.{name}.weight", part.key)
        check_matrix(target, part.shape, part.key, context.where)

        def load(weights: Weights, expert: int = expert) -> Kernel:
            a, b = (matrix(side, weights.dtype) for side in (part.a, part.b))
            return LowRank(b[expert if len(b) > 1 else 0], a[expert if len(a) > 1 else 0], part.scale)

        yield Edit(target, Change(f"lora r={part.rank}", load, reads, held))
