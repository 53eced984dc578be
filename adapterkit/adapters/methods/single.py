"""Modules of single files of LyCORIS and kohya's sd-scripts that PEFT has no form for.

Each module has one algorithm, told by its tensors, and perhaps differences of its bias or norm beside it; a file may mix
them. What LyCORIS computes in training is what is merged here (LyCORIS 4.1.3, ``modules/``): its own merge of LoHa and LoKr
multiplies by alpha/r twice. OFT and BOFT act on the outputs, where PEFT's act on the inputs, and (IA)^3 stores l - 1
and leaves the bias alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from adapterkit.adapters.change import AFTER, LowRank, RowMap, matrix, raw
from adapterkit.adapters.method import GIVE_BASE, Context, Edit, Method, Module
from adapterkit.adapters.methods.common import at, bias_of, check_shape, dims, edit, oriented, take, weight_of
from adapterkit.adapters.methods.lycoris import loha_edits, lokr_edits
from adapterkit.adapters.methods.sparse import Entries
from adapterkit.errors import AdapterError, TargetError

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.change import Kernel, Weights
    from adapterkit.adapters.target import Target
    from adapterkit.checkpoint.tensor import Tensor

DORA = "dora_scale"
# Differences of whole parameters, and of which.
DIFFERENCES = {
    "lycoris_diff": "weight",
    "lycoris_w_norm": "weight",
    "lycoris_diff_b": "bias",
    "lycoris_b_norm": "bias",
}
INDICES, VALUES, SIZE = (
    "lycoris_bias_indices",
    "lycoris_bias_values",
    "lycoris_bias_size",
)  # of an extraction's remainder
UP, DOWN, MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"
BLOCKS, RESCALE = "lycoris_oft_blocks", "lycoris_rescale"
IA3 = "lycoris_ia3.weight"
GLORA = tuple(f"lycoris_{name}.weight" for name in ("a1", "a2", "b1", "b2", "bm"))


@dataclass(frozen=True)
class Algorithm:
    """One algorithm of LyCORIS.

    Attributes:
        title: as people call it.
        tensors: those it owns.
        edits: makes the edit of them.
        decomposed: whether it may have DoRA's norms.
    """

    title: str
    tensors: tuple[str, ...]
    edits: Callable[[Module, Context], Iterator[Edit]]
    decomposed: bool = False


def algorithms(module: Module) -> tuple[str, ...]:
    """What a module holds, in a word each."""
    names = module.tensors.keys()
    words = [one.title for one in ALGORITHMS if not names.isdisjoint(one.tensors)]
    if BLOCKS in names and len(module.tensors[BLOCKS].shape) == 4:
        words = ["boft"]
    words += ["tucker"] if not names.isdisjoint((MID, "hada_t1", "lokr_t2")) else []
    words += ["dora"] if DORA in names else []
    return (*words, *(["differences"] if not names.isdisjoint(DIFFERENCES) else []))


def _single(module: Module, context: Context) -> Iterator[Edit]:
    """The edits of one module, whatever it holds."""
    changes = [name for name in module.tensors if DIFFERENCES.get(name) == "weight"]
    found = [one for one in ALGORITHMS if not module.tensors.keys().isdisjoint(one.tensors)]
    if len(found) + len(changes) > 1:
        raise AdapterError(
            f"{context.where}: {module.path} mixes algorithms ({', '.join(module.tensors)})",
            "its weight can have one of them; save it again",
        )
    used = {name for one in found for name in (*one.tensors, *([DORA] if one.decomposed else []))}
    alone = next((name for name in module.tensors if name not in used and name not in DIFFERENCES), None)
    if alone is not None:
        raise AdapterError(
            f"{context.where}: '{module.path}.{alone}' stands without what it belongs to", "save the adapter again"
        )
    for name, leaf in DIFFERENCES.items():
        if name in module.tensors:
            yield _difference(module, context, name, leaf)
    for one in found:
        inner = replace(module, tensors={name: module.tensors[name] for name in one.tensors if name in module.tensors})
        for made in one.edits(inner, context):
            yield _normed(made, module, context) if DORA in module.tensors else made


def _difference(module: Module, context: Context, name: str, leaf: str) -> Edit:
    """W' = W + difference, read row by row."""
    (tensor,) = take(module, context, name)
    target = _whole_of(module, context) if leaf == "weight" else bias_of(module, context)
    if target is None:
        raise TargetError(
            f"{context.where}: {module.path} has no bias in the base, and '{module.path}.{name}' adds to it",
            "give the base it was trained on",
        )
    check_shape(tensor, target.shape, name, module, context)
    columns = target.matrix[1]

    def add(w: torch.Tensor, rows: range) -> torch.Tensor:
        from adapterkit.adapters.change import finite

        part = tensor.read(rows.start * columns, (rows[-1] + 1) * columns).view(-1, columns)
        return w + finite(part[:: rows.step].float(), tensor)

    return edit(target, "difference", lambda weights: RowMap(add), (tensor,), 1)


