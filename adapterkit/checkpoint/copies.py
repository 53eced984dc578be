"""A part that only copies: its plan says from which bytes of which files, so nothing else has to be opened for it.

Who executes one such part of a model in 163 files opens one or two of them, and reads their headers to see that they are
those of the plan. Whether the plan is right is not asked again: whoever finishes the output makes it anew and compares.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterkit.checkpoint.files import LocalFile, Source, fingerprint
from adapterkit.checkpoint.tensor import Stored
from adapterkit.dtypes import DTYPES
from adapterkit.errors import AdapterkitError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from adapterkit.checkpoint.cut import PlanPart
    from adapterkit.checkpoint.plan import Plan
    from adapterkit.checkpoint.tensor import Tensor


def copies(plan: Plan, part: PlanPart, known: dict[str, LocalFile]) -> tuple[Mapping[str, Tensor], list[Source]] | None:
    """The tensors of a part that only copies from files on this disk, and all files of the plan's inputs; None for another.

    Args:
        known: files that were seen to be the plan's; new ones are added.
    """
    used = {chunk.source for chunk in part.file.head} | {step.source for step in part.steps} | {part.file.verbatim}
    if (
        any(step.source is None or step.dtype not in DTYPES for step in part.steps)
        or not used - {None} <= plan.inputs.keys()
    ):
        return None
    sources = []
    try:
        for name, said in plan.inputs.items():
            if name not in known:
                file = LocalFile(Path(name), name)
                if not said.startswith(f"{file.size}:"):
                    return None
                known[name] = file
            sources.append(known[name])
        if any(fingerprint(known[name]) != plan.inputs[name] for name in used if name is not None):
            return None
    except AdapterkitError:
        return None  # no file here by that name: whoever opens the inputs as the verb does finds them, or says why not
    tensors: dict[str, Tensor] = {
        step.tensor: Stored(step.tensor, DTYPES[step.dtype], step.shape, known[step.source], step.source_offset)
        for step in part.steps
        if step.source is not None
    }
    return tensors, list(sources)
