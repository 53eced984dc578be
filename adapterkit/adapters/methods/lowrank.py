"""Methods with a low-rank pair that is used in another way than LoRA's: HiRA, DeLoRA, GLoRA, RandLoRA, VB-LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import TYPE_CHECKING

from adapterkit.adapters.change import LowRank, RowMap, matrix, raw
from adapterkit.adapters.method import Context, Edit, Method, Module
from adapterkit.adapters.methods.common import (
    at,
    bias_of,
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
from adapterkit.adapters.methods.vera import LOST
from adapterkit.errors import AdapterError, TargetError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from adapterkit.adapters.change import Kernel, Weights
    from adapterkit.adapters.config import AdapterConfig
    from adapterkit.checkpoint.tensor import Tensor


def _hira(module: Module, context: Context) -> Iterator[Edit]:
    embedding = "hira_embedding_A" in module.tensors
    a_name, b_name = ("hira_embedding_A", "hira_embedding_B") if embedding else ("hira_A", "hira_B")
    a, b = take(module, context, a_name, b_name)
    rank, rows, columns = a.shape[0], b.shape[0], a.numel // a.shape[0]
    if b.numel != rows * rank:
        raise AdapterError(f"{context.where}: the factors of {module.path} do not fit", "save the adapter again")
    # No check of the rank: PEFT 0.21 writes rank_pattern and trains without it, and the formula does not ask.
    target = oriented(module, context, (columns, rows) if embedding else (rows, columns))

    def load(weights: Weights) -> Kernel:
        right, left = matrix(a).view(rank, -1), matrix(b).view(-1, rank)
        if embedding:
            left, right = right.T.contiguous(), left.T.contiguous()
        return RowMap(lambda w, here: w.addcmul(w, left[at(here)] @ right))

    yield edit(target, f"hira r={rank}", load, (a, b))


def _delora(module: Module, context: Context) -> Iterator[Edit]:
    a, b, strength, norms = take(module, context, "delora_A", "delora_B", "delora_lambda", "delora_w_norm")
    rank, columns = dims(a, 2, "delora_A", module, context)
    rows = dims(b, 2, "delora_B", module, context)[0]
    check_shape(b, (rows, rank), "delora_B", module, context)
    check_shape(norms, (columns,), "delora_w_norm", module, context)
    check_shape(strength, (1,), "delora_lambda", module, context)
    check_rank(rank, module, context)
    target = oriented(module, context, (rows, columns))

    def load(weights: Weights) -> Kernel:
        from adapterkit.ops.products import delora_diagonal

        right, left = matrix(a), matrix(b)
        diagonal = delora_diagonal(right.double(), left.double(), matrix(strength).double()).float()
        return LowRank(left * diagonal, right * matrix(norms), 1.0)

    yield edit(target, f"delora r={rank}", load, (a, b, strength, norms))


_PATHS = ("A", "B", "C", "D", "E")
_GLORA_KEYS = tuple(f"glora_{path}.{part}" for path in _PATHS for part in ("Xd", "Xu", "X"))


class _Paths:
    """GLoRA's five terms: each a low-rank pair, a vector, a number, or nothing."""

    def __init__(self, module: Module) -> None:
        self.tensors = module.tensors

    def used(self, paths: str) -> list[Tensor]:
        return [self.tensors[key] for key in _GLORA_KEYS if key in self.tensors and key[6] in paths]

    def rows(self, path: str) -> Callable[[slice], torch.Tensor] | None:
        """Rows of the term as something that broadcasts against ``[rows, columns]``; None when there is no term."""
        if f"glora_{path}.X" in self.tensors:
            value = matrix(self.tensors[f"glora_{path}.X"])
            return lambda where: value if value.numel() == 1 else value.view(-1, 1)[where]
        if f"glora_{path}.Xd" in self.tensors and f"glora_{path}.Xu" in self.tensors:
            left, right = (matrix(self.tensors[f"glora_{path}.{part}"]) for part in ("Xd", "Xu"))
            return lambda where: left[where] @ right
        return None


