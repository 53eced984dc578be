"""What the methods share: finding the weight and bias of a module, checking shapes, making the edit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.adapters.change import SUM, Change
from adapterkit.adapters.method import Context, Edit, Module, check_matrix
from adapterkit.adapters.orientation import is_said_turned, is_turned
from adapterkit.adapters.target import Target, transposed
from adapterkit.errors import AdapterError, TargetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from adapterkit.adapters.change import Composition, Kernel, Weights
    from adapterkit.checkpoint.tensor import Tensor


def weight_of(module: Module, context: Context) -> Target:
    """The module's weight as it is stored."""
    return context.target(f"{module.path}.weight", _key(module))


def oriented(module: Module, context: Context, expected: tuple[int, int]) -> Target:
    """The module's weight as the method's ``[out, in]`` matrix.

    Raises:
        TargetError: the weight has another shape.
    """
    target = weight_of(module, context)
    if is_turned(context, target, expected):
        target = transposed(target)
    own = module.tensors.get("base_layer.weight")  # a vocabulary that was resized for training
    if own is None or own.shape != expected:
        check_matrix(target, expected, _key(module), context.where)
    return target


def matrix_of(module: Module, context: Context) -> tuple[int, int]:
    """``(out, in)`` of a module whose tensors do not say both."""
    target = weight_of(module, context)
    rows, columns = target.matrix
    return (columns, rows) if len(target.shape) == 2 and is_said_turned(context, target) else (rows, columns)


def bias_of(module: Module, context: Context) -> Target | None:
    """The module's bias, if the base has one."""
    parameter = f"{module.path}.bias"
    return None if context.names.find(parameter) is None else context.target(parameter, _key(module))


def edit(
    target: Target,
    how: str,
    load: Callable[[Weights], Kernel],
    tensors: Iterable[Tensor],
    held: int = 0,
    composes: Composition = SUM,
) -> Edit:
    """An edit that reads these tensors; ``held`` are float32 elements that the kernel keeps, by default theirs."""
    used = tuple(tensors)
    held = held or sum(tensor.numel for tensor in used)
    return Edit(target, Change(how, load, sum(tensor.nbytes for tensor in used), 4 * held, composes=composes))


def take(module: Module, context: Context, *names: str) -> tuple[Tensor, ...]:
    """Tensors of a module that must all be there and not be empty.

    Raises:
        AdapterError: one is missing or empty.
    """
    found = tuple(module.tensor(name, context.where) for name in names)
    for name, tensor in zip(names, found, strict=True):
        if tensor.numel == 0:
            raise AdapterError(
                f"{context.where}: '{module.path}.{name}' is empty, as when sharded weights are saved without gathering",
                "save the adapter again with the full state dict",
            )
    return found


def shared(context: Context, name: str, instead: str) -> Tensor:
    """A tensor that all modules use.

    Raises:
        AdapterError: it is not in the file.
    """
    if name not in context.shared:
        raise AdapterError(f"{context.where} has no {name}, which its modules share", instead)
    return context.shared[name]


def check_shape(tensor: Tensor, expected: tuple[int, ...], name: str, module: Module, context: Context) -> None:
    """Whether a tensor has the shape that the module's other tensors and the config ask for.

    Raises:
        TargetError: it has not.
    """
    if tensor.shape != expected:
        raise TargetError(
            f"{context.where}: '{module.path}.{name}' is {list(tensor.shape)}, not {list(expected)}",
            "it belongs to another config or base; restore the files that were saved together",
        )


def check_rank(rank: int, module: Module, context: Context) -> None:
    """Whether the tensors have the rank that the config gives the module.

    Raises:
        AdapterError: they have another one.
    """
    said = context.config.patterned("r", "rank_pattern", module.path)
    if said != rank:
        raise AdapterError(
            f"{context.config.where}: {module.path} has rank {rank} in the file and {said} in the config",
            "one of the two was edited; restore the config that was saved with the weights",
        )


def dims(tensor: Tensor, count: int, name: str, module: Module, context: Context) -> tuple[int, ...]:
    """The shape of a tensor that must have ``count`` dimensions.

    Raises:
        TargetError: it has another number.
    """
    if len(tensor.shape) != count:
        raise TargetError(
            f"{context.where}: '{module.path}.{name}' is {list(tensor.shape)}, not of {count} dimensions",
            "save the adapter again",
        )
    return tensor.shape


def at(rows: range) -> slice:
    """The rows as a slice."""
    return slice(rows.start, rows.stop, rows.step)


def _key(module: Module) -> str:
    return f"{module.path}.{next(iter(module.tensors))}"