def _whole_of(module: Module, context: Context) -> Target:
    """The parameter that a difference is of: a module's weight, a norm's scale, or what the path names itself."""
    for name in (f"{module.path}.weight", f"{module.path}.scale", module.path):
        if context.names.find(name) is not None:
            return context.target(name, name)
    return weight_of(module, context)


def _normed(made: Edit, module: Module, context: Context) -> Edit:
    """DoRA on top of any product: ``dora_scale`` is ``[out, 1, ...]`` or, with ``wd_on_out=False``, ``[1, in, ...]``."""
    (scale,) = take(module, context, DORA)
    rows, columns = made.target.matrix
    group = prod(made.target.shape[2:])
    of_inputs = scale.shape != (rows, *scale.shape[1:]) or scale.numel != rows
    if of_inputs and (scale.shape[:1] != (1,) or scale.numel * group != columns):
        check_shape(scale, (rows, *[1] * (len(scale.shape) - 1)), DORA, module, context)

    def load(weights: Weights) -> Kernel:
        from adapterkit.adapters.methods.normed import Normed, column_norms

        added, lengths = made.change.load(weights), matrix(scale).flatten()
        if not of_inputs:
            return Normed(added, None, lengths, None, weights.dtype)
        norms = column_norms(weights, added, group).clamp(min=1e-7)  # an input that is never used stays 0
        return Normed(added, None, lengths.repeat_interleave(group), norms, weights.dtype)

    change = replace(
        made.change,
        how=f"dora on {made.change.how}",
        load=load,
        reads=made.change.reads + scale.nbytes,
        memory=made.change.memory + 8 * (columns if of_inputs else rows),
        composes=AFTER,  # ComfyUI and LyCORIS bring what is there already to the norm
    )
    return replace(made, change=change)


def _lora(module: Module, context: Context) -> Iterator[Edit]:
    """up x down, with a Tucker core between them (arXiv:2309.14859, LoCon) where there is one.

    LyCORIS's extraction may keep the largest entries of what these leave out, as ``[2, n]`` places in 16 bits and values.
    """
    up, down = take(module, context, UP, DOWN)
    mid = module.tensors.get(MID)
    rank, rows = down.shape[0], up.shape[0]
    core = 1
    if mid is not None:
        if len(mid.shape) < 3 or mid.shape[:2] != (rank, rank) or down.numel != rank * down.shape[1]:
            check_shape(mid, (rank, rank, *mid.shape[2:]), MID, module, context)
            check_shape(down, (rank, down.shape[1], *[1] * (len(down.shape) - 2)), DOWN, module, context)
            dims(mid, 4, MID, module, context)
        core = prod(mid.shape[2:])
    if up.numel != rows * rank:
        check_shape(up, (rows, rank, *[1] * (len(up.shape) - 2)), UP, module, context)
    columns = down.numel // rank * core
    target = oriented(module, context, (rows, columns))
    scale = context.config.scaling(module.path, rank, "alpha")

    rest = take(module, context, INDICES, VALUES) if INDICES in module.tensors or VALUES in module.tensors else ()
    if rest:
        check_shape(rest[0], (2, rest[1].numel), INDICES, module, context)

    def load(weights: Weights) -> Kernel:
        from adapterkit.ops.products import conv_factors

        left, right = matrix(up).view(rows, rank), matrix(down).view(rank, -1)
        if mid is not None:
            left, right = conv_factors(left.T, right, matrix(mid))
        added = LowRank(left, right, scale)
        if not rest:
            return added
        places = raw(rest[0]).long() & 0xFFFF  # written as signed numbers, also beyond those
        key = f"{context.where}: '{module.path}.{INDICES}'"
        entries = Entries(places[0], places[1], scale * matrix(rest[1]), (rows, columns), key)
        return RowMap(lambda w, here: entries.add(added.new(w, here), here))

    used = (up, down, *(() if mid is None else (mid,)), *rest)
    held = rank * (rows + columns) + (5 * rest[1].numel if rest else 0)
    yield edit(target, f"lora r={rank}{' and entries' if rest else ''}", load, used, held)


