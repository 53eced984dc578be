"""Which way round a linear layer's weight is stored.

Transformers' ``Conv1D`` keeps its weight as ``[in, out]``. PEFT notes that in ``fan_in_fan_out``, but sets the flag anew at
every layer that it wraps, so the file holds what the last one was: an adapter on GPT-2's attention and its output layer
says false, and several methods never set it. So the architecture is asked first, then what the user named, then the shape, and
the flag only about what is left: square weights of models that are not known.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.adapters.config import CONV1D
from adapterkit.errors import TargetError, option

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from adapterkit.adapters.adapter import Adapter
    from adapterkit.adapters.config import AdapterConfig
    from adapterkit.adapters.method import Context, Edit
    from adapterkit.adapters.names import Names
    from adapterkit.adapters.target import Target

# Classes of transformers 5.23 that use Conv1D, and the modules that are one.
_TYPES = frozenset({"clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
_MODULES = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})


def is_turned(context: Context, target: Target, expected: tuple[int, int]) -> bool:
    """Whether the module keeps its weight as ``[in, out]``; ``expected`` is ``(out, in)`` by the adapter's own tensors."""
    if len(target.shape) != 2 or target.matrix not in (expected, expected[::-1]):
        return False
    said = is_said_turned(context, target)
    if expected[0] == expected[1]:
        return said
    # The shape tells. That a weight of a known class fits only when turned is no reason to turn it: it is another weight.
    return target.matrix != expected and (
        said or context.config.flag("fan_in_fan_out") or not context.names.known_class
    )


def is_said_turned(context: Context, target: Target) -> bool:
    """The same by what is known of the model, what the user named, and the config's flag; not by the shape."""
    module = target.parameter.rpartition(".")[0]
    if _TYPES & context.names.model_types:
        return module.rpartition(".")[2] in _MODULES
    if context.names.known_class:
        return context.config.flag("fan_in_fan_out")
    named = _named(module, context.config)
    return context.config.flag("fan_in_fan_out") if named is None else named


def _named(module: str, config: AdapterConfig) -> bool | None:
    """Whether a module is a Conv1D by its name: one that the user gave, or its own; None where neither says."""
    given = config.names(CONV1D)
    if given:
        return any(module == name or module.endswith(f".{name}") for name in given)
    # A matrix in a module of this name: torch's own Conv1d keeps three dimensions.
    return True if module.rpartition(".")[2].lower() == "conv1d" else None


def with_conv1d(adapter: Adapter, modules: Iterable[str]) -> Adapter:
    """The adapter with the modules that the user says are transformers' Conv1D."""
    names = list(modules)
    if not names:
        return adapter
    return replace(adapter, config=replace(adapter.config, raw={**adapter.config.raw, CONV1D: names}))


def check_squares(context: Context, edits: Sequence[Edit]) -> None:
    """Refuse square weights of a model that is not known, where its other weights lie both ways or contradict the flag.

    Raises:
        TargetError: nothing tells which way round one is stored.
    """
    turned, straight, square = _by_shape(edits, context.names, context.config)
    flag = context.config.flag("fan_in_fan_out")
    if square and (straight if flag else turned):
        other = (turned or straight)[0]
        way = "[in, out]" if turned else "[out, in]"
        raise TargetError(
            f"{context.where}: {square[0]} is square, so its shape does not tell which way round the model keeps it, and "
            f"{other} is kept as {way} although fan_in_fan_out says otherwise",
            f"name every module that is transformers' Conv1D with {option('conv1d', 'NAME')}",
        )


def orientation_notes(adapter: Adapter, edits: Sequence[Edit], names: Names) -> list[str]:
    """What to say about weights that were turned by their shape, and about square ones of a model that is not known."""
    turned, _, square = _by_shape(edits, names, adapter.config)
    notes = []
    if turned:
        notes.append(f"{_count(turned)} fits only as [in, out], as transformers' Conv1D keeps it, and was merged so")
    if square:
        way = "[in, out], as fan_in_fan_out says" if adapter.config.flag("fan_in_fan_out") else "[out, in]"
        notes.append(
            f"{_count(square)} is square and the model is not known: taken as {way}; {option('conv1d', 'NAME')} names others"
        )
    return notes


def _by_shape(edits: Sequence[Edit], names: Names, config: AdapterConfig) -> tuple[list[str], list[str], list[str]]:
    """Matrices of a model that is not known: those kept as [in, out], as [out, in], and square ones that no name tells of."""
    turned: list[str] = []
    straight: list[str] = []
    square: list[str] = []
    if names.known_class:
        return turned, straight, square
    for edit in edits:
        target = edit.target
        if (
            len(target.shape) != 2
            or edit.override
            or edit.change.replaced is not None
            or edit.change.stored is not None
        ):
            continue
        rows, columns = target.matrix
        if rows == columns:
            if _named(target.parameter.rpartition(".")[0], config) is None:
                square.append(target.parameter)
        else:
            (turned if target.pieces[0].transposed else straight).append(target.parameter)
    return turned, straight, square


def _count(parameters: Sequence[str]) -> str:
    return parameters[0] if len(parameters) == 1 else f"each of {len(parameters)} weights, as {parameters[0]},"


def is_conv1d(model_types: frozenset[str], module: str) -> bool:
    """Whether a module of such a model is a ``Conv1D``, by the architecture alone."""
    return bool(_TYPES & model_types) and module.rpartition(".")[2] in _MODULES
