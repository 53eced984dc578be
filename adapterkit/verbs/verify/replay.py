"""Activations of base + adapters, with the weights of one module in memory at a time.

What goes into each touched module is kept, a few rows of it, for `adapterkit.verbs.verify.layers`. So a model of any size can
be replayed in the memory of its largest matrix; see `adapterkit.verbs.streamed`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterkit.errors import AdapterkitError
from adapterkit.verbs.streamed import run_streamed
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
