"""Methods that train vectors only: (IA)^3, LayerNorm tuning, BEFT."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from adapterkit.adapters.change import AFTER, LowRank, RowMap, matrix, replace
from adapterkit.adapters.method import GIVE_BASE, Context, Edit, Method, Module
from adapterkit.adapters.methods.common import at, bias_of, check_shape, edit, oriented, take, weight_of
from adapterkit.errors import TargetError

if TYPE_CHECKING:
    from adapterkit.adapters.change import Kernel, Weights

NORMS = ("ln_tuning_layers.weight", "ln_tuning_layers.bias")


def _ia3(module: Module, context: Context) -> Iterator[Edit]:
    (vector,) = take(module, context, "ia3_l")
    stored = weight_of(module, context)
    if len(stored.shape) > 2:
        inputs = _feeds_forward(module, context)
        groups = vector.numel // stored.shape[1] if inputs else 1
        rows, columns = stored.matrix
        wanted = groups * stored.shape[1] if inputs else rows
        if vector.numel != wanted or rows % groups:
            raise TargetError(
                f"{context.where}: '{module.path}.ia3_l' has {vector.numel} entries for a weight {list(stored.shape)}",
                GIVE_BASE,
            )
        target = stored
    else:
        # The side of length 1 says what is scaled: [out, 1] the outputs, [1, in] the inputs.
        groups, inputs = 1, len(vector.shape) == 2 and vector.shape[0] == 1 and vector.shape[1] != 1
        rows, columns = stored.matrix
        if (columns if inputs else rows) != vector.numel:
            rows, columns = columns, rows
        target = oriented(module, context, (rows, columns))
        check_shape(vector, (1, columns) if inputs else (rows, 1), "ia3_l", module, context)
    repeat = prod(stored.shape[2:])

    def load(weights: Weights) -> Kernel:
        import torch

        scale = matrix(vector).flatten()
        if not inputs:
            return RowMap(lambda w, here: w * scale[at(here), None])
        per_group = scale.view(groups, -1).repeat_interleave(repeat, dim=1)
        height = rows // groups
        return RowMap(lambda w, here: w * per_group[torch.arange(here.start, here.stop, here.step) // height])

    yield edit(target, "ia3", load, (vector,), vector.numel * repeat, AFTER)
    bias = None if inputs else bias_of(module, context)
    if bias is not None:
        yield edit(bias, "ia3", load, (vector,), composes=AFTER)


def _feeds_forward(module: Module, context: Context) -> bool:
    """Whether a convolution's inputs are scaled: its vector has one shape for both, so the config must tell."""
    named = context.config.get("feedforward_modules", [])
    if isinstance(named, str):
        return context.config.is_whole(named, module.path)
    return any(module.path.endswith(name) for name in context.config.names("feedforward_modules"))


def _norms(module: Module, context: Context) -> Iterator[Edit]:
    for name in NORMS:
        if name in module.tensors:
            tensor = module.tensors[name]
            key = f"{module.path}.{name}"
            target = context.target(f"{module.path}.{name.rpartition('.')[2]}", key)
            check_shape(tensor, target.shape, name, module, context)
            yield Edit(target, replace(tensor, "tuned"))


def _beft(module: Module, context: Context) -> Iterator[Edit]:
    (vector,) = take(module, context, "beft_bias")
    target = bias_of(module, context)
    if target is None:
        raise TargetError(
            f"{context.where}: {module.path} has no bias in the base, and BEFT adds to it",
            "give the base it was trained on; where that has none, PEFT cannot merge it either",
        )
    check_shape(vector, (1, target.matrix[0]), "beft_bias", module, context)

    def load(weights: Weights) -> Kernel:
        import torch

        return LowRank(matrix(vector).view(-1, 1), torch.ones(1, 1), 1.0)

    yield edit(target, "beft", load, (vector,))


METHODS = (
    Method(
        peft_type="IA3",
        title="(IA)^3",
        formula="W' = W * l, and b' = b * l when l scales the outputs",
        source="arXiv:2205.05638",
        suffixes=("ia3_l",),
        edits=_ia3,
        fields=frozenset({"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"}),
    ),
    Method(
        peft_type="LN_TUNING",
        title="LayerNorm tuning",
        formula="W' = the tuned tensor",
        source="arXiv:2312.11420",
        suffixes=NORMS,
        edits=_norms,
    ),
    Method(
        peft_type="BEFT",
        title="BEFT",
        formula="b' = b + d",
        source="arXiv:2509.15974",
        suffixes=("beft_bias",),
        edits=_beft,
    ),
)
