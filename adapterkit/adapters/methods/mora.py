"""MoRA (arXiv:2405.12130): adapters of the authors' fork of PEFT, which call themselves LORA and say ``use_mora``."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import TYPE_CHECKING

from adapterkit.adapters.change import LowRank, RowMap, matrix
from adapterkit.adapters.method import Context, Edit, Module
from adapterkit.adapters.methods.common import check_shape, dims, edit, take, weight_of

if TYPE_CHECKING:
    from adapterkit.adapters.change import Kernel, Weights

A = "lora_A.weight"


def mora_edits(module: Module, context: Context) -> Iterator[Edit]:
    """The edit of one module; its ``lora_B`` is the same square matrix once more, or nothing."""
    (square,) = take(module, context, A)
    kind = context.config.choice("mora_type", (1, 2, 3, 4, 6), 1)
    target = weight_of(module, context)
    rows, columns = target.matrix
    rank = dims(square, 2, A, module, context)[0]
    expected = int(sqrt((rows + columns) * context.config.number("r")) + 0.5)
    expected = expected // 2 * 2 if kind == 6 else expected
    check_shape(square, (expected, expected), A, module, context)

    def load(weights: Weights) -> Kernel:
        import torch

        from adapterkit.ops import mora as ops

        values = matrix(square)
        if kind == 6:
            blocks = ops.turned_blocks(values.double(), -(-columns // rank)).float()
            shape = (rows, columns)
            return RowMap(
                lambda w, here: w + ops.rotary_rows(blocks, shape, torch.arange(here.start, here.stop, here.step))
            )
        out = torch.arange(rows) % rank if kind in (1, 3) else ops.grouped(rank, rows)
        return LowRank(values[out], ops.compressed(rank, columns, kind in (1, 4)), 1.0)

    yield edit(target, f"mora r={rank}", load, (square,), rank * (rows + columns))
