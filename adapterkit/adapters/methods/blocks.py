"""Methods whose delta is made of blocks: MiSS (and Bone, its former name), C3A, GraLoRA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from adapterkit.adapters.change import AFTER, SUM, LowRank, RowMap, StackedLowRank, matrix
from adapterkit.adapters.method import Context, Edit, Method, Module
from adapterkit.adapters.methods.common import check_rank, check_shape, dims, edit, oriented, take, weight_of
from adapterkit.errors import AdapterError

if TYPE_CHECKING:
    from adapterkit.adapters.change import Kernel, Weights


def _miss(module: Module, context: Context) -> Iterator[Edit]:
    name = "miss_block" if "miss_block" in module.tensors else "bone_block"
    (block,) = take(module, context, name)
    variant = context.config.choice("init_weights", (True, False, "bat", "mini"), True)
    target = weight_of(module, context)
    rows, columns = target.matrix
    if variant == "bat":
        count, rank, _ = dims(block, 3, name, module, context)
        check_shape(block, (rows // rank, rank, rank), name, module, context)
        target = oriented(module, context, (count * rank, columns // rank * rank))
    else:
        rank, width = dims(block, 2, name, module, context)
        check_shape(block, (rank, width if variant == "mini" and rows % width == 0 else rows), name, module, context)
        target = oriented(module, context, (rows, columns))

    check_rank(rank, module, context)

    def load(weights: Weights) -> Kernel:
        import torch

        from adapterkit.ops.products import bat_rows

        values = matrix(block)
        if variant == "bat":
            return RowMap(lambda w, here: bat_rows(w, values, here))
        # Column c of the delta is row c mod r of the block: a product with copies of the identity.
        copies = torch.eye(rank).repeat(1, -(-columns // rank))[:, :columns]
        return LowRank(values.T.repeat(rows // values.shape[1], 1), copies, 1.0)

    yield edit(target, f"miss r={rank}", load, (block,), rank * (rows + columns), AFTER if variant == "bat" else SUM)


def _c3a(module: Module, context: Context) -> Iterator[Edit]:
    (kernel,) = take(module, context, "c3a_kernel")
    high, wide, size = dims(kernel, 3, "c3a_kernel", module, context)
    target = oriented(module, context, (high * size, wide * size))

    def load(weights: Weights) -> Kernel:
        import torch

        from adapterkit.ops.products import circulant_rows

        values = matrix(kernel) / (wide * size)
        return RowMap(lambda w, here: w + circulant_rows(values, torch.arange(here.start, here.stop, here.step)))

    yield edit(target, f"c3a b={size}", load, (kernel,))


GENERAL = ("gralora_A_general.weight", "gralora_B_general.weight")


def _gralora(module: Module, context: Context) -> Iterator[Edit]:
    a, b = take(module, context, "gralora_A", "gralora_B")
    count, width, rank = dims(a, 3, "gralora_A", module, context)
    height = dims(b, 3, "gralora_B", module, context)[2]
    check_shape(b, (count, rank, height), "gralora_B", module, context)
    check_rank(rank, module, context)
    if rank % count:
        raise AdapterError(
            f"{context.where}: {module.path} has rank {rank} for {count} parts", "save the adapter again"
        )
    target = oriented(module, context, (count * height, count * width))
    hybrid = int(context.config.number("hybrid_r", 0))
    general = take(module, context, *GENERAL) if hybrid else ()
    if general:
        check_shape(general[0], (hybrid, count * width), GENERAL[0], module, context)
        check_shape(general[1], (count * height, hybrid), GENERAL[1], module, context)
    scale = context.config.number("alpha", 64) / (rank + hybrid)

    def load(weights: Weights) -> Kernel:
        import torch

        from adapterkit.ops.products import gralora

        left, right = gralora(matrix(a), matrix(b))
        if general:
            lower, upper = (matrix(tensor) for tensor in general)
            left = torch.cat((left, upper.view(count, height, hybrid)), dim=2)
            right = torch.cat((right, lower.expand(count, -1, -1)), dim=1)
        return StackedLowRank(left, right, scale)

    held = (rank + hybrid) * count * (height + count * width)
    yield edit(target, f"gralora r={rank} k={count}", load, (a, b, *general), held)


_MISS_FIELDS = frozenset({"r", "miss_dropout", "mini_r"})

METHODS = (
    Method(
        peft_type="MISS",
        title="MiSS",
        formula="W' = W + tile(B^T); bat: blocks W + W B + B",
        source="arXiv:2409.15371",
        suffixes=("miss_block",),
        edits=_miss,
        fields=_MISS_FIELDS,
    ),
    Method(
        peft_type="BONE",
        title="Bone",
        formula="as MiSS, its later name",
        source="arXiv:2409.15371",
        suffixes=("bone_block",),
        edits=_miss,
        fields=_MISS_FIELDS,
        notes="PEFT since 0.19 cannot load it",
    ),
    Method(
        peft_type="C3A",
        title="C3A",
        formula="W' = W + circulant blocks / in",
        source="arXiv:2407.19342",
        suffixes=("c3a_kernel",),
        edits=_c3a,
        fields=frozenset({"block_size", "block_size_pattern"}),
    ),
    Method(
        peft_type="GRALORA",
        title="GraLoRA",
        formula="W' = W + s (blocks (A_n[:, q] B_q[n])^T + B A), s = alpha/(r + hybrid_r)",
        source="arXiv:2505.20355",
        suffixes=("gralora_A", "gralora_B", *GENERAL),
        edits=_gralora,
        fields=frozenset({"r", "hybrid_r", "alpha", "gralora_dropout", "gralora_k", "fan_in_fan_out"}),
        low_rank=True,
    ),
)
