"""How several deltas of one weight become one: a row of the table of combination methods with its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from adapterkit.errors import UsageError, counted, option

if TYPE_CHECKING:
    from adapterkit.ops.rows import DeltaRows
    from adapterkit.ops.rules import CombinationRule


@dataclass(frozen=True)
class BoundRule:
    """A combination method as asked for.

    Attributes:
        method: its name in `adapterkit.ops.rules.RULES`.
        space: ``knots``, ``core`` or ``ctm``: align there, with ``method`` as the inner rule.
        scale: factor of the result, the lambda of the papers.
        parameters: those of the method that differ from its defaults. ``weight`` is no method's: a factor for each adapter's
            weight, as a number or by part of the model (`adapterkit.ops.settings`).
    """

    method: str = "linear"
    space: str | None = None
    scale: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check()

    @property
    def row(self) -> CombinationRule:
        """The row of the table that does the work: the outer one of two."""
        from adapterkit.ops.rules import find

        return find(self.space if self.space not in (None, "dense") else self.method)

    def check(self) -> None:
        """Refuse what cannot be computed, before anything is read.

        Raises:
            UsageError: an unknown method, space or parameter, or a value out of range.
        """
        from math import isfinite

        from adapterkit.ops.rules import find

        inner, row = find(self.method), self.row
        if row is not inner and not (row.nested and inner.inner):
            raise UsageError(f"method {inner.name} cannot run in space {self.space}", "spaces are knots, core and ctm")
        _ = self._bound, self.shares
        if not isfinite(self.scale):
            raise UsageError(f"{option('scale')} must be a finite number, got {self.scale}", "leave it out for 1")

    @property
    def _own(self) -> dict[str, Any]:
        """The parameters that are the method's."""
        return {name: value for name, value in self.parameters.items() if name != "weight"}

    @property
    def shares(self) -> tuple[Any, ...]:
        """A factor for each adapter's weight; none where nothing was said.

        Raises:
            UsageError: it is no number, or no rows of numbers.
        """
        from adapterkit.ops.rules import Parameter

        if "weight" not in self.parameters:
            return ()
        found = Parameter("weight", float, 1.0, "a factor for each adapter's weight", each=True).check(
            self.parameters["weight"], self.method
        )
        return found if isinstance(found, tuple) else (found,)

    def check_count(self, count: int) -> None:
        """Refuse parameters with a value for each of another number of adapters.

        Raises:
            UsageError
        """
        for name, value in {**self._bound, "weight": self.shares or None}.items():
            if isinstance(value, tuple) and len(value) != count:
                raise UsageError(
                    f"{counted(len(value), 'value')} of {name} for {counted(count, 'adapter')}",
                    "give one, or one for each",
                )

    def here(self, name: str, depth: float, places: Sequence[int]) -> BoundRule:
        """The method as it counts for one weight: its parameters as numbers.

        Args:
            name: of the weight, which filters of parameters look for.
            depth: of its layer; see `adapterkit.ops.settings`.
            places: which of the adapters act on it.
        """
        from adapterkit.ops.settings import at

        def picked(value: Any) -> Any:
            found = at(value, name, depth)
            return tuple(found[place] for place in places) if isinstance(found, tuple) else found

        bound = {key: value for key, value in self._bound.items() if key in self.parameters}
        if shares := self.shares:
            bound["weight"] = shares
        return replace(self, parameters={key: picked(value) for key, value in bound.items()})

    @property
    def _bound(self) -> dict[str, Any]:
        """The method's parameters, checked: those given and the defaults of the rest."""
        from adapterkit.ops.rules import find

        row = self.row
        inner = {} if row is find(self.method) else {"rule": find(self.method).name}
        return row.bind({**self._own, **inner})

    @property
    def dense(self) -> bool:
        """Whether the result has no low rank."""
        return self.row.space == "dense"

    @property
    def has_rank(self) -> bool:
        """Whether the rank of the result is one of the method's own parameters."""
        return any(parameter.name == "rank" for parameter in self.row.parameters)

    @property
    def needs_factors(self) -> bool:
        """Whether the method combines low-rank deltas only."""
        from adapterkit.ops.rules.registry import ANY_DELTAS

        return self.row.space != "dense" and self.row.name not in ANY_DELTAS

    def __str__(self) -> str:
        words = [self.method, *([f"in {self.space}"] if self.space else [])]
        words += [
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={_shown(value)}"
            for name, value in self.parameters.items()
        ]
        words += [f"lambda={self.scale:g}"] if self.scale != 1 else []
        return " ".join(words)

    def apply(
        self,
        parts: Sequence[DeltaRows],
        weights: Sequence[float],
        refs: Sequence[str],
        key: str,
        rank: int | None = None,
        base: DeltaRows | None = None,
    ) -> DeltaRows:
        """One delta out of those of several adapters, by a rule whose parameters are numbers; see `here`.

        Args:
            parts: of one weight.
            weights: one per part, not all zero.
            refs: what the adapters are called, for errors.
            key: the parameter's name, part of the seed of random masks.
            rank: passed to a method that has such a parameter of its own.
            base: rows of the weight itself, where they are at hand.

        Raises:
            UsageError: a delta without low rank, and a method that needs one.
        """
        from adapterkit.ops.lowrank import Factors
        from adapterkit.ops.rules import combine

        if self.needs_factors:
            for part, ref in zip(parts, refs, strict=True):
                if not isinstance(part, Factors):
                    raise UsageError(
                        f"{ref} has no low rank at {key}, and method {self.row.name} combines low-rank deltas only",
                        f"use {option('method', 'linear')} or ties with {option('rank')}, or fold it in with merge",
                    )
        own = {"rank": rank} if rank is not None and self.has_rank else {}
        scale = self.scale
        if shares := self.shares:
            weights = [w * share for w, share in zip(weights, shares, strict=True)]
            if not any(weights):
                weights, scale = [1.0] * len(parts), 0.0  # none counts in this part of the model
        return combine(
            parts,
            self.method,
            weights=weights,
            scale=scale,
            space=self.space,
            key=key,
            base=base,
            **{**own, **self._own},
        )


def _shown(value: Any) -> str:
    """A parameter that is rows, or several."""
    from adapterkit.ops.settings import is_setting, setting

    if is_setting(value):
        return f"({setting(value, lambda one: one, '')})"
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, (list, tuple)) else str(value)


def check_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """One finite weight per adapter, not all of them zero.

    Raises:
        UsageError
    """
    from math import isfinite

    # An array of numpy or torch has no truth value, so its length is asked.
    given = () if weights is None else tuple(float(weight) for weight in weights)
    found = given or (1.0,) * count
    if len(found) != count:
        said = f"{counted(len(found), 'weight')} for {counted(count, 'adapter')}"
        raise UsageError(said, f"give one {option('weights')} for each adapter")
    bad = next((weight for weight in found if not isfinite(weight)), None)
    if bad is not None:
        raise UsageError(f"a weight must be a finite number, got {bad}", "correct it")
    if not any(found):
        raise UsageError("every weight is 0, so nothing is left to combine", "give at least one adapter a weight")
    return found
