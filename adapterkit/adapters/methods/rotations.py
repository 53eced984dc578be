"""Methods that turn W: OFT, BOFT, HRA (the input side) and RoAd (pairs of rows)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from adapterkit.adapters.change import AFTER, BEFORE, RowMap, matrix
from adapterkit.adapters.method import Context, Edit, Method, Module
from adapterkit.adapters.methods.common import (
    at,
    bias_of,
    check_rank,
    check_shape,
    dims,
    edit,
    oriented,
    take,
    weight_of,
)
from adapterkit.errors import AdapterError, TargetError, UnsupportedAdapter

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.change import Composition, Kernel, Weights
    from adapterkit.adapters.target import Target

OFT, OFT_EMBEDDING, OFT_OLD = "oft_R.weight", "oft_embedding_R.weight", "oft_r"


def _oft(module: Module, context: Context) -> Iterator[Edit]:
    if OFT_OLD in module.tensors:
        raise UnsupportedAdapter(
            f"{context.where}: {module.path} has OFT blocks as PEFT saved them before 0.16, which meant another rotation",
            "merge it with the PEFT that trained it, or train it again",
        )
    name = OFT_EMBEDDING if OFT_EMBEDDING in module.tensors else OFT
    (vectors,) = take(module, context, name)
    config = context.config
    blocks, entries = dims(vectors, 2, name, module, context)
    size = (1 + math.isqrt(1 + 8 * entries)) // 2
    target = weight_of(module, context)
    columns = target.matrix[1]
    if prod(target.shape[2:]) > 1:
        raise UnsupportedAdapter(
            f"{context.where}: {module.path} is a convolution of {list(target.shape[2:])}, and PEFT's OFT sums overlapping "
            "patches before it, which no weight of that size can stand for",
            "train the convolution with BOFT, HRA or LoRA",
        )
    shared = config.flag("block_share")
    fits = blocks == 1 and columns % size == 0 if shared else blocks * size == columns
    if not fits or size * (size - 1) // 2 != entries:
        raise TargetError(
            f"{context.where}: '{module.path}.{name}' {list(vectors.shape)} makes blocks of {size}, which do not tile the "
            f"{columns} columns of {target.parameter}",
            "give the base and the config that it was trained with",
        )
    series, halved = config.flag("use_cayley_neumann"), config.peft_minor >= (0, 18)
    terms = int(config.number("num_cayley_neumann_terms", 5))
    limit = config.number("eps", 6e-5) if config.flag("coft") else None

    def load(weights: Weights) -> Kernel:
        from adapterkit.ops import rotations as ops

        q = ops.skew(matrix(vectors).double(), size)
        if limit is not None:
            q = ops.constrained(q, limit)
        turn = ops.cayley_neumann(q, terms, halved) if series else ops.cayley(q)
        turn = (turn if name == OFT_EMBEDDING else turn.mT).float().contiguous()
        return RowMap(lambda w, rows: ops.times_blocks(w, turn))

    # Inputs are turned by the first adapter first, and so is what an embedding gives out.
    composes: Composition = AFTER if name == OFT_EMBEDDING else BEFORE
    yield edit(target, f"oft {blocks}x{size}", load, (vectors,), blocks * size * size, composes)


def _boft(module: Module, context: Context) -> Iterator[Edit]:
    blocks, scale = take(module, context, "boft_R", "boft_s")
    factors, count, size, other = dims(blocks, 4, "boft_R", module, context)
    target = oriented(module, context, (scale.numel, count * size))
    check_shape(blocks, (factors, count, size, size), "boft_R", module, context)
    del other
    # PEFT trains a single factor where its CUDA extension is missing, whatever the config says.
    said = context.config.number("boft_n_butterfly_factor", 1)
    if factors not in (1, said):
        raise AdapterError(
            f"{context.config.where}: '{module.path}.boft_R' has {factors} butterfly factors and the config {said}",
            "restore the config that was saved with the weights",
        )
    if factors > 1 and (size % 2 or count % 2 ** (factors - 1)):
        raise AdapterError(
            f"{context.where}: '{module.path}.boft_R' has {count} blocks of {size}, which cannot make a butterfly of "
            f"{factors} factors",
            "save the adapter again",
        )

    def load(weights: Weights) -> Kernel:
        from adapterkit.ops import rotations as ops

        free = matrix(blocks).double()
        turns = ops.cayley(0.5 * (free - free.mT).flatten(0, 1)).view(free.shape).float()
        orders = None
        if factors > 1:
            orders = [ops.butterfly_order(count * size, count >> index, size // 2) for index in range(factors)]
        lengths = matrix(scale).view(-1, 1)
        return RowMap(lambda w, rows: ops.times_butterfly(w, turns, orders) * lengths[at(rows)])

    yield edit(target, f"boft {factors}x{count}x{size}", load, (blocks, scale), composes=AFTER)


def _hra(module: Module, context: Context) -> Iterator[Edit]:
    (vectors,) = take(module, context, "hra_u")
    columns, rank = dims(vectors, 2, "hra_u", module, context)
    check_rank(rank, module, context)
    target = weight_of(module, context)
    target = oriented(module, context, (target.matrix[0], columns))
    schmidt = context.config.flag("apply_GS")

    def load(weights: Weights) -> Kernel:
        from adapterkit.ops import rotations as ops

        u = matrix(vectors).double()
        u = ops.orthonormal(u) if schmidt else u / u.norm(dim=0)
        unit = u.float()
        return RowMap(lambda w, rows: ops.reflect(w, unit))

    yield edit(target, f"hra r={rank}", load, (vectors,), composes=AFTER)


_VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}


def _road(module: Module, context: Context) -> Iterator[Edit]:
    theta, alpha = take(module, context, "road_theta", "road_alpha")
    variant = _VARIANTS[context.config.choice("variant", tuple(_VARIANTS), "road_1")]
    group = int(context.config.number("group_size", 64))
    target = weight_of(module, context)
    rows = target.matrix[0]
    for name, tensor in (("road_theta", theta), ("road_alpha", alpha)):
        check_shape(tensor, (rows * variant // 2,), name, module, context)
    if group < 2 or group % 2 or rows % group:
        raise TargetError(
            f"{context.where}: groups of {group} do not tile the {rows} rows of {target.parameter}",
            "restore the config",
        )

    def load(weights: Weights) -> Kernel:
        from adapterkit.ops import rotations as ops

        cos, sin, partner = ops.road(matrix(theta).double(), matrix(alpha).double(), variant, group)
        cos, sin = cos.float()[:, None], sin.float()[:, None]

        def rotated(w: torch.Tensor, rows: range) -> torch.Tensor:
            here = at(rows)
            low = rows[0] // group * group
            span = weights.read(low, (rows[-1] // group + 1) * group)
            return cos[here] * w + sin[here] * span[partner[here] - low]

        return RowMap(rotated)

    def turned(where: Target) -> Edit:
        return edit(where, f"road_{variant} g={group}", load, (theta, alpha), 4 * rows, AFTER)

    yield turned(target)
    bias = bias_of(module, context)
    if bias is not None:
        yield turned(bias)


METHODS = (
    Method(
        peft_type="OFT",
        title="OFT, COFT",
        formula="W' = W blockdiag(R)^T, R = I + 2Q + 2Q^2 + ... or (I - Q)(I + Q)^-1 (embeddings: W R)",
        source="arXiv:2306.07280, 2506.19847",
        suffixes=(OFT, OFT_EMBEDDING, OFT_OLD),
        edits=_oft,
        fields=frozenset(
            [
                "r",
                "oft_block_size",
                "module_dropout",
                "fan_in_fan_out",
                "coft",
                "eps",
                "block_share",
                "use_cayley_neumann",
                "num_cayley_neumann_terms",
            ]
        ),
        notes="the series and the exact form turn opposite ways, so the config decides; PEFT changed the series in 0.18 and "
        "merges older adapters by the new one: here each by its own; files of PEFT before 0.16 are refused; so are "
        "convolutions larger than 1x1: PEFT sums overlapping patches in front of them, and its own merge does not",
    ),
    Method(
        peft_type="BOFT",
        title="BOFT",
        formula="W' = s * W (M_f ... M_1)^T, M = P blockdiag(cayley(R)) P^T",
        source="arXiv:2311.06243",
        suffixes=("boft_R", "boft_s"),
        edits=_boft,
        fields=frozenset(
            [
                "boft_block_size",
                "boft_block_num",
                "boft_n_butterfly_factor",
                "boft_dropout",
                "fan_in_fan_out",
            ]
        ),
        notes="PEFT without its CUDA extension cannot load more than one butterfly factor; merged here on any machine",
    ),
    Method(
        peft_type="HRA",
        title="HRA",
        formula="W' = W prod_j (I - 2 u_j u_j^T)",
        source="arXiv:2405.17484",
        suffixes=("hra_u",),
        edits=_hra,
        fields=frozenset({"r", "apply_GS"}),
    ),
    Method(
        peft_type="ROAD",
        title="RoAd",
        formula="W' = R W, b' = R b, R rotates pairs of rows",
        source="arXiv:2409.00119",
        suffixes=("road_theta", "road_alpha"),
        edits=_road,
        fields=frozenset({"variant", "group_size"}),
        notes="PEFT rounds R to the base's dtype before it multiplies; R is float32 here",
    ),
)