def _glora(module: Module, context: Context) -> Iterator[Edit]:
    paths = _Paths(module)
    target = weight_of(module, context)
    rows, columns = target.matrix
    for path in _PATHS:
        height, width = (columns, 1) if path == "C" else (rows, 1) if path in "DE" else (rows, columns)
        rank = int(context.config.number("r", 8))
        for part, shape in (("Xd", (height, rank)), ("Xu", (rank, width))):
            if f"glora_{path}.{part}" in module.tensors:
                check_shape(module.tensors[f"glora_{path}.{part}"], shape, f"glora_{path}.{part}", module, context)
        vector = module.tensors.get(f"glora_{path}.X")
        if vector is not None and vector.shape not in ((1,), (height,), (height, 1)):
            check_shape(vector, (height,), f"glora_{path}.X", module, context)

    def load(weights: Weights) -> Kernel:
        times, plus = paths.rows("A"), paths.rows("B")

        def new(w: torch.Tensor, here: range) -> torch.Tensor:
            out = w if times is None else w + w * times(at(here))
            return out.clone() if plus is None else out + plus(at(here))

        return RowMap(new)

    if paths.used("AB"):
        yield edit(target, "glora", load, paths.used("AB"))
    bias = bias_of(module, context) if paths.used("CDE") else None
    if bias is None:
        if paths.used("CDE"):
            raise TargetError(
                f"{context.where}: {module.path} has no bias in the base", "give the base it was trained on"
            )
        return

    def load_bias(weights: Weights) -> Kernel:
        import torch

        inputs, times, plus = (paths.rows(path) for path in "CDE")
        added = torch.zeros(rows, 1)
        if inputs is not None:
            # W C, of the unmerged W, read block by block.
            through = inputs(slice(None)).expand(columns, 1).contiguous()
            added = torch.cat([w @ through for _, w in weights.other(target).blocks()])

        def new(b: torch.Tensor, here: range) -> torch.Tensor:
            out = b + added[at(here)]
            out = out if times is None else out + b * times(at(here))
            return out if plus is None else out + plus(at(here))

        return RowMap(new)

    yield edit(bias, "glora", load_bias, paths.used("CDE"), rows)


