"""AdaLoRA (arXiv:2303.10512): W' = W + alpha/(init_r + 1e-5) * B (E * A), triples of a pruned singular value decomposition.

PEFT divides by the number of triples it started with, plus 1e-5, also after it has pruned some; so does this. ``lora_alpha``
of zero or less stands for that number.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from adapterkit.adapters.change import LowRank, matrix
from adapterkit.adapters.method import Context, Edit, Method, Module
from adapterkit.adapters.methods.common import check_shape, dims, edit, oriented
from adapterkit.adapters.methods.lora import METHODS as LORA

if TYPE_CHECKING:
    from adapterkit.adapters.change import Kernel, Weights

A, B, E = "lora_A", "lora_B", "lora_E"


def _edits(module: Module, context: Context) -> Iterator[Edit]:
    a, b, e = (module.tensor(name, context.where) for name in (A, B, E))
    rank, columns = dims(a, 2, A, module, context)
    rows, _ = dims(b, 2, B, module, context)
    check_shape(b, (rows, rank), B, module, context)
    check_shape(e, (rank, 1), E, module, context)
    target = oriented(module, context, (rows, columns))
    start = context.config.number("init_r", 12)
    alpha = context.config.number("lora_alpha", 8)
    scale = (alpha if alpha > 0 else float(start)) / (start + 1e-5)
    if rank == 0:
        return  # every triple was pruned

    def load(weights: Weights) -> Kernel:
        left, inner, right = (matrix(one, weights.dtype) for one in (b, e, a))
        return LowRank(left, inner * right, scale)

    yield edit(target, f"adalora r={rank}", load, (a, b, e))


METHODS = (
    Method(
        peft_type="ADALORA",
        title="AdaLoRA",
        formula="W' = W + alpha/(init_r + 1e-5) B (E * A)",
        source="arXiv:2303.10512",
        suffixes=(A, B, E),
        ignored=("ranknum",),
        edits=_edits,
        fields=LORA[0].fields
        | {"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"},
        low_rank=True,
        notes="PEFT divides by init_r also after pruning; pruned triples are not in the file",
    ),
)
