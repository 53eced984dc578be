"""Activations of base + adapters, with the weights of one module in memory at a time.

The model is built without weights; a module gets its own when it is called and loses them when it is done. What goes into
each touched module is kept, a few rows of it, for `adapterkit.verbs.verify.layers`. So a model of any size can be replayed in
the memory of its largest matrix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.adapters.merged import StoredWeights
from adapterkit.adapters.names import Names
from adapterkit.errors import AdapterkitError
from adapterkit.verbs.verify.inputs import place
from adapterkit.verbs.verify.layers import ROWS
from adapterkit.verbs.verify.prompts import read_prompts

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from adapterkit.adapters.target import Target
    from adapterkit.checkpoint.checkpoint import Checkpoint
    from adapterkit.verbs.verify.subject import Subject

TOKENS = 64  # of each prompt
PROMPTS = 2


def activations(subject: Subject, prompts: Path | None) -> tuple[dict[str, torch.Tensor], str]:
    """Inputs of touched matrices by tensor, ``[rows, columns]``, and why there are none where there are none.

    Args:
        subject: what is compared; the folder whose config says what is built is the base's.
        prompts: a file, or the built-in set.
    """
    trained = subject.trained
    folder = None if trained is None else place(trained)
    if trained is None or folder is None or not trained.config:
        return {}, "the base has no config.json to build a model from"
    try:
        from adapterkit.verbs.verify.answers import Tokenizer, check_known, empty_model

        check_known(trained.config, trained.ref)
        tokenizer = Tokenizer([one for one in (place(subject.found), folder) if one is not None and one.is_dir()])
        texts = []
        for prompt in read_prompts(prompts)[:PROMPTS]:
            texts.append((list(prompt.ids) or tokenizer.ids(prompt.text, prompt.messages))[:TOKENS])
        model = empty_model(trained.config)
        return _replayed(model, trained, subject, texts), ""
    except AdapterkitError as error:
        return {}, error.message
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError) as error:
        # Classes of a library that may do anything in their forward pass: what they cannot do without is not ours to say.
        return {}, f"the model cannot be replayed ({' '.join(str(error).split())[:120]})"


def _replayed(
    model: Any, trained: Checkpoint, subject: Subject, texts: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    import torch

    wanted = _wanted(subject)
    kept: dict[str, list[torch.Tensor]] = {}

    def seen(module: Any, weight: Target, x: torch.Tensor) -> None:
        if len(weight.pieces) == 1 and x.shape[-1] == weight.matrix[1]:
            for name in wanted.get(weight.pieces[0].tensor, ()):
                kept.setdefault(name, []).append(x.reshape(-1, x.shape[-1]).detach().clone())

    run_streamed(model, trained, [[ids] for ids in texts if len(ids) > 1], seen)
    found = {}
    for name, parts in kept.items():
        rows = torch.cat(parts)
        step = max(1, len(rows) // ROWS)
        found[name] = rows[::step][:ROWS].float().contiguous()
    return found


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


def _wanted(subject: Subject) -> dict[str, tuple[str, ...]]:
    """For each tensor of the base that adapters change, the weights that are compared."""
    touched = {item.name for item in subject.items if item.touched}
    if not subject.became:
        return {name: (name,) for name in touched}
    return {
        name: tuple(one for one in became if one in touched)
        for name, became in subject.became.items()
        if any(one in touched for one in became)
    }


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
