"""The level of layers: the same inputs through each touched module, as base with adapters and as MERGED.

A matrix is walked in the blocks in which it is stored, so a module of any size takes a block and its outputs. Inputs are
random (unit variance, the same on every run), or the activations of the model itself: see `adapterkit.verbs.verify.replay`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

from adapterkit.checkpoint.plan import default_jobs
from adapterkit.ops.threads import Workers
from adapterkit.verbs.verify.report import LayerCheck, LayerLevel
from adapterkit.verbs.verify.suspect import after, before

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from adapterkit.verbs.verify.subject import Item, Subject

ROWS = 32  # inputs of a module


@dataclass(frozen=True)
class Outputs:
    """|Y_merged - Y_trained|^2, |Y_trained - Y_base|^2 and |Y_trained|^2."""

    off: float = 0.0
    change: float = 0.0
    size: float = 0.0

    def __add__(self, other: Outputs) -> Outputs:
        return Outputs(self.off + other.off, self.change + other.change, self.size + other.size)

    def check(self, module: str) -> LayerCheck:
        return LayerCheck(
            module, _ratio(self.off, self.size), _ratio(self.change, self.size), _ratio(self.off, self.change)
        )


def _ratio(one: float, other: float) -> float:
    return sqrt(one / other) if other else 0.0


def compare_layers(
    subject: Subject, *, inputs: Mapping[str, torch.Tensor] | None = None, jobs: int | None = None
) -> LayerLevel:
    """Outputs of every touched matrix.

    Args:
        subject: what is compared.
        inputs: activations by tensor, ``[rows, columns]``; random ones where there are none.
        jobs: worker threads.

    Raises:
        CheckpointError, AdapterError
    """
    import torch

    started = time.monotonic()
    items = [item for item in subject.items if item.touched and len(item.floats.shape) in (2, 3)]
    given = inputs or {}

    def one(item: Item) -> Outputs:
        with torch.inference_mode():
            return outputs(item, given.get(item.name), turned=_turned(subject, item))

    with Workers(jobs or default_jobs()) as pool:
        found = list(pool.map(one, items))
    total = sum(found, Outputs())
    checks = tuple(each.check(item.name) for each, item in zip(found, items, strict=True))
    worst = max(checks, key=lambda check: check.lost, default=LayerCheck("", 0.0, 0.0, 0.0))
    whole = total.check("")
    replayed = sum(item.name in given for item in items)
    kind = "replayed" if replayed and replayed == len(items) else "replayed and random" if replayed else "random"
    seconds = time.monotonic() - started
    return LayerLevel(kind, ROWS, whole.error, whole.change, whole.lost, worst.module, checks, seconds)


def _turned(subject: Subject, item: Item) -> bool:
    """Whether the matrix is stored ``[in, out]``."""
    from adapterkit.codecs.conv1d import is_conv1d

    return subject.kind != "gguf" and is_conv1d(item.name, subject.folded.checkpoint.config)


def outputs(item: Item, inputs: torch.Tensor | None, *, turned: bool = False) -> Outputs:
    """What a matrix (or each of a stack) gives for its inputs, block by block."""

    columns = item.floats.shape[-1]
    rows = item.floats.numel // columns
    width = rows if turned else columns
    x = inputs if inputs is not None and inputs.shape[1] == width else random_inputs(width)
    base, new, there = before(item), after(item), item.values
    step = max(1, (1 << 19) // columns)
    total = Outputs()
    sums: list[torch.Tensor] = []
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        w, trained, merged = (
            t.read_wide(start * columns, stop * columns).float().view(-1, columns) for t in (base, new, there)
        )
        if turned:
            part = x[:, start:stop]
            made = [part @ (merged - trained), part @ (trained - w), part @ trained]
            sums = [a + b for a, b in zip(sums, made, strict=True)] if sums else made
        else:
            total += _squares([x @ (merged - trained).T, x @ (trained - w).T, x @ trained.T])
    for tensor in (base, new, there):
        tensor.release()
    return _squares(sums) if turned else total


def _squares(made: Sequence[torch.Tensor]) -> Outputs:
    return Outputs(*(float(one.double().square().sum()) for one in made))


def random_inputs(width: int) -> torch.Tensor:
    """Normal numbers of unit variance, ``[ROWS, width]``, the same on every run."""
    import torch

    return torch.randn(ROWS, width, generator=torch.Generator().manual_seed(width))
