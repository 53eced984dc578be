"""The conversions between a checkpoint and a module tree, as index maps.

A model loader stacks, concatenates, chunks, de-interleaves, permutes and transposes tensors. Here the same operations
act on a `Layout`: the shape of a parameter and, for each run of its rows, the tensor rows that hold them. Nothing is
read; running a converter on the shapes in a header tells where every row of a parameter is stored.

Operations, as they stand in ``names.json`` (``dim`` counts as in the tensor):

=====================================  ====================================================================
``["stack"]``                          n tensors ``[...]`` -> ``[n, ...]``
``["cat", dim]``                       tensors one after the other along ``dim``
``["chunk", dim]``                     equal parts along ``dim``, one per target
``["split", dim]``                     parts along ``dim`` sized as query, key and value heads
``["sizes", dim, sizes]``               parts along ``dim``; a size is a sum of products of config fields and numbers
``["only"]``                           the first of the sources, where a file has no other (the others decode it)
``["first", field]``                   the first rows, as many as the config's field says
``["queries"]``                        ``[2n, ...]`` first and last, ``[2n, ...]`` second and third -> ``[n, 4, ...]``
``["deinterleave", dim]``              ``x0 y0 x1 y1 ...`` -> ``x0 x1 ... y0 y1 ...`` along ``dim``
``["rope", sub-config, names]``        the same within each head (complex to split-half rotary order)
``["transpose", a, b, by shape]``      swapped axes; ``by shape``: only when the file is not as the module wants it
``["deal"]``                           each list dealt in equal parts to the targets, stacked, then concatenated
=====================================  ====================================================================
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.target import Piece
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Op = Sequence[Any]


# No model has more experts than this; a header that says so is not followed.
MOST_BLOCKS = 1 << 16


class UnmappableError(Exception):
    """The tensors do not have the shapes that the rule expects."""


@dataclass(frozen=True)
class Layout:
    """A tensor whose first ``lead`` dimensions are its rows, and its rows' whereabouts, in row order, without gaps."""

    shape: tuple[int, ...]
    lead: int
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        return prod(self.shape[: self.lead])

    def take(self, start: int, step: int, count: int, row: int) -> list[Piece]:
        """Rows ``start, start + step, ...`` of this layout, as rows ``row, row + 1, ...`` of another one."""
        found: list[Piece] = []
        low, high = 0, len(self.pieces)
        while low < high:  # the first piece that reaches past `start`
            middle = (low + high) // 2
            if self.pieces[middle].row + self.pieces[middle].count <= start:
                low = middle + 1
            else:
                high = middle
        done = 0
        while done < count:
            if low == len(self.pieces):
                raise UnmappableError
            piece = self.pieces[low]
            here = start + done * step - piece.row
            fits = min(count - done, (piece.count - 1 - here) // step + 1)
            if fits > 0:
                if piece.transposed:
                    if step != 1:
                        raise UnmappableError
                    found.append(replace(piece, count=fits, row=row + done, row_at=piece.row_at + here))
                else:
                    at, at_step = piece.at + here * piece.at_step, piece.at_step * step
                    found.append(Piece(piece.tensor, fits, row=row + done, at=at, at_step=at_step))
                done += fits
            low += 1
        return found


def whole(name: str, shape: Sequence[int], lead: int) -> Layout:
    """A tensor as it is stored."""
    shape = tuple(shape)
    if len(shape) < lead + (lead > 1):  # only vectors have no columns
        raise UnmappableError
    return Layout(shape, lead, (Piece(name, prod(shape[:lead])),))


def rearranged(shape: Sequence[int], lead: int, runs: Iterable[tuple[Layout, int, int, int]]) -> Layout:
    """A layout of ``shape`` made of ``runs``: (from which layout, first row, step, how many rows), in row order."""
    pieces: list[Piece] = []
    row = 0
    for source, start, step, count in runs:
        pieces += source.take(start, step, count, row)
        row += count
    result = Layout(tuple(shape), lead, tuple(pieces))
    if row != result.rows:
        raise UnmappableError
    return result


def _axis(layout: Layout, dim: int) -> tuple[int, int, int]:
    """``(blocks, length, rows per index)`` around dimension ``dim`` of the rows."""
    if dim >= layout.lead or prod(layout.shape[:dim]) > MOST_BLOCKS:
        raise UnmappableError
    return prod(layout.shape[:dim]), layout.shape[dim], prod(layout.shape[dim + 1 : layout.lead])


def _resized(layout: Layout, dim: int, length: int) -> tuple[int, ...]:
    return (*layout.shape[:dim], length, *layout.shape[dim + 1 :])


def stack(parts: Sequence[Layout]) -> Layout:
    first = parts[0]
    if any(part.shape != first.shape or part.lead != first.lead for part in parts) or len(first.shape) <= first.lead:
        raise UnmappableError
    return rearranged((len(parts), *first.shape), first.lead + 1, [(part, 0, 1, part.rows) for part in parts])


def cat(parts: Sequence[Layout], dim: int) -> Layout:
    axes = [_axis(part, dim) for part in parts]
    if len({_resized(part, dim, 0) for part in parts}) != 1:
        raise UnmappableError
    runs = [
        (part, block * length * unit, 1, length * unit)
        for block in range(axes[0][0])
        for part, (_, length, unit) in zip(parts, axes, strict=True)
    ]
    return rearranged(_resized(parts[0], dim, sum(axis[1] for axis in axes)), parts[0].lead, runs)


def parts(layout: Layout, dim: int, sizes: Sequence[int]) -> list[Layout]:
    """``layout`` cut along ``dim`` into parts of ``sizes``."""
    blocks, length, unit = _axis(layout, dim)
    if sum(sizes) != length or min(sizes) <= 0:
        raise UnmappableError
    found, start = [], 0
    for size in sizes:
        runs = [(layout, (block * length + start) * unit, 1, size * unit) for block in range(blocks)]
        found.append(rearranged(_resized(layout, dim, size), layout.lead, runs))
        start += size
    return found


def deinterleave(layout: Layout, dim: int, groups: int = 1) -> Layout:
    """``x0 y0 x1 y1 ...`` -> ``x0 x1 ... y0 y1 ...`` within each of ``groups`` equal parts of dimension ``dim``."""
    blocks, length, unit = _axis(layout, dim)
    if unit != 1 or length % (2 * groups):
        raise UnmappableError
    size = length // groups
    runs = [
        (layout, block * length + group * size + half, 2, size // 2)
        for block in range(blocks)
        for group in range(groups)
        for half in (0, 1)
    ]
    return rearranged(layout.shape, layout.lead, runs)


def queries(state: Sequence[Sequence[Layout]]) -> Layout:
    """``[a0 d0 a1 d1 ...]`` and ``[b0 c0 b1 c1 ...]`` as ``[[a0 b0 c0 d0], [a1 b1 c1 d1], ...]``."""
    if [len(group) for group in state] != [1, 1]:
        raise UnmappableError
    (outer,), (inner,) = state
    if outer.shape != inner.shape or outer.lead != 1 or outer.shape[0] % 2:
        raise UnmappableError
    count = outer.shape[0] // 2
    runs = [run for i in range(count) for run in ((outer, 2 * i, 1, 1), (inner, 2 * i, 1, 2), (outer, 2 * i + 1, 1, 1))]
    return rearranged((count, 4, *outer.shape[1:]), 2, runs)


def transpose(layout: Layout, a: int, b: int) -> Layout:
    """Swap the last row dimension with the columns; only a tensor that is stored whole can be seen so."""
    lead = layout.lead
    if {a, b} != {lead - 1, lead} or len(layout.shape) != lead + 1 or len(layout.pieces) != 1:
        raise UnmappableError
    piece, (old, new), blocks = layout.pieces[0], layout.shape[lead - 1 :], prod(layout.shape[: lead - 1])
    if piece.transposed or piece.at_step != 1 or blocks > MOST_BLOCKS:
        raise UnmappableError
    pieces = tuple(
        Piece(piece.tensor, new, row=block * new, at=piece.at + block * old, transposed=True) for block in range(blocks)
    )
    return Layout((*layout.shape[: lead - 1], new, old), lead, pieces)


_NO_DIM = frozenset({"stack", "deal", "queries", "rope", "only", "first"})


def lead_of(ops: Sequence[Op]) -> tuple[int, int]:
    """How many leading dimensions are rows, before and after ``ops``."""
    stacks = any(op[0] in ("stack", "deal", "queries") for op in ops)
    dims = [max(op[1:3]) if op[0] == "transpose" else op[1] + 1 for op in ops if op[0] not in _NO_DIM]
    after = max([2 if stacks else 1, *dims])
    return (after - 1 if stacks else after), after


def run(
    ops: Sequence[Op],
    sources: Sequence[Sequence[Layout]],
    keys: Sequence[str],
    targets: Sequence[str],
    number: Callable[[str | None, str], int],
) -> list[Layout]:
    """The layouts of ``targets`` made from ``sources`` (for each of ``keys``, its tensors in natural order).

    ``number(sub-config or None, field)`` reads the config (0 when it has no such number). Raises `UnmappableError`.
    """
    state = [list(source) for source in sources]
    names = list(keys)
    for op, *arguments in ops:
        if op == "stack":
            state = [[stack(group)] for group in state]
        elif op == "cat":
            state, names = [[cat([part for group in state for part in group], arguments[0])]], list(targets)
        elif op == "chunk":
            layout = _only(state)
            length = layout.shape[arguments[0]]
            size = ceil(length / len(targets))
            sizes = [min(size, length - start) for start in range(0, length, size)]
            if len(sizes) != len(targets):
                raise UnmappableError
            state, names = [[part] for part in parts(layout, arguments[0], sizes)], list(targets)
        elif op == "split":
            layout = _only(state)
            heads, kv_heads = number(None, "num_attention_heads"), number(None, "num_key_value_heads")
            unit, rest = divmod(layout.shape[arguments[0]], max(1, heads + 2 * kv_heads))
            if rest or len(targets) != 3:
                raise UnmappableError
            sizes = [heads * unit, kv_heads * unit, kv_heads * unit]
            state, names = [[part] for part in parts(layout, arguments[0], sizes)], list(targets)
        elif op == "only":
            if any(state[1:]):
                raise UnmappableError  # a quantized form of its own
            state, names = state[:1], list(targets)
        elif op == "first":
            layout = _only(state)
            rows = min(number(None, arguments[0]) or layout.shape[0], layout.shape[0])
            unit = layout.rows // layout.shape[0]
            state = [[rearranged((rows, *layout.shape[1:]), layout.lead, [(layout, 0, 1, rows * unit)])]]
        elif op == "queries":
            state, names = [[queries(state)]], list(targets)
        elif op == "sizes":
            dim, wanted = arguments
            sizes = [sum(prod(_factor(one, number) for one in term) for term in size) for size in wanted]
            if len(sizes) != len(targets):
                raise UnmappableError
            state, names = [[part] for part in parts(_only(state), dim, sizes)], list(targets)
        elif op == "deinterleave":
            state = [[deinterleave(_only(state), arguments[0])]]
        elif op == "rope":
            section, only = arguments
            heads = number(section, "num_attention_heads") or 1
            turned = [only is None or any(part in name for part in only) for name in names]
            state = [
                [deinterleave(layout, 0, heads) for layout in group] if turn else group
                for turn, group in zip(turned, state, strict=True)
            ]
        elif op == "transpose":
            a, b, by_shape = arguments
            layout = _only(state)
            state = [[layout if by_shape and _as_wanted(layout, targets[0], number) else transpose(layout, a, b)]]
        elif op == "deal":
            dealt: list[list[Layout]] = [[] for _ in targets]
            for group in state:
                size = ceil(len(group) / len(targets))
                for index, hand in enumerate(dealt):
                    hand.append(stack(group[index * size : (index + 1) * size]))
            state, names = [[cat(hand, 1)] for hand in dealt], list(targets)
        else:
            raise UnmappableError
    if len(state) != len(targets) or any(len(group) != 1 for group in state):
        raise UnmappableError
    return [group[0] for group in state]


def _factor(one: str | int, number: Callable[[str | None, str], int]) -> int:
    return one if isinstance(one, int) else number(None, one)


def _only(state: Sequence[Sequence[Layout]]) -> Layout:
    if len(state) != 1 or len(state[0]) != 1:
        raise UnmappableError
    return state[0][0]


def _as_wanted(layout: Layout, target: str, number: Callable[[str | None, str], int]) -> bool:
    """Whether stacked experts are stored ``[experts, out, in]`` already (a square one counts as stored so)."""
    field = "moe_intermediate_size" if target.endswith("down_proj") else "hidden_size"
    return layout.shape[-1] == number(None, field)


def unrun(ops: Sequence[Op], shapes: Sequence[Sequence[int]], keys: int, target: int = 0) -> tuple[int, ...]:
    """The shape of one source tensor of ``target``, from the shapes of all targets and the number of source ``keys``."""
    shape = list(shapes[target])
    for op, *arguments in reversed(ops):
        if op == "stack":
            shape = shape[1:]
        elif op == "queries":
            shape = [2 * shape[0], *shape[2:]]
        elif op in ("cat", "deal"):
            dim = arguments[0] if arguments else 1
            if shape[dim] % keys:
                raise UnmappableError
            shape[dim] //= keys
            shape = shape[1:] if op == "deal" else shape
        elif op in ("chunk", "split", "sizes"):
            shape[arguments[0]] = sum(other[arguments[0]] for other in shapes)
        elif op == "transpose" and not arguments[2]:
            a, b = arguments[:2]
            shape[a], shape[b] = shape[b], shape[a]
    return tuple(shape)
