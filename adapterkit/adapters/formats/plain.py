"""LoRA that is factors and scalings and nothing else: rsLoRA, rank and alpha patterns can be folded into its factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.adapters.edits import check_config, group_modules, settle
from adapterkit.adapters.methods import lora
from adapterkit.adapters.names import Names
from adapterkit.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.method import Module
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.checkpoint.tensor import Tensor


_BASE_LAYER = {"base_layer.weight", "base_layer.bias"}


@dataclass(frozen=True)
class PlainFactors:
    """The delta of one module, ``scale * b @ a``, in PEFT's shapes.

    Attributes:
        path: of the module.
        rank, scale: of the product.
        load: gives A and B: ``[r, in]`` and ``[out, r]``, for an embedding ``[r, V]`` and ``[d, r]``, for a convolution
            ``[r, in, height, width]`` and ``[out, r, 1, 1]``; any dtype.
        stored: A and B as they lie in the file.
        embedding: the module is one.
        turned: the module stores its weight ``[in, out]``.
    """

    path: str
    rank: int
    scale: float
    load: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    stored: tuple[Tensor, Tensor]
    embedding: bool = False
    turned: bool = False


def scaled_factors(
    adapter: Adapter, *, convolutions: bool = False
) -> tuple[list[PlainFactors], dict[str, Tensor]] | None:
    """Factors and scaling of every module, and the whole parameters that come along.

    None where the adapter is not LoRA, or is more than factors and scalings: then its deltas have to be computed, for
    most methods against the base.

    Args:
        adapter: one whose module paths need no base (`resolved`).
        convolutions: those of convolutions too, which have more than two dimensions.
    """
    method = check_config(adapter)
    modules, whole = group_modules(adapter, method)
    if method.peft_type != "LORA" or not all(_is_plain(module, adapter, convolutions) for module in modules):
        return None
    return [_scaled(module, adapter) for module in modules], whole


def convolution(adapter: Adapter) -> str:
    """The path of the first convolution that a LoRA is of, whose factors have more than two dimensions; "" where none is."""
    method = check_config(adapter)
    modules = group_modules(adapter, method)[0] if method.peft_type == "LORA" else ()
    deep = (one.path for one in modules if lora.A in one.tensors and len(one.tensors[lora.A].shape) > 2)
    return next(deep, "")


def why_not_scaled(adapter: Adapter, *, convolutions: bool = True) -> str:
    """Why `scaled_factors` gives None, in words: the method, or what the first such module is or has."""
    method = check_config(adapter)
    if method.peft_type != "LORA":
        return f"it is {method.title.split(',')[0].partition(':')[0]}, not LoRA"
    if not convolutions and (path := convolution(adapter)):
        return f"{path} is a convolution"
    module = next(one for one in group_modules(adapter, method)[0] if not _is_plain(one, adapter, convolutions))
    if more := sorted(set(module.tensors) - {lora.A, lora.B, lora.EMBEDDING_A, lora.EMBEDDING_B} - _BASE_LAYER):
        return f"{module.path} has {more[0]} beside its factors"
    return f"{module.path} is more than factors and a scaling, by its config"


def resolved(adapter: Adapter, base: Checkpoint | None) -> Adapter:
    """The adapter with module paths that need no base.

    Raises:
        UsageError: its paths are flat, or it is for several models, and no base is given.
        TargetError: see `settle`.
    """
    names = None if base is None else Names(base.shapes, base.config)
    return settle(adapter, names, {} if base is None else base.config)


def _is_plain(module: Module, adapter: Adapter, convolutions: bool) -> bool:
    """Whether a LoRA module is factors and a scaling, nothing else."""
    config = adapter.config
    pairs = ({lora.A, lora.B}, {lora.EMBEDDING_A, lora.EMBEDDING_B})
    mutated = str(config.get("init_lora_weights", "")).lower() in ("pissa", "olora")
    special = mutated or any(
        config.get(name) for name in ("use_dora", "use_bdlora", "use_qalora", "kasa_config", "use_mora")
    )
    names = set(module.tensors) - _BASE_LAYER
    matrices = all(len(module.tensors[name].shape) == 2 for name in names)
    if convolutions and names == {lora.A, lora.B}:
        a, b = (module.tensors[name].shape for name in (lora.A, lora.B))
        matrices = len(a) == len(b) >= 2 and set(b[2:]) <= {1}
    return names in pairs and matrices and module.depth == 0 and not special and not config.get("target_parameters")


def _scaled(module: Module, adapter: Adapter) -> PlainFactors:
    embedding = lora.EMBEDDING_A in module.tensors
    names = (lora.EMBEDDING_A, lora.EMBEDDING_B) if embedding else (lora.A, lora.B)
    a, b = (module.tensors[name] for name in names)

    def load() -> tuple[torch.Tensor, torch.Tensor]:
        from adapterkit.adapters.change import raw

        return raw(a), raw(b)

    scale = adapter.config.scaling(module.path, a.shape[0])
    return PlainFactors(module.path, a.shape[0], scale, load, (a, b), embedding, adapter.config.flag("fan_in_fan_out"))
