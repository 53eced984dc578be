"""Modules that a user names to be left in 16 bits: a name that names nothing is a mistake, and is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.adapters.linear import is_named, linear_modules
from adapterkit.adapters.names import Names
from adapterkit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from adapterkit.checkpoint.checkpoint import Checkpoint


def check_skipped(checkpoint: Checkpoint, patterns: Iterable[str] | None, *, around: bool = False) -> None:
    """See that each pattern names a layer, as the model or the file calls it; an output layer that shares the embedding's
    values is one, too.

    Args:
        patterns: as `adapterkit.adapters.linear.is_named` takes them.
        around: the end of the name of a module around layers (`mlp`) names those too; transformers takes no such pattern.

    Raises:
        UsageError: one names nothing, or is no regular expression.
    """
    left = list(patterns or ())
    if not left:
        return
    names = Names(checkpoint.shapes, checkpoint.config)
    known = [*names.parameters(), *checkpoint, *(head for _, head in names.declared_ties()), "lm_head.weight"]
    modules: dict[str, None] = {}  # and parameters that are no module's weight
    for name in known:
        modules[name] = None
        if ".experts." in name:  # these are skipped by the name of their module, too
            modules[f"{name.rpartition('.experts.')[0]}.experts"] = None
        while name := name.rpartition(".")[0]:
            modules[name] = None
            if not around:
                break
    for pattern in left:
        if not any(is_named(pattern, module) for module in modules):
            raise UsageError(
                f"{checkpoint.ref} has nothing that '{pattern}' names",
                "give the end of a layer's name or its beginning, like down_proj or model.layers.0.mlp",
            )


def skipped_modules(checkpoint: Checkpoint, patterns: Sequence[str]) -> list[str]:
    """The linear layers that patterns name, by their whole names."""
    names = Names(checkpoint.shapes, checkpoint.config)
    found = {name: target for name in names.parameters() if (target := names.find(name)) is not None}
    shapes: Mapping[str, tuple[int, ...]] = {name: target.shape for name, target in found.items()}
    linear = linear_modules(shapes, checkpoint.config)
    return [module for module in linear if any(is_named(pattern, module) for pattern in patterns)]
