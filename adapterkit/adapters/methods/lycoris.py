"""LoHa and LoKr: products of low-rank pairs, elementwise and Kronecker (arXiv:2108.06098, arXiv:2309.14859)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from adapterkit.adapters.change import RowMap, matrix
from adapterkit.adapters.method import Context, Edit, Method, Module
from adapterkit.adapters.methods.common import at, dims, edit, oriented, take
from adapterkit.errors import AdapterError

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.change import Kernel, Weights
    from adapterkit.checkpoint.tensor import Tensor


def _pair(
    module: Module, context: Context, a_name: str, b_name: str, core: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two factors and their core, with shapes that fit each other."""
    a, b = take(module, context, a_name, b_name)
    t = module.tensors.get(core)
    dims(a, 2, a_name, module, context)
    dims(b, 2, b_name, module, context)
    rank = a.shape[0] if t is not None else a.shape[1]
    if b.shape[0] != rank or (t is not None and (len(t.shape) < 3 or t.shape[:2] != (rank, rank))):
        shapes = ", ".join(str(list(x.shape)) for x in (a, b, t) if x is not None)
        raise AdapterError(f"{context.where}: the factors of {module.path} do not fit ({shapes})", "save it again")
    return a, b, t


def _size(a: Tensor, b: Tensor, t: Tensor | None) -> tuple[int, int, int]:
    """Rows, columns and rank of what a pair stands for."""
    if t is None:
        return a.shape[0], b.shape[1], a.shape[1]
    return a.shape[1], b.shape[1] * (t.numel // a.shape[0] ** 2), a.shape[0]


def _factors(pair: tuple[Tensor, Tensor, Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
    from adapterkit.ops.products import conv_factors

    a, b, t = pair
    return conv_factors(matrix(a), matrix(b), None if t is None else matrix(t))


def loha_edits(module: Module, context: Context) -> Iterator[Edit]:
    """The edit of a module with two pairs of factors."""
    first = _pair(module, context, "hada_w1_a", "hada_w1_b", "hada_t1")
    second = _pair(module, context, "hada_w2_a", "hada_w2_b", "hada_t2")
    rows, columns, rank = _size(*first)
    if _size(*second) != (rows, columns, rank):
        raise AdapterError(f"{context.where}: the two pairs of {module.path} differ in size", "save the adapter again")
    target = oriented(module, context, (rows, columns))
    scale = context.config.scaling(module.path, rank, "alpha")

    def load(weights: Weights) -> Kernel:
        from adapterkit.ops.products import loha_rows

        one, two = _factors(first), _factors(second)
        return RowMap(lambda w, rows: w.add(loha_rows(one, two, at(rows)), alpha=scale))

    used = [tensor for tensor in (*first, *second) if tensor is not None]
    yield edit(target, f"loha r={rank}", load, used, 2 * rank * (rows + columns))


def lokr_edits(module: Module, context: Context) -> Iterator[Edit]:
    """The edit of a module with two factors of a Kronecker product, each whole or a pair."""
    used: list[Tensor] = []
    sizes: list[tuple[int, int]] = []
    sides: list[tuple[Tensor, Tensor, Tensor | None] | Tensor] = []
    rank = None
    for name in ("lokr_w1", "lokr_w2"):
        if name in module.tensors:
            (whole,) = take(module, context, name)
            used.append(whole)
            sides.append(whole)
            sizes.append((whole.shape[0], whole.numel // whole.shape[0]))
        else:
            pair = _pair(module, context, f"{name}_a", f"{name}_b", name.replace("w", "t"))
            used += [tensor for tensor in pair if tensor is not None]
            sides.append(pair)
            rows, columns, rank = _size(*pair)
            sizes.append((rows, columns))
    expected = (sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1])
    target = oriented(module, context, expected)
    known = int(context.config.patterned("r", "rank_pattern", module.path)) if rank is None else rank
    scale = context.config.scaling(module.path, known, "alpha")

    def load(weights: Weights) -> Kernel:
        import torch

        from adapterkit.ops.products import kron_conv1d, kron_rows

        one, two = (matrix(side) if not isinstance(side, tuple) else torch.mm(*_factors(side)) for side in sides)
        if two.ndim == 3 and context.config.peft_type == "LOKR":
            delta = scale * kron_conv1d(one, two)
            return RowMap(lambda w, rows: w + delta[at(rows)])
        one, two = one.flatten(1), scale * two.flatten(1)
        return RowMap(lambda w, rows: w + kron_rows(one, two, torch.arange(rows.start, rows.stop, rows.step)))

    yield edit(target, f"lokr {sizes[0][0]}x{sizes[0][1]}", load, used, sum(a * b for a, b in sizes))


_FIELDS = frozenset(
    {"r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout", "use_effective_conv2d"}
)

METHODS = (
    Method(
        peft_type="LOHA",
        title="LoHa",
        formula="W' = W + s (a1 b1) * (a2 b2), s = alpha/r",
        source="arXiv:2108.06098, 2309.14859",
        suffixes=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        edits=loha_edits,
        fields=_FIELDS,
    ),
    Method(
        peft_type="LOKR",
        title="LoKr",
        formula="W' = W + s kron(w1, w2), s = alpha/r",
        source="arXiv:2309.14859",
        suffixes=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
        edits=lokr_edits,
        fields=_FIELDS | {"decompose_both", "decompose_factor", "rank_dropout_scale"},
        notes="one-dimensional convolutions have PEFT's own layout here; those of a LyCORIS file have its own",
    ),
)
