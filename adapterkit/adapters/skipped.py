"""Modules that a user names to be left in 16 bits: a name that names nothing is a mistake, and is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.adapters.linear import is_named, linear_modules
from adapterkit.adapters.names import Names
from adapterkit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from adapterkit.checkpoint.checkpoint import Checkpoint


def check_skipped(checkpoint: Checkpoint, patterns: Iterable[str] | None) -> None:
    """See that each pattern names a module, as the model or the file calls it; an output layer that shares the embedding's
    values is one, too.

    Args:
        patterns: as `adapterkit.adapters.linear.is_named` takes them.

    Raises:
        UsageError: one names nothing, or is no regular expression.
    """
    left = list(patterns or ())
    if not left:
        return
    names = Names(checkpoint.shapes, checkpoint.config)
    known = [*names.parameters(), *checkpoint, *(head for _, head in names.declared_ties()), "lm_head.weight"]
    modules: dict[str, None] = {}  # and what is around them, and parameters that are no module's weight
    for name in known:
        while name and name not in modules:
            modules[name] = None
            name = name.rpartition(".")[0]
    for pattern in left:
        if not any(is_named(pattern, module) for module in modules):
            raise UsageError(
                f"{checkpoint.ref} has nothing that '{pattern}' names",
                "name modules as the model does, like down_proj or model.layers.0.mlp",
            )


def skipped_modules(checkpoint: Checkpoint, patterns: Sequence[str]) -> list[str]:
    """The linear layers that patterns name, by their whole names."""
    names = Names(checkpoint.shapes, checkpoint.config)
    found = {name: target for name in names.parameters() if (target := names.find(name)) is not None}
    shapes: Mapping[str, tuple[int, ...]] = {name: target.shape for name, target in found.items()}
    linear = linear_modules(shapes, checkpoint.config)
    return [module for module in linear if any(is_named(pattern, module) for pattern in patterns)]
