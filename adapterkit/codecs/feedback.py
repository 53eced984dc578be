"""Error feedback by columns: each column is rounded, and what that took is made up for by the columns after it.

The rule is GPTQ's (Frantar et al., arXiv:2210.17323). With H = X'X of the inputs of a linear layer, and H^-1 = U'U with U upper
triangular, column i of W is put on the grid and its error, divided by U[i, i], is taken off every later column j times
U[i, j], so that X W' stays where it was. The scale of a group of columns is searched when the group is reached: of the
stored one and of some multiples of its largest value, that with the least error as the diagonal of H weighs it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from adapterkit.codecs.encode import Encoder

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

DAMPING = 0.01  # of the mean diagonal of H, added to it, as in GPTQ
SEARCHED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # multiples of a group's largest value
BLOCK = 128  # columns whose errors are gathered before the columns after them get them
MEASURED = 256  # rows of X that tell how much of a layer's outputs is lost


class Inputs(Protocol):
    """What goes into the linear layer of a weight."""

    def rows(self) -> torch.Tensor:
        """X, float32 ``[tokens, columns]``."""


@dataclass(frozen=True)
class Scales:
    """The scale of one group of columns, for each line of tiles: as stored, zero points, what values are multiplied by."""

    scale: torch.Tensor
    zero: torch.Tensor | None = None
    times: torch.Tensor | None = None


class ByColumns(Protocol):
    """A format, as far as feedback needs it: groups of columns share a scale, in each line of rows."""

    group: int
    """Columns that share a scale; the last group may be narrower."""
    lines: int
    """Lines of rows that share a scale."""

    @property
    def fixed(self) -> bool:
        """Whether the stored scales stay as they are."""

    def line_of_row(self) -> torch.Tensor | None:
        """For each row its line; None where every row is one."""

    def order(self) -> torch.Tensor | None:
        """The columns in the order of their groups, where groups do not lie together."""

    def stored(self, group: int) -> Scales | None:
        """The scale that a group has now, for every line; None for a new weight."""

    def choose(self, low: torch.Tensor, high: torch.Tensor) -> Scales:
        """The scale for the extremes of a group, for every line."""

    def rounded(self, values: torch.Tensor, scales: Scales) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of values ``[rows, k]`` and what they are decoded to; `Scales` has been spread to rows."""

    def spread(self, scales: Scales) -> Scales:
        """Scales of lines as those of rows, ``[rows, 1]``."""

    def mixed(self, which: torch.Tensor, one: Scales, other: Scales) -> Scales:
        """For each line the one scale or the other."""

    def encoded(self, codes: torch.Tensor, scales: list[Scales], changed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the format's encoder gives for these codes ``[rows, columns]``.

        Args:
            codes: with the columns where they were.
            scales: one for each group.
            changed: ``[lines, groups]``; where it is false the stored codes and scales are kept.
        """


@dataclass
class LostOutputs:
    """What of a change is lost in the outputs of layers, on the calibration text: sums of squares over weights.

    Attributes:
        change: of X D', where D is what adapters do to the weight.
        left: of X E', where E is what is written minus what was wanted.
        nearest: the same of the nearest value, by the format's own encoder.
    """

    change: float = 0.0
    left: float = 0.0
    nearest: float = 0.0
    found: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, name: str, change: float, left: float, nearest: float) -> None:
        with self._lock:
            self.found[name] = (change, left, nearest)

    def sums(self) -> tuple[float, float, float]:
        """Change, left, nearest, in the order of the names, so that the last bit does not depend on threads."""
        with self._lock:
            rows = [self.found[name] for name in sorted(self.found)]
        return sum(r[0] for r in rows), sum(r[1] for r in rows), sum(r[2] for r in rows)


class InverseFactors:
    """The factor U and the diagonal of H for inputs; the last one is kept, because projections share their inputs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[object, tuple[int, ...] | None, tuple[torch.Tensor, torch.Tensor]] | None = None

    def of(self, inputs: Inputs, order: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        key = None if order is None else tuple(order.tolist())
        with self._lock:
            if self._kept is None or self._kept[0] is not inputs or self._kept[1] != key:
                self._kept = None
                self._kept = (inputs, key, factor(inputs.rows(), order))
            return self._kept[2]


def factor(x: torch.Tensor, order: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """U with H^-1 = U'U, float32 ``[columns, columns]``, and the diagonal of H, float32; H = X'X, damped.

    With the rows and columns of H in reverse, H = R R' where R is upper triangular; then U = R^-1.
    """
    import torch

    from adapterkit.ops.threads import one_thread

    x = x if order is None else x[:, order]
    with one_thread():
        h = (x.T @ x).double()
        mean = float(h.diagonal().mean())
        h.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
        weigh = h.diagonal().float()
        upper = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
        del h
        found = torch.linalg.solve_triangular(upper, torch.eye(len(weigh), dtype=torch.float64), upper=True)
    return found.float(), weigh


@dataclass(frozen=True)
class Shared:
    """What the weights of a model share."""

    factors: InverseFactors = field(default_factory=InverseFactors)
    lost: LostOutputs = field(default_factory=LostOutputs)


class Fed(Encoder):
    """A format whose rounding is fed back. A range is the whole weight, since columns follow each other.

    Args:
        name: of the weight.
        inner: the format's own encoder.
        form: the same, by columns.
        shape: of the weight, ``[out, in]``.
        inputs: opens what goes into its layer.
        shared: with the other weights of the model.
    """

    anywhere = False  # columns follow each other, and what goes into the layers was gathered on the CPU
    called = "rounding with feedback"

    def __init__(
        self,
        name: str,
        inner: Encoder,
        form: ByColumns,
        shape: tuple[int, int],
        inputs: Callable[[], Inputs],
        shared: Shared,
    ) -> None:
        self._name, self._inner, self._form, self._shape = name, inner, form, shape
        self._inputs, self._factors, self._lost = inputs, shared.factors, shared.lost
        rows, columns = shape
        self.made, self.streams = inner.made, inner.streams
        self.unit = rows * columns
        self.unit_codes = -(-inner.unit_codes * self.unit // inner.unit) if inner.streams else 0
        # the weight before, as wanted and as written; H and its factor in float64, then in float32
        self.memory = inner.memory + 16 * rows * columns + 20 * columns * columns

    def encode(self, start: int, new: torch.Tensor, old: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        import torch

        from adapterkit.ops.threads import one_thread

        form, inputs = self._form, self._inputs()
        wanted = new.reshape(self._shape).float()
        before = None if old is None else old.reshape(self._shape).float()
        order = form.order()
        with one_thread():
            upper, weigh = self._factors.of(inputs, order)
            one = wanted if order is None else wanted[:, order]
            two = before if order is None or before is None else before[:, order]
            codes, values, scales, changed = fed(form, one, two, upper, weigh)
            if order is not None:
                back = torch.argsort(order)
                codes, values = codes[:, back], values[:, back]
            self._measure(inputs, wanted, before, values, new, old)
        return form.encoded(codes, scales, changed)

    def _measure(
        self,
        inputs: Inputs,
        wanted: torch.Tensor,
        before: torch.Tensor | None,
        values: torch.Tensor,
        new: torch.Tensor,
        old: torch.Tensor | None,
    ) -> None:
        """How far the outputs of the layer are from those that were wanted, on some rows of the text."""
        import torch

        x = inputs.rows()
        x = x[:: max(1, len(x) // MEASURED)][:MEASURED]
        unit = self._inner.unit
        if before is None or self._inner.twice:
            near = None
        else:
            steps = range(0, new.numel(), max(unit, (1 << 20) // unit * unit))
            size = steps.step
            parts = [
                self._inner.values(
                    at, self._inner.encode(at, new[at : at + size], None if old is None else old[at : at + size])
                )
                for at in steps
            ]
            near = torch.cat(parts).view(self._shape)
        change = 0.0 if before is None else _size(x, wanted - before)
        self._lost.add(self._name, change, _size(x, values - wanted), 0.0 if near is None else _size(x, near - wanted))

    def finish(self, held: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        return self._inner.finish(held)

    def values(self, start: int, encoded: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self._inner.values(start, encoded)

    def end(self) -> None:
        self._inner.end()


def _size(x: torch.Tensor, rows: torch.Tensor) -> float:
    return float((x @ rows.T).double().square().sum())


def fed(
    form: ByColumns, wanted: torch.Tensor, before: torch.Tensor | None, upper: torch.Tensor, weigh: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[Scales], torch.Tensor]:
    """Codes, their values, a scale for each group, and which lines changed in it; columns in the order of their groups.

    Args:
        wanted: ``[rows, columns]`` float32.
        before: the values that are stored now; None for a new weight.
        upper: U, ``[columns, columns]``.
        weigh: the diagonal of H.
    """
    import torch

    columns = wanted.shape[1]
    group = min(form.group, columns)
    # A group begins with a block, or lies inside one.
    step = group if group < columns and BLOCK % group and group % BLOCK else BLOCK
    left = wanted.clone()
    codes: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    scales: list[Scales] = []
    moved: list[torch.Tensor] = []
    spread: Scales | None = None
    same: torch.Tensor | None = None
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        part = left[:, start:stop]
        errors = torch.empty_like(part)
        for i in range(stop - start):
            at = start + i
            if at % group == 0:
                end = min(at + group, columns)
                there = left[:, at:end]
                stored = form.stored(at // group)
                changed = _changed(form, there, None if stored is None or before is None else before[:, at:end])
                found = _searched(form, there, weigh[at:end], stored)
                same = None
                if stored is not None and not bool(changed.all()):
                    found = form.mixed(changed, found, stored)
                    line = form.line_of_row()
                    same = ~(changed if line is None else changed[line])[:, None]
                scales.append(found)
                moved.append(changed)
                spread = form.spread(found)
            assert spread is not None
            code, value = form.rounded(part[:, i : i + 1], spread)
            if same is not None:  # what keeps its codes loses nothing, whatever decoding rounds
                value = torch.where(same, part[:, i : i + 1], value)
            codes.append(code)
            values.append(value)
            errors[:, i : i + 1] = (part[:, i : i + 1] - value) / upper[at, at]
            part[:, i + 1 :] -= errors[:, i : i + 1] * upper[at, at + 1 : stop]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return torch.cat(codes, 1), torch.cat(values, 1), scales, torch.stack(moved, 1)


def _changed(form: ByColumns, there: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """Which lines of a group are not what is stored now."""
    import torch

    if before is None:
        return torch.ones(form.lines, dtype=torch.bool)
    return _by_line(form, (there != before).any(1).float(), "amax") > 0


def _by_line(form: ByColumns, rows: torch.Tensor, how: str) -> torch.Tensor:
    """A figure of each row as one of each line: the least, the largest or the sum."""
    import torch

    line = form.line_of_row()
    if line is None:
        return rows
    first = {"amin": torch.inf, "amax": -torch.inf, "sum": 0.0}[how]
    return torch.full((form.lines,), first).scatter_reduce(0, line, rows, how)


def _searched(form: ByColumns, there: torch.Tensor, weigh: torch.Tensor, stored: Scales | None) -> Scales:
    """For each line the scale with the least error, of the stored one and of multiples of the extremes."""
    import torch

    low, high = _by_line(form, there.amin(1), "amin"), _by_line(form, there.amax(1), "amax")
    if stored is not None and form.fixed:
        return stored
    best = stored
    least = torch.full((form.lines,), torch.inf) if stored is None else _error(form, there, weigh, stored)
    for factor_ in SEARCHED:
        tried = form.choose(low * factor_, high * factor_)
        error = _error(form, there, weigh, tried)
        better = error < least
        best = tried if best is None else form.mixed(better, tried, best)
        least = torch.where(better, error, least)
    assert best is not None
    return best


def _error(form: ByColumns, there: torch.Tensor, weigh: torch.Tensor, scales: Scales) -> torch.Tensor:
    off = form.rounded(there, form.spread(scales))[1].sub(there).square_().mul_(weigh).sum(1)
    return _by_line(form, off, "sum")