def _randlora(module: Module, context: Context) -> Iterator[Edit]:
    lam, gamma = take(module, context, "randlora_lambda", "randlora_gamma")
    rank, bases = dims(lam, 2, "randlora_lambda", module, context)
    small = dims(gamma, 2, "randlora_gamma", module, context)[1]
    check_shape(gamma, (bases, small), "randlora_gamma", module, context)
    check_rank(rank, module, context)
    target = oriented(module, context, matrix_of(module, context))
    shape = target.matrix
    if min(shape) != small or -(-small // rank) != bases:
        check_shape(gamma, (-(-min(shape) // rank), min(shape)), "randlora_gamma", module, context)
    scale = context.config.number("randlora_alpha", 640) / rank
    matrices, read = _random_bases(context, rank)

    def load(weights: Weights) -> Kernel:
        from adapterkit.ops.projections import randlora

        a, b = matrices()
        left, right = randlora(a, b, matrix(lam), matrix(gamma), shape)
        return LowRank(left, right, scale)

    yield edit(target, f"randlora r={rank}", load, (lam, gamma, *read), 2 * bases * rank * sum(shape))


def _random_bases(
    context: Context, rank: int
) -> tuple[Callable[[], tuple[torch.Tensor, torch.Tensor]], tuple[Tensor, ...]]:
    config = context.config
    if config.get("save_projection", True) or "randlora_A" in context.shared:
        a, b = (shared(context, f"randlora_{side}", LOST) for side in "AB")
        return (lambda: (matrix(a), matrix(b))), (a, b)
    height = width = 0
    for other in context.siblings:
        rows, columns = matrix_of(other, context)
        height, width = max(height, rows), max(width, columns)
    low, high = min(height, width), max(height, width)
    sparsity = sqrt(low) if config.flag("very_sparse") else 3.0
    seed = int(config.number("projection_prng_key", 0))

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        from adapterkit.ops.projections import sparse_pair

        return sparse_pair(seed, (rank, 1, low), (high, -(-low // rank), rank), sparsity)

    return make, ()


def _refuse_randlora(config: AdapterConfig, residual_base: bool) -> tuple[str, str] | None:
    if config.get("save_projection", True) or config.flag("sparse") or config.flag("very_sparse"):
        return None
    return (
        "its random bases were not saved, and PEFT draws them in bfloat16 or float16, whichever the training machine had",
        LOST,
    )


_LOGITS = tuple(f"vblora_logits_{side}{kind}" for side in "AB" for kind in ("", "_topk_indices", "_topk_weights"))


def _vblora(module: Module, context: Context) -> Iterator[Edit]:
    bank = shared(context, "vblora_vector_bank", "save the adapter again")
    vectors, length = bank.shape
    count = int(context.config.number("topk", 2))
    used: list[Tensor] = []
    sides: list[Callable[[], torch.Tensor]] = []
    shapes = []
    for side in "AB":
        name = f"vblora_logits_{side}"
        if name in module.tensors:
            (logits,) = take(module, context, name)
            first, second, _ = dims(logits, 3, name, module, context)
            check_shape(logits, (first, second, vectors), name, module, context)
            used.append(logits)
            sides.append(_mixed(logits, bank, count))
        else:
            indices = module.tensor(f"{name}_topk_indices", context.where)
            weights = module.tensor(f"{name}_topk_weights", context.where)
            first, second, _ = dims(indices, 3, f"{name}_topk_indices", module, context)
            check_shape(weights, (first, second, indices.shape[2] - 1), f"{name}_topk_weights", module, context)
            used += [indices, weights]
            sides.append(_picked(indices, weights, bank))
        shapes.append((first, second))
    (rank, wide), (high, same) = shapes
    target = oriented(module, context, (high * length, wide * length))
    check_rank(rank, module, context)
    if same != rank:
        raise AdapterError(
            f"{context.where}: the two sides of {module.path} have ranks {rank} and {same}", "save it again"
        )

    def load(weights: Weights) -> Kernel:
        a, b = (side() for side in sides)
        return LowRank(b.transpose(1, 2).reshape(-1, rank), a.reshape(rank, -1), 1.0)

    yield edit(target, f"vblora r={rank}", load, (*used, bank), rank * length * (wide + high))


def _mixed(logits: Tensor, bank: Tensor, count: int) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        from adapterkit.ops.projections import from_bank, top_mixture

        return from_bank(*top_mixture(matrix(logits), count), matrix(bank))

    return make


def _picked(indices: Tensor, weights: Tensor, bank: Tensor) -> Callable[[], torch.Tensor]:
    def make() -> torch.Tensor:
        import torch

        from adapterkit.ops.projections import from_bank

        stored = matrix(weights)
        mix = torch.cat((stored, 1 - stored.sum(-1, keepdim=True)), dim=-1)  # the last weight is what is left of 1
        return from_bank(mix, raw(indices).long(), matrix(bank))

    return make


METHODS = (
    Method(
        peft_type="HIRA",
        title="HiRA",
        formula="W' = W * (1 + B A)",
        source="ICLR 2025, openreview TwJrTz9cRS",
        suffixes=("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
        edits=_hira,
        fields=frozenset({"r", "hira_dropout", "fan_in_fan_out", "rank_pattern"}),
    ),
    Method(
        peft_type="DELORA",
        title="DeLoRA",
        formula="W' = W + B diag(lambda / (r |A_k| |B_k|)) A * |W|_columns",
        source="arXiv:2503.18225",
        suffixes=("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
        edits=_delora,
        fields=frozenset({"r", "delora_lambda", "module_dropout", "rank_pattern", "lambda_pattern"}),
        low_rank=True,
        notes="the column norms are those of the training base, from the file",
    ),
    Method(
        peft_type="GLORA",
        title="GLoRA",
        formula="W' = W + W * A + B, b' = b + b * D + E + W C",
        source="arXiv:2306.07967",
        suffixes=_GLORA_KEYS,
        ignored=tuple(f"glora_{path}.zeros" for path in _PATHS),
        edits=_glora,
        fields=frozenset({"r", "config_A_B", "config_C", "config_D_E"}),
    ),
    Method(
        peft_type="RANDLORA",
        title="RandLoRA",
        formula="W' = W + alpha/r B (A * lambda * gamma), A and B shared",
        source="arXiv:2502.00987",
        suffixes=("randlora_lambda", "randlora_gamma"),
        shared=("randlora_A", "randlora_B"),
        ignored=("randlora_A", "randlora_B"),
        edits=_randlora,
        fields=frozenset(
            [
                "r",
                "projection_prng_key",
                "save_projection",
                "sparse",
                "very_sparse",
                "randlora_dropout",
                "fan_in_fan_out",
                "randlora_alpha",
            ]
        ),
        refuse=_refuse_randlora,
        low_rank=True,
        notes="unsaved dense bases are refused: their values depend on the hardware they were drawn on",
    ),
    Method(
        peft_type="VBLORA",
        title="VB-LoRA",
        formula="W' = W + B A, rows mixed from a shared bank of vectors",
        source="arXiv:2405.15179",
        suffixes=_LOGITS,
        shared=("vblora_vector_bank",),
        edits=_vblora,
        fields=frozenset(
            [
                "r",
                "num_vectors",
                "vector_length",
                "topk",
                "save_only_topk_weights",
                "vblora_dropout",
                "fan_in_fan_out",
                "init_vector_bank_bound",
                "init_logits_std",
            ]
        ),
        low_rank=True,
    ),
)
