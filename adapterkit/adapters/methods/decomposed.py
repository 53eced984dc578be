"""Methods whose delta is a function of all of W: OSF, DEFT, PEANuT, FRoD."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from adapterkit.adapters.change import ALONE, LowRank, RowMap, matrix, raw
from adapterkit.adapters.method import Context, Edit, Method, Module
from adapterkit.adapters.methods.common import (
    at,
    check_rank,
    check_shape,
    dims,
    edit,
    matrix_of,
    oriented,
    shared,
    take,
    weight_of,
)
from adapterkit.errors import AdapterError

if TYPE_CHECKING:
    from adapterkit.adapters.change import Kernel, Weights
    from adapterkit.adapters.config import AdapterConfig

_LOW = ("osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low")


def _osf(module: Module, context: Context) -> Iterator[Edit]:
    u, s, v = take(module, context, *_LOW)
    rows, count = dims(u, 2, _LOW[0], module, context)
    columns = dims(v, 2, _LOW[2], module, context)[1]
    check_shape(s, (count,), _LOW[1], module, context)
    check_shape(v, (count, columns), _LOW[2], module, context)
    target = oriented(module, context, (rows, columns))
    if count > min(rows, columns):
        check_shape(s, (min(rows, columns),), _LOW[1], module, context)

    def load(weights: Weights) -> Kernel:
        import torch

        from adapterkit.ops.decomposed import low_part

        # Training started from the decomposition in the base's dtype, and the delta is the difference to that.
        u0, s0, v0 = (part.to(weights.dtype.torch).float() for part in low_part(weights.whole(), count))
        left = torch.cat((matrix(u) * matrix(s), u0 * -s0), dim=1)
        return LowRank(left, torch.cat((matrix(v), v0)), 1.0)

    yield edit(target, f"osf low={count}", load, (u, s, v), 3 * rows * columns, ALONE)


def _deft(module: Module, context: Context) -> Iterator[Edit]:
    (p,) = take(module, context, "deft_P")
    rows, rank = dims(p, 2, "deft_P", module, context)
    columns = matrix_of(module, context)[1]
    target = oriented(module, context, (rows, columns))
    kind = context.config.choice("decomposition_method", ("relu", "qr"), "relu")
    injected = () if context.config.flag("para") else take(module, context, "deft_R")
    for tensor in injected:
        check_shape(tensor, (rank, columns), "deft_R", module, context)
    alpha = context.config.get("alpha")
    scale = context.config.number("alpha") / rank if alpha else 1.0

    def load(weights: Weights) -> Kernel:
        import torch

        from adapterkit.ops.decomposed import projection

        left, right = projection(matrix(p).double(), kind)
        removed = torch.zeros(rank, columns, dtype=torch.float64)
        for start, w in weights.blocks():
            removed += right[start : start + len(w)].T @ w.double()
        added = scale * matrix(injected[0]).double() if injected else 0.0
        return LowRank(left.float(), (added - removed).float(), 1.0)

    yield edit(target, f"deft r={rank}", load, (p, *injected), rank * (rows + columns))


def _peanut_keys(depth: int) -> tuple[str, ...]:
    return tuple(f"peanut_{side}.{k}.weight" for side in ("encoders", "decoders") for k in range(depth))


_DEEPEST = 16


def _peanut(module: Module, context: Context) -> Iterator[Edit]:
    config = context.config
    depth = int(config.number("depth", 0))
    a, b = take(module, context, "peanut_A.weight", "peanut_B.weight")
    inner = take(module, context, *_peanut_keys(depth))
    rank, rows = dims(a, 2, "peanut_A.weight", module, context)
    check_shape(b, (rows, rank), "peanut_B.weight", module, context)
    check_rank(rank, module, context)
    for name, tensor in zip(_peanut_keys(depth), inner, strict=True):
        check_shape(tensor, (rank, rank), name, module, context)
    target = weight_of(module, context)
    target = oriented(module, context, (rows, target.matrix[1]))
    activation = str(config.get("act_fn", "relu"))
    scale = config.number("scaling", 1.0)

    def load(weights: Weights) -> Kernel:
        import torch

        from adapterkit.ops.decomposed import ACTIVATIONS, peanut

        if activation not in ACTIVATIONS:
            raise AdapterError(
                f"{config.where}: 'act_fn' is {activation!r}; known are {', '.join(ACTIVATIONS)}", "update adapterkit"
            )
        first = matrix(a).double()
        through = torch.zeros(rank, weights.shape[1], dtype=torch.float64)
        for start, w in weights.blocks():
            through += first[:, start : start + len(w)] @ w.double()
        layers = [matrix(tensor).double() for tensor in inner]
        hidden = peanut(through.T, layers[:depth], layers[depth:], activation)
        return LowRank(matrix(b), hidden.T.float().contiguous(), scale)

    yield edit(target, f"peanut r={rank}", load, (a, b, *inner), rank * sum(target.matrix))


_FROD_SHARED = ("frod_V", "frod_s_indices", "frod_s_size")
_FROD_LOST = (
    "save it again with save_projection=True, or merge it with the PEFT that trained it: "
    "V is made from the weights of all adapted layers"
)


def frod_category(path: str) -> str:
    """Under which name a module's V is stored (PEFT 0.21): its last two names, or the last after a number."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def _frod(module: Module, context: Context) -> Iterator[Edit]:
    diagonal, values = take(module, context, "frod_lambda_l", "frod_lambda_s_values")
    category = frod_category(module.path)
    v, indices, size = (shared(context, f"{name}.{category}", _FROD_LOST) for name in _FROD_SHARED)
    (columns,) = dims(diagonal, 1, "frod_lambda_l", module, context)
    check_shape(v, (columns, columns), "frod_V", module, context)
    check_shape(indices, (2, values.numel), "frod_s_indices", module, context)
    target = oriented(module, context, (matrix_of(module, context)[0], columns))

    def load(weights: Weights) -> Kernel:
        import torch

        from adapterkit.ops.decomposed import frod_basis

        across = matrix(v)
        inner = torch.diag(matrix(diagonal).double())
        inner.index_put_(tuple(raw(indices).long()), matrix(values).double(), accumulate=True)
        basis = frod_basis(weights.whole(), across)
        right = (inner @ across.double().T).float()
        return RowMap(lambda w, here: basis[at(here)] @ right)

    held = 3 * target.matrix[0] * columns + 4 * columns * columns
    yield edit(target, "frod", load, (diagonal, values, v, indices, size), held)


