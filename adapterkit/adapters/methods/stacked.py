"""LoRA on stacked experts (PEFT's ``target_parameters``): one low-rank delta per expert of a 3-D parameter.

Layout (PEFT 0.21, ``lora.ParamWrapper``): ``lora_A`` ``[experts*r, a]`` has the expert slowest, ``lora_B`` ``[b, r*experts]``
has it fastest, unless the config says otherwise (`adapterkit.adapters.experts`). Which of the parameter's two inner
dimensions is ``a`` depends on the architecture and on the PEFT that wrote the file; shapes decide, and where the matrices
are square, those two do.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from adapterkit.adapters.change import Change, Kernel, StackedLowRank, Weights, matrix
from adapterkit.adapters.experts import SLOWEST, stated_order
from adapterkit.adapters.method import Context, Edit, Module
from adapterkit.adapters.target import Target, as_stack
from adapterkit.errors import AdapterError, TargetError

if TYPE_CHECKING:
    from adapterkit.checkpoint.tensor import Tensor

# The order in which expert modules register their parameters; wrappers nest in it, the first innermost.
_REGISTERED = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias")


def wrapped_leaves(module: Module, context: Context) -> list[str]:
    """The parameters of a module that ``target_parameters`` names, without the module's path."""
    found = []
    for name in context.config.names("target_parameters"):
        owner, _, leaf = name.rpartition(".")
        if not owner or module.path == owner or module.path.endswith(f".{owner}"):
            found.append(leaf)
    return list(dict.fromkeys(found))


def stacked_parameter(module: Module, context: Context, key: str) -> str:
    """The parameter that a wrapper belongs to; its key does not say which when a module has several.

    Raises:
        TargetError: the module has no such parameter in this base.
    """
    leaves = wrapped_leaves(module, context)
    known = [leaf for leaf in leaves if context.names.find(f"{module.path}.{leaf}") is not None]
    known.sort(key=lambda leaf: (_REGISTERED.index(leaf) if leaf in _REGISTERED else len(_REGISTERED), leaf))
    depths = sorted({other.depth for other in context.siblings if other.path == module.path}, reverse=True)
    if not known or len(depths) > len(known):
        context.target(f"{module.path}.{next(iter(sorted(leaves)), 'weight')}", key)
        raise TargetError(
            f"{context.where}: '{key}' wraps {len(depths)} parameters and target_parameters names {len(known)} of them",
            "restore the config that was saved with the weights",
        )
    if len(depths) == len(known):
        return f"{module.path}.{known[depths.index(module.depth)]}"
    # Fewer wrappers than names: other layers have the others, so the shapes must tell.
    a, b = module.tensors["lora_A.weight"], module.tensors["lora_B.weight"]
    fits = [leaf for leaf in known if _orientations(as_stack(context.target(f"{module.path}.{leaf}", key)), a, b)]
    if len(fits) != 1:
        raise TargetError(f"{context.where}: '{key}' could belong to {' or '.join(known)}", "save each one alone")
    return f"{module.path}.{fits[0]}"


def stacked_edit(module: Module, context: Context, a: Tensor, b: Tensor) -> Edit:
    """The edit of a stack of experts.

    Raises:
        TargetError: the factors fit no orientation of the parameter.
    """
    key = f"{module.path}.{'base_layer.' * module.depth}lora_A.weight"
    parameter = stacked_parameter(module, context, key)
    target = as_stack(context.target(parameter, key))
    fits = _orientations(target, a, b)
    if not fits:
        raise TargetError(
            f"{context.where}: '{key}' is {list(a.shape)} and its lora_B {list(b.shape)}, which fits no side of "
            f"{parameter} {list(target.shape)}",
            "give the base it was trained on",
        )
    experts = target.shape[0]
    rank = a.shape[0] // experts
    scale = context.config.scaling(parameter, rank)
    swapped = fits[0] if len(fits) == 1 else _swapped_by_version(context, parameter)
    slowest = stated_order(context.config, parameter.rpartition(".")[2]) == SLOWEST

    def load(weights: Weights) -> Kernel:
        lower = matrix(a, weights.dtype).view(experts, rank, a.shape[1])
        flat = matrix(b, weights.dtype)
        if slowest:
            upper = flat.view(b.shape[0], experts, rank).permute(1, 0, 2)
        else:
            upper = flat.view(b.shape[0], rank, experts).permute(2, 0, 1)
        left, right = (lower.mT, upper.mT) if swapped else (upper, lower)
        return StackedLowRank(left.contiguous(), right.contiguous(), scale)

    return Edit(target, Change(f"lora r={rank} x{experts}", load, a.nbytes + b.nbytes, 4 * (a.numel + b.numel)))


def _orientations(target: Target, a: Tensor, b: Tensor) -> list[bool]:
    """Whether the factors fit as they are (False), turned round (True), or both."""
    if len(target.shape) != 3 or len(a.shape) != 2 or len(b.shape) != 2:
        return []
    experts, first, second = target.shape
    if a.shape[0] % experts or a.shape[0] != b.shape[1]:
        return []
    found = [False] if (b.shape[0], a.shape[1]) == (first, second) else []
    return found + ([True] if (a.shape[1], b.shape[0]) == (first, second) else [])


def _swapped_by_version(context: Context, parameter: str) -> bool:
    """Square matrices: PEFT up to 0.18 always turned the delta, 0.19.0 had its rule the wrong way round."""
    numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", str(context.config.get("peft_version", "0.17.0")))
    if numbers is None:
        raise AdapterError(f"{context.config.where}: peft_version is not a version", "correct the config")
    version = tuple(int(part or 0) for part in numbers.groups())
    if version < (0, 19, 0):
        return True
    stored_transposed = context.names.turned(parameter)
    return not stored_transposed if version == (0, 19, 0) else stored_transposed
