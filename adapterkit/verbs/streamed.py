"""A model that runs with the weights of one module in memory at a time.

It is built without weights; a module gets its own when it is called and loses them when it is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.merged import StoredWeights
from adapterkit.adapters.names import Names

if TYPE_CHECKING:
    import torch

    from adapterkit.adapters.target import Target
    from adapterkit.checkpoint.checkpoint import Checkpoint


def run_streamed(
    model: Any,
    view: Checkpoint,
    batches: Sequence[Sequence[Sequence[int]]],
    seen: Callable[[Any, Target, torch.Tensor], None],
) -> None:
    """Run a model without weights over tokens; each module has the values of a view while it is called.

    Args:
        model: of `adapterkit.verbs.verify.answers.empty_model`.
        view: in whose tensors the parameters are found, float32 is computed with.
        batches: rows of tokens, of one length in a batch.
        seen: told of every module with a weight that gets floats: the module, where its weight is, and what it gets.

    Raises:
        ValueError: a parameter that the view does not hold.
    """
    import torch

    names = Names(view.shapes, view.config)
    with contextlib.ExitStack() as stack:
        for path, module in model.named_modules():
            own = [name for name, parameter in module.named_parameters(recurse=False) if parameter is not None]
            if own:
                stack.enter_context(_loaded(module, path, own, names, view, seen))
        with torch.inference_mode():
            # Without the output layer, which is the largest matrix and feeds nothing.
            body = model.base_model if hasattr(model, "base_model") else model
            for rows in batches:
                body(input_ids=torch.tensor([list(ids) for ids in rows]))


@contextlib.contextmanager
def _loaded(
    module: Any,
    path: str,
    own: Sequence[str],
    names: Names,
    trained: Checkpoint,
    seen: Callable[[Any, Target, torch.Tensor], None],
) -> Iterator[None]:
    """A module that gets its weights when it is called."""
    import torch

    targets = {}
    for leaf in own:
        parameter = f"{path}.{leaf}" if path else leaf
        target = names.find(parameter)
        if target is None:
            other = names.tied(parameter)
            target = names.find(other) if other is not None else None
        if target is None:
            raise ValueError(f"'{parameter}' is not in the base")
        targets[leaf] = target

    def read(leaf: str) -> torch.Tensor:
        target = targets[leaf]
        rows = StoredWeights(target, trained.tensors)
        values = rows.read(0, target.matrix[0]).view(target.shape)
        for tensor in target.tensors:
            trained[tensor].release()
        return values

    def rows_of(ids: torch.Tensor) -> torch.Tensor:
        """An embedding's rows, without the rest of it."""
        weights = StoredWeights(targets["weight"], trained.tensors)
        flat = ids.reshape(-1)
        wanted = flat.tolist()
        found = {one: weights.read(one, one + 1)[0] for one in set(wanted)}
        return torch.stack([found[one] for one in wanted]).view(*ids.shape, -1)

    def before(module: Any, args: Any) -> None:
        for leaf in own:
            setattr(module, leaf, torch.nn.Parameter(read(leaf), requires_grad=False))
        weight = targets.get("weight")
        if weight is None or not args or not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
            return
        seen(module, weight, args[0])

    def after(module: Any, args: Any, result: Any) -> None:
        for leaf in own:
            empty = getattr(module, leaf).to("meta")
            setattr(module, leaf, torch.nn.Parameter(empty, requires_grad=False))

    if type(module) is torch.nn.Embedding:
        module.__dict__["forward"] = rows_of
        yield
        return
    hooks = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