def _refuse_frod(config: AdapterConfig, residual_base: bool) -> tuple[str, str] | None:
    if config.get("save_projection", True):
        return None
    return "its shared basis was not saved", _FROD_LOST


METHODS = (
    Method(
        peft_type="OSF",
        title="OSF",
        formula="W' = W - U_low S_low V_low of W + the trained U S V",
        source="arXiv:2504.07097",
        suffixes=_LOW,
        edits=_osf,
        fields=frozenset({"effective_rank", "rank_pattern", "target_svd_config"}),
        low_rank=True,
    ),
    Method(
        peft_type="DEFT",
        title="DEFT",
        formula="W' = W + P (s R - relu(P)^T W), or Q (s R - Q^T W) with P = Q R'",
        source="PEFT 0.21, tuners/deft",
        suffixes=("deft_P", "deft_R"),
        edits=_deft,
        fields=frozenset(
            {"r", "decomposition_method", "init_scale", "alpha", "para", "fan_in_fan_out", "deft_dropout"}
        ),
        low_rank=True,
    ),
    Method(
        peft_type="PEANUT",
        title="PEANuT",
        formula="W' = W + scaling B f(A W), f a small network",
        source="arXiv:2410.01870",
        suffixes=("peanut_A.weight", "peanut_B.weight", *_peanut_keys(_DEEPEST)),
        edits=_peanut,
        fields=frozenset({"r", "depth", "act_fn", "scaling"}),
        low_rank=True,
    ),
    Method(
        peft_type="FROD",
        title="FRoD",
        formula="W' = U (diag(l) + S) V^T, U = W V^-T at column length 1",
        source="doi:10.1609/aaai.v40i31.39813",
        suffixes=("frod_lambda_l", "frod_lambda_s_values"),
        shared=_FROD_SHARED,
        edits=_frod,
        fields=frozenset(
            [
                "projection_prng_key",
                "save_projection",
                "frod_dropout",
                "fan_in_fan_out",
                "sparse_rate",
                "regularization_alpha",
                "progressbar",
                "runtime_offload_base_weight",
            ]
        ),
        refuse=_refuse_frod,
        notes="needs the saved V: made anew it would need the weights of all adapted layers at once",
    ),
)