def _turned(module: Module, context: Context) -> Iterator[Edit]:
    """OFT ``[blocks, b, b]`` and BOFT ``[factors, blocks, b, b]``, of the outputs."""
    (blocks,) = take(module, context, BLOCKS)
    rescale = module.tensors.get(RESCALE)
    target = weight_of(module, context)
    rows, columns = target.matrix
    butterfly = len(blocks.shape) == 4
    *_, count, size, other = blocks.shape if butterfly else dims(blocks, 3, BLOCKS, module, context)
    factors = blocks.shape[0] if butterfly else 1
    if count * size != rows or size != other or (butterfly and (size % 2 or count % 2 ** (factors - 1))):
        raise TargetError(
            f"{context.where}: '{module.path}.oft_blocks' {list(blocks.shape)} does not make a rotation of the {rows} outputs "
            f"of {target.parameter}",
            GIVE_BASE,
        )
    if rescale is not None and rescale.numel != rows:
        check_shape(rescale, (rows, *[1] * (len(rescale.shape) - 1)), RESCALE, module, context)
    limit = _alpha(module, context, 0.0) * rows

    def load(weights: Weights) -> Kernel:
        from adapterkit.ops import rotations as ops

        free = matrix(blocks).double()
        q = ops.within(free - free.mT, limit) if limit > 0 else free - free.mT
        r = ops.cayley(-q.view(-1, size, size)).view(q.shape)
        lengths = None if rescale is None else matrix(rescale).view(-1, 1)
        if butterfly:
            whole = _woven(weights, r)
            return RowMap(lambda w, here: _scaled(whole[at(here)], lengths, here))
        import torch

        moved = (r - torch.eye(size, dtype=r.dtype)).float()
        return RowMap(lambda w, here: _scaled(w + _of_blocks(weights, moved, here), lengths, here))

    used = (blocks,) if rescale is None else (blocks, rescale)
    words = f"boft {factors}x{count}x{size}" if butterfly else f"oft {count}x{size}"
    yield edit(
        target, words, load, used, blocks.numel + (2 * rows * columns if butterfly else 2 * size * columns), AFTER
    )


