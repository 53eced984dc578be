"""VeRA and PVeRA: two random matrices for the whole model, two trained vectors per module.

W' = W + (b[:, None] * B) (d[:, None] * A) (arXiv:2310.11454), with the rows of B and columns of A that the module
needs. PVeRA (probabilistic) has a mean and a variance; what is merged is the mean, the first half of d and A.
Files may leave the matrices out (``save_projection: false``); they are made anew from the seed then. Their size is the
largest of all adapted modules, since they were drawn before they were cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.adapters.change import LowRank, matrix
from adapterkit.adapters.method import GIVE_BASE, Context, Edit, Method, Module
from adapterkit.adapters.methods.common import dims, edit, oriented, weight_of
from adapterkit.adapters.methods.common import shared as shared_tensor
from adapterkit.adapters.orientation import is_turned
from adapterkit.errors import AdapterError, TargetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from adapterkit.adapters.change import Kernel, Weights
    from adapterkit.checkpoint.tensor import Tensor

LOST = "save the adapter again with save_projection=True"


@dataclass(frozen=True)
class _Kind:
    """What tells VeRA and PVeRA apart: key names, and how many halves d and A have."""

    name: str
    halves: int

    def edits(self, module: Module, context: Context) -> Iterable[Edit]:
        return _edits(self, module, context)


VERA = _Kind("vera", 1)
PVERA = _Kind("pvera", 2)


def _edits(kind: _Kind, module: Module, context: Context) -> Iterator[Edit]:
    b_name, d_name = f"{kind.name}_lambda_b", f"{kind.name}_lambda_d"
    scale_b, scale_d = (module.tensor(name, context.where) for name in (b_name, d_name))
    (rows,) = dims(scale_b, 1, b_name, module, context)
    (size,) = dims(scale_d, 1, d_name, module, context)
    rank = size // kind.halves
    said = context.config.get("r")
    if size != rank * kind.halves or rank != said:
        raise AdapterError(
            f"{context.where}: '{module.path}.{d_name}' has {size} entries for rank {said}",
            "restore the config that was saved with the weights",
        )
    columns = _columns(module, context, rows)
    target = oriented(module, context, (rows, columns))
    matrices, read = _matrices(kind, context, rank, (rows, columns), module)

    def load(weights: Weights) -> Kernel:
        a, b = matrices()
        left = matrix(scale_b)[:, None] * b[:rows, :rank]
        return LowRank(left, matrix(scale_d)[:rank, None] * a[:rank, :columns], 1.0)

    yield edit(target, f"{kind.name} r={rank}", load, (scale_b, scale_d, *read), rank * (rows + columns))


def _columns(module: Module, context: Context, rows: int) -> int:
    """The module's input size: the file says the output size, the base says both."""
    target = weight_of(module, context)
    first, second = target.matrix
    return first if second == rows and is_turned(context, target, (rows, first)) else second


def _matrices(
    kind: _Kind, context: Context, rank: int, shape: tuple[int, int], module: Module
) -> tuple[Callable[[], tuple[torch.Tensor, torch.Tensor]], tuple[Tensor, ...]]:
    """A function that gives A and B, and the tensors it reads."""
    if not context.config.get("save_projection", True) and f"{kind.name}_A" not in context.shared:
        seed = context.config.get("projection_prng_key", 0)
        if type(seed) is not int:
            raise AdapterError(f"{context.config.where}: 'projection_prng_key' is {seed!r}, not a whole number", LOST)
        height, width = _largest(kind, context)

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            from adapterkit.ops.projections import uniform_pair

            return uniform_pair(seed, (rank * kind.halves, width), (height, rank))

        return make, ()
    a, b = (shared_tensor(context, f"{kind.name}_{side}", LOST) for side in "AB")
    fits = len(a.shape) == len(b.shape) == 2 and a.shape[0] >= rank * kind.halves and b.shape[1] >= rank
    if not fits or b.shape[0] < shape[0] or a.shape[1] < shape[1]:
        raise TargetError(
            f"{context.where}: {kind.name}_A {list(a.shape)} and {kind.name}_B {list(b.shape)} are too small for "
            f"{module.path}, {shape[0]} x {shape[1]}",
            GIVE_BASE,
        )
    return (lambda: (matrix(a), matrix(b))), (a, b)


def _largest(kind: _Kind, context: Context) -> tuple[int, int]:
    """The largest output and input size of all adapted modules."""
    height = width = 0
    for other in context.siblings:
        rows = other.tensor(f"{kind.name}_lambda_b", context.where).numel
        height, width = max(height, rows), max(width, _columns(other, context, rows))
    return height, width


_FIELDS = frozenset({"r", "projection_prng_key", "save_projection", "d_initial", "fan_in_fan_out"})

METHODS = (
    Method(
        peft_type="VERA",
        title="VeRA",
        formula="W' = W + (b * B)(d * A), A and B shared",
        source="arXiv:2310.11454",
        suffixes=("vera_lambda_b", "vera_lambda_d"),
        shared=("vera_A", "vera_B"),
        edits=VERA.edits,
        fields=_FIELDS | {"vera_dropout"},
        low_rank=True,
        notes="without saved A and B they are drawn again from projection_prng_key",
    ),
    Method(
        peft_type="PVERA",
        title="PVeRA (its mean)",
        formula="W' = W + (b * B)(d[:r] * A[:r]), A and B shared",
        source="arXiv:2512.07703",
        suffixes=("pvera_lambda_b", "pvera_lambda_d"),
        shared=("pvera_A", "pvera_B"),
        edits=PVERA.edits,
        fields=_FIELDS | {"pvera_dropout", "sample_at_inference", "generator_seed"},
        low_rank=True,
        notes="the sampling at inference (sample_at_inference) is not part of a merged weight",
    ),
)
