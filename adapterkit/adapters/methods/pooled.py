"""Methods whose trained numbers are shared by modules: TinyLoRA, Uni-LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from adapterkit.adapters.change import LowRank, matrix, raw
from adapterkit.adapters.method import Context, Edit, Method, Module
from adapterkit.adapters.methods.common import check_rank, check_shape, dims, edit, oriented, shared, take
from adapterkit.errors import AdapterError

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.change import Kernel, Weights
    from adapterkit.adapters.config import AdapterConfig
    from adapterkit.checkpoint.tensor import Tensor

_TINY_LOST = "save it again with save_projection=True"


def _tiny(module: Module, context: Context) -> Iterator[Edit]:
    a, b, p = take(module, context, "tinylora_A", "tinylora_B", "tinylora_P")
    rank, columns = dims(a, 2, "tinylora_A", module, context)
    rows = dims(b, 2, "tinylora_B", module, context)[0]
    check_shape(b, (rows, rank), "tinylora_B", module, context)
    count = dims(p, 3, "tinylora_P", module, context)[0]
    check_shape(p, (count, rank, rank), "tinylora_P", module, context)
    target = oriented(module, context, (rows, columns))
    layers = len(context.siblings)
    groups = max(1, round(layers * (1.0 - context.config.number("weight_tying", 0.0))))
    vectors = [shared(context, f"tinylora_v.{k}", "save the adapter again") for k in range(_used(layers, groups))]
    for vector in vectors:
        check_shape(vector, (count,), "tinylora_v", module, context)
    seed = int(context.config.number("projection_seed", 42))
    key = f"{context.where}: '{module.path}.tinylora_P'"

    def load(weights: Weights) -> Kernel:
        import torch

        mixing = matrix(p)
        layer = 0 if groups == 1 else _layer(mixing, seed, layers, key)
        vector = vectors[min(layer // max(1, layers // groups), groups - 1)]
        inner = torch.einsum("i,ijk->jk", matrix(vector).double(), mixing.double())
        return LowRank((matrix(b).double() @ inner).float(), matrix(a), 1.0)

    yield edit(target, f"tinylora r={rank}", load, (a, b, p, *vectors))


def _used(layers: int, groups: int) -> int:
    """How many of the groups have a member, as PEFT deals them out."""
    return min((layers - 1) // max(1, layers // groups), groups - 1) + 1


def _layer(mixing: torch.Tensor, seed: int, layers: int, key: str) -> int:
    """Which of the adapted modules this is, counted as the model registers them: the file does not say, but its random
    matrices were drawn from ``seed + number``, so they tell.

    Raises:
        AdapterError: no number gives these matrices.
    """
    import torch

    from adapterkit.ops.projections import tiny_projection

    for number in range(layers):
        drawn = tiny_projection(seed + number, mixing.shape[0], mixing.shape[1])
        if torch.allclose(drawn, mixing, rtol=1e-2, atol=1e-3):
            return number
    raise AdapterError(
        f"{key} was not drawn from projection_seed {seed}, so it is unknown which trained vector belongs to it",
        "restore the config that was saved with the weights",
    )


def _refuse_tiny(config: AdapterConfig, residual_base: bool) -> tuple[str, str] | None:
    if config.get("save_projection", True):
        return None
    return (
        "its random matrices were not saved, and they depend on the order in which the model registers modules",
        _TINY_LOST,
    )


_UNI = tuple(f"unilora_{kind}_{side}" for kind in ("indices", "scales") for side in "AB")


def _uni(module: Module, context: Context) -> Iterator[Edit]:
    indices_a, indices_b, scales_a, scales_b = take(module, context, *_UNI)
    theta = shared(context, "unilora_theta_d", "save the adapter again")
    rank, columns = dims(indices_a, 2, _UNI[0], module, context)
    rows = dims(indices_b, 2, _UNI[1], module, context)[0]
    check_shape(indices_b, (rows, rank), _UNI[1], module, context)
    check_rank(rank, module, context)
    check_shape(scales_a, (rank, columns), _UNI[2], module, context)
    check_shape(scales_b, (rows, rank), _UNI[3], module, context)
    target = oriented(module, context, (rows, columns))

    def factor(indices: Tensor, scales: Tensor) -> torch.Tensor:
        return matrix(theta)[raw(indices).long()] * matrix(scales)

    def load(weights: Weights) -> Kernel:
        return LowRank(factor(indices_b, scales_b), factor(indices_a, scales_a), 1.0)

    yield edit(target, f"unilora r={rank}", load, (indices_a, indices_b, scales_a, scales_b, theta))


def _refuse_uni(config: AdapterConfig, residual_base: bool) -> tuple[str, str] | None:
    if config.get("save_indices", False):
        return None
    return (
        "its indices were not saved, and they depend on the order in which the model registers modules",
        "load it with PEFT, set save_indices=True in its config and save it again",
    )


METHODS = (
    Method(
        peft_type="TINYLORA",
        title="TinyLoRA",
        formula="W' = W + B (sum_i v_i P_i) A, v shared",
        source="arXiv:2602.04118",
        suffixes=("tinylora_A", "tinylora_B", "tinylora_P"),
        shared=("tinylora_v",),
        edits=_tiny,
        fields=frozenset(
            [
                "r",
                "u",
                "weight_tying",
                "projection_seed",
                "save_projection",
                "init_v_bound",
                "tinylora_dropout",
                "fan_in_fan_out",
            ]
        ),
        refuse=_refuse_tiny,
        low_rank=True,
        notes="which v belongs to a module is found by the seed of its saved P; without saved P it is refused",
    ),
    Method(
        peft_type="UNILORA",
        title="Uni-LoRA",
        formula="W' = W + B A, entries of A and B picked from one vector",
        source="arXiv:2506.00799",
        suffixes=_UNI,
        shared=("unilora_theta_d",),
        edits=_uni,
        fields=frozenset(
            [
                "r",
                "proj_seed",
                "theta_d_length",
                "unilora_dropout",
                "fan_in_fan_out",
                "init_theta_d_bound",
                "save_indices",
            ]
        ),
        refuse=_refuse_uni,
        low_rank=True,
        notes="without saved indices it is refused: they depend on the model's module order",
    ),
)
