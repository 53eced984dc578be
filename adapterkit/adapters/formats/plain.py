"""Bake: any adapter as plain LoRA with one rank and one alpha, which every server and converter reads alike.

LoRA's own variants of scaling (rsLoRA, rank and alpha patterns) are folded into the factors. Everything else is computed
against its base: low-rank changes keep their factors, the others become the singular value decomposition of W' - W, cut at
a rank or at a share of its energy, and the error is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterkit.adapters.edits import adapter_edits, check_config, group_modules
from adapterkit.adapters.formats.kohya import FLAT, unflattened
from adapterkit.adapters.merged import StoredWeights
from adapterkit.adapters.methods import lora
from adapterkit.adapters.names import Names
from adapterkit.errors import UnsupportedAdapter, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.change import Kernel
    from adapterkit.adapters.method import Module
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Tensor

NEGLIGIBLE = 1e-6  # singular values below this part of the largest are float32 noise of the subtraction


@dataclass(frozen=True)
class Factors:
    """The delta of one module, ``scale * b @ a``, in PEFT's shapes.

    Attributes:
        path: of the module.
        rank, scale: of the product.
        load: gives A and B: ``[r, in]`` and ``[out, r]``, for an embedding ``[r, V]`` and ``[d, r]``; any dtype.
        embedding: the module is one.
        turned: the module stores its weight ``[in, out]``.
        stored: A and B as they lie in the file, when they are not changed.
        error: ``||delta - scale b a|| / ||delta||`` (Frobenius).
    """

    path: str
    rank: int
    scale: float
    load: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    embedding: bool = False
    turned: bool = False
    stored: tuple[Tensor, Tensor] | None = None
    error: float = 0.0


def bake(
    adapter: Adapter, base: Checkpoint | None = None, *, rank: int | None = None, energy: float | None = None
) -> tuple[list[Factors], dict[str, Tensor]]:
    """Plain factors of every module, and the whole parameters that come along.

    Args:
        adapter: any that can be merged.
        base: what it was trained on; needed unless it is LoRA with nothing but scalings.
        rank: of the decomposition where one is made; full by default.
        energy: or the share of ``||delta||^2`` to keep.

    Raises:
        UsageError: a base is needed, or both limits are given.
        UnsupportedAdapter: it changes what plain LoRA cannot hold.
    """
    if (rank is not None and rank < 1) or (energy is not None and not 0 < energy <= 1) or (rank and energy):
        raise UsageError("a rank of at least 1, or a share of energy up to 1, is expected", "give one of the two")
    adapter = resolved(adapter, base)
    method = check_config(adapter)
    modules, whole = group_modules(adapter, method)
    if method.peft_type == "LORA" and all(_is_plain(module, adapter) for module in modules):
        return [_scaled(module, adapter) for module in modules], whole
    if base is None:
        raise UsageError(
            f"{adapter.ref} is {method.title.split(',')[0]} with more than scalings, which is computed against its base",
            "name the base with --base",
        )
    return _computed(adapter, base, rank, energy), whole


def resolved(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """The adapter with module paths that need no base.

    Raises:
        UsageError: its paths are flat, and no base is given.
        TargetError: see `unflattened`.
    """
    if not adapter.config.get(FLAT):
        return adapter
    if base is None:
        raise UsageError(f"{adapter.ref} names modules without dots, which only a base can tell", "name it with --base")
    return unflattened(adapter, Names(base.shapes, base.config))


def _is_plain(module: Module, adapter: Adapter) -> bool:
    """Whether a LoRA module is factors and a scaling, nothing else."""
    config = adapter.config
    pairs = ({lora.A, lora.B}, {lora.EMBEDDING_A, lora.EMBEDDING_B})
    mutated = str(config.get("init_lora_weights", "")).lower() in ("pissa", "olora")
    special = mutated or any(
        config.get(name) for name in ("use_dora", "use_bdlora", "use_qalora", "kasa_config", "use_mora")
    )
    names = set(module.tensors) - {"base_layer.weight", "base_layer.bias"}
    matrices = all(len(module.tensors[name].shape) == 2 for name in names)
    return names in pairs and matrices and module.depth == 0 and not special and not config.get("target_parameters")


def _scaled(module: Module, adapter: Adapter) -> Factors:
    embedding = lora.EMBEDDING_A in module.tensors
    names = (lora.EMBEDDING_A, lora.EMBEDDING_B) if embedding else (lora.A, lora.B)
    a, b = (module.tensors[name] for name in names)

    def load() -> tuple[torch.Tensor, torch.Tensor]:
        from adapterkit.adapters.change import raw

        return raw(a), raw(b)

    scale = adapter.config.scaling(module.path, a.shape[0])
    return Factors(module.path, a.shape[0], scale, load, embedding, adapter.config.flag("fan_in_fan_out"), (a, b))


def _computed(adapter: Adapter, base: Checkpoint, rank: int | None, energy: float | None) -> list[Factors]:
    names = Names(base.shapes, base.config)
    found = []
    for edit in adapter_edits(adapter, names, base.config):
        target = edit.target
        if edit.change.replaced is not None:
            continue
        if not target.parameter.endswith(".weight") or len(target.shape) != 2:
            raise UnsupportedAdapter(
                f"{adapter.ref} changes {target.parameter} {list(target.shape)}, which plain LoRA has no place for",
                "merge it into its base instead",
            )
        weights = StoredWeights(target, base.tensors)
        kernel = edit.change.load(weights)
        path = target.parameter.removesuffix(".weight")
        turned = any(piece.transposed for piece in target.pieces)
        embedding = target.parameter in _embeddings(names)
        a, b, error = _low_rank(kernel, weights, rank, energy)
        if embedding:
            a, b = b.T.contiguous(), a.T.contiguous()
        pair = (a, b)
        found.append(Factors(path, a.shape[0], 1.0, lambda pair=pair: pair, embedding, turned, None, error))  # type: ignore[misc]
    return found


def _embeddings(names: Names) -> frozenset[str]:
    from adapterkit.adapters.formats.mlx import EMBEDDINGS

    return frozenset(
        name for name in names.parameters() if name.split(".")[-2:-1] and name.split(".")[-2] in EMBEDDINGS
    )


def _low_rank(
    kernel: Kernel, weights: StoredWeights, rank: int | None, energy: float | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A ``[r, in]``, B ``[out, r]`` and the relative error."""
    import torch

    rows, columns = weights.shape
    parts = kernel.parts(range(rows))
    if parts is not None and rank is None and energy is None:
        found = list(parts)
        if len(found) == 1 and found[0][2].shape[0] <= min(rows, columns):
            _, left, right, scale = found[0]
            return right.contiguous(), (left * scale).contiguous(), 0.0
    w = weights.whole()
    delta = kernel.new(w, range(rows)).double() - w.double()
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    kept = int((s > NEGLIGIBLE * s[0]).sum()) if float(s[0]) > 0 else 0
    if energy is not None and kept:
        share = s.square().cumsum(0) / s.square().sum()
        kept = min(kept, int((share < energy - 1e-12).sum()) + 1)
    kept = max(1, kept if rank is None else min(rank, kept))
    root = s[:kept].sqrt()
    a, b = (root[:, None] * v[:kept]).float(), (u[:, :kept] * root).float()
    total = float(delta.norm())
    error = float((delta - b.double() @ a.double()).norm()) / total if total else 0.0
    return a.contiguous(), b.contiguous(), error
