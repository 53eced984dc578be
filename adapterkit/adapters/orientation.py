"""Which way round a linear layer's weight is stored.

Transformers' ``Conv1D`` keeps its weight as ``[in, out]``. PEFT notes that in ``fan_in_fan_out``, but sets the flag anew at
every layer that it wraps, so the file holds what the last one was: an adapter on GPT-2's attention and its output layer
says false. So the architecture is asked first, then the shape, and the flag only about what is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapterkit.adapters.method import Context
    from adapterkit.adapters.target import Target

# Classes of transformers 5.23 that use Conv1D, and the modules that are one.
_TYPES = frozenset({"clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
_MODULES = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})


def is_turned(context: Context, target: Target, expected: tuple[int, int]) -> bool:
    """Whether the module keeps its weight as ``[in, out]``; ``expected`` is ``(out, in)`` by the adapter's own tensors."""
    if len(target.shape) != 2 or target.matrix not in (expected, expected[::-1]):
        return False
    flag = context.config.flag("fan_in_fan_out")
    known = _TYPES & context.names.model_types
    if not known and not flag:
        return False
    turned = target.parameter.split(".")[-2:-1] in ([module] for module in _MODULES) if known else flag
    if expected[0] != expected[1]:
        # The shape tells; that a weight fits only when turned is no reason to turn one that nobody says is a Conv1D.
        return target.matrix != expected and (turned or flag)
    return turned


def is_conv1d(model_types: frozenset[str], module: str) -> bool:
    """Whether a module of such a model is a ``Conv1D``, by the architecture alone."""
    return bool(_TYPES & model_types) and module.rpartition(".")[2] in _MODULES