def _of_blocks(weights: Weights, r: torch.Tensor, here: range) -> torch.Tensor:
    """Rows of ``blockdiag(r)^T W``: each needs all rows of its block."""
    import torch

    size = r.shape[-1]
    parts = []
    for block in range(here.start // size, here[-1] // size + 1):
        first = block * size
        mine = [row - first for row in here if first <= row < first + size]
        if mine:
            parts.append(r[block][:, mine].T @ weights.read(first, first + size))
    return torch.cat(parts)


def _woven(weights: Weights, r: torch.Tensor) -> torch.Tensor:
    """``M_f ... M_1 W`` of BOFT: every row needs all of W, so it is made once, in float64, some columns at a time."""
    import torch

    from adapterkit.ops import rotations as ops

    rows, columns = weights.shape
    w = weights.whole()
    out = torch.empty_like(w)
    step = max(1, (1 << 20) // rows)
    for start in range(0, columns, step):
        here = slice(start, min(start + step, columns))
        out[:, here] = ops.woven(w[:, here].double(), r).float()
    return out


def _scaled(w: torch.Tensor, lengths: torch.Tensor | None, here: range) -> torch.Tensor:
    return w if lengths is None else w * lengths[at(here)]


def _ia3(module: Module, context: Context) -> Iterator[Edit]:
    """W' = W * (1 + l) over the inputs or the outputs."""
    (vector,) = take(module, context, IA3)
    target = weight_of(module, context)
    rows, columns = target.matrix
    inputs = bool(context.config.mapping("on_input").get(module.path))
    group = prod(target.shape[2:])
    wanted = columns // group if inputs else rows
    if vector.numel != wanted:
        check_shape(vector, (wanted,), IA3, module, context)

    def load(weights: Weights) -> Kernel:
        scale = 1 + matrix(vector).flatten()
        if not inputs:
            return RowMap(lambda w, here: w * scale[at(here), None])
        wide = scale.repeat_interleave(group)
        return RowMap(lambda w, here: w * wide)

    yield edit(target, "ia3", load, (vector,), vector.numel * group, AFTER)


def _glora(module: Module, context: Context) -> Iterator[Edit]:
    """W' = W + s (W a1 a2 + b1 b2); older files have the factors of each pair in the other order."""
    used = take(module, context, *GLORA[:4])
    mid = module.tensors.get(GLORA[4])
    target = weight_of(module, context)
    rows, columns = target.matrix
    inputs = columns // prod(target.shape[2:])
    a1, a2, b1, b2 = used
    wide = inputs if mid is not None else columns
    if not _fits((a1, a2, b1, b2), inputs, rows, wide):
        a1, a2, b1, b2 = a2, a1, b2, b1
    if not _fits((a1, a2, b1, b2), inputs, rows, wide):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in used)
        raise TargetError(
            f"{context.where}: a1, a2, b1 and b2 of {module.path} ({shapes}) do not fit {target.parameter} "
            f"{list(target.shape)}",
            GIVE_BASE,
        )
    rank = a2.shape[0]
    if mid is not None and (mid.shape[:2] != (rank, rank) or prod(mid.shape[2:]) * inputs != columns):
        check_shape(mid, (rank, rank, *target.shape[2:]), GLORA[4], module, context)
    scale = _alpha(module, context, rank) / rank

    def load(weights: Weights) -> Kernel:
        from adapterkit.ops.products import conv_factors, times_inputs

        # In float64: the two products may cancel each other, and most of W.
        first, second, left, right = (matrix(tensor).flatten(1).double() for tensor in (a1, a2, b1, b2))
        if mid is not None:
            left, right = conv_factors(left.T, right, matrix(mid).double())

        def new_rows(w: torch.Tensor, here: range) -> torch.Tensor:
            wide = w.double()
            return (wide + scale * (times_inputs(wide, first, second) + left[at(here)] @ right)).float()

        return RowMap(new_rows)

    tensors = used if mid is None else (*used, mid)
    yield edit(target, f"glora r={rank}", load, tensors, 2 * rank * (2 * inputs + rows + columns))


def _fits(factors: tuple[Tensor, ...], inputs: int, rows: int, wide: int) -> bool:
    """Whether these are ``[in, r], [r, in], [out, r], [r, in...]``, trailing dimensions apart."""
    a1, a2, b1, b2 = factors
    rank = a2.shape[0]
    wanted = ((inputs, rank), (rank, inputs), (rows, rank), (rank, wide))
    return all(
        (tensor.shape[0], tensor.numel // tensor.shape[0]) == shape
        for tensor, shape in zip((a1, a2, b1, b2), wanted, strict=True)
    )


def _alpha(module: Module, context: Context, default: float) -> float:
    """The module's own ``alpha``; ``default`` where it has none, or 0."""
    return float(context.config.mapping("alpha_pattern").get(module.path) or default)


ALGORITHMS = (
    Algorithm("lora", (UP, DOWN, MID, INDICES, VALUES, SIZE), _lora, decomposed=True),
    Algorithm(
        "loha",
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        loha_edits,
        decomposed=True,
    ),
    Algorithm(
        "lokr",
        ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        lokr_edits,
        decomposed=True,
    ),
    Algorithm("oft", (BLOCKS, RESCALE), _turned),
    Algorithm("ia3", (IA3,), _ia3),
    Algorithm("glora", GLORA, _glora),
)

METHODS = (
    Method(
        peft_type="LYCORIS",
        title="LyCORIS: Tucker LoRA, DoRA over inputs and on LoHa and LoKr, full, norms, Diag-OFT, BOFT, (IA)^3, GLoRA",
        formula=(
            "W' = W + s up core down, or W + D, or R^T W, or W * (1 + l), or W + s (W a1 a2 + b1 b2); "
            "rows or inputs brought to norm m"
        ),
        source="arXiv:2309.14859, 2306.07280, 2311.06243, 2306.07967, LyCORIS 4.1.3",
        suffixes=(DORA, *DIFFERENCES, *(name for one in ALGORITHMS for name in one.tensors)),
        edits=_single,
        fields=frozenset({"r", "alpha", "rank_pattern", "alpha_pattern", "on_input"}),
        only_in_files=True,
        notes=(
            "from single files only; LyCORIS's own merge scales LoHa and LoKr by alpha/r twice, its training once, "
            "which is followed here"
        ),
    ),
)
