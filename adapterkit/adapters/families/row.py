"""One row of a family's table: a module of the original layout, and the modules of diffusers that hold the same rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

# How the rows of the original module are shared among its parts:
# ``equal``    all parts have as many rows;
# ``width``    q, k and v have as many rows as the model is wide, the last part has the rest;
# ``grouped``  q has as many rows as the model is wide, k and v share the rest (grouped queries).
Share = Literal["equal", "width", "grouped"]
# Which halves change places: none, the two halves (scale and shift, gate and value), or the two halves where there are
# only two (the last block of SD3 has scale and shift alone).
Swap = Literal["", "halves", "pair"]
Leaves = tuple[tuple[str, str], ...]

WEIGHTS: Leaves = ((".weight", ".weight"), (".bias", ".bias"))
SCALE: Leaves = ((".scale", ".weight"),)
BARE: Leaves = (("", ""),)
JOINED: Leaves = (("_weight", ".weight"), ("_bias", ".bias"))  # torch.nn.MultiheadAttention's in_proj

_NUMBER = re.compile(r"(?<![^.])(?:[0-9]{1,9}|\{\})(?![^.])")


@dataclass(frozen=True)
class Pattern:
    """A dotted name with ``{}`` for a number that counts blocks, and perhaps ``.*`` at its end for any path below."""

    text: str

    @cached_property
    def key(self) -> str:
        """The name with ``#`` for every number: what a dictionary is asked for."""
        return _NUMBER.sub("#", self.text.removesuffix(".*"))

    @cached_property
    def numbers(self) -> tuple[int | None, ...]:
        """The numbers of the name: None where any number stands."""
        return tuple(None if found == "{}" else int(found) for found in _NUMBER.findall(self.text.removesuffix(".*")))

    @property
    def open(self) -> bool:
        """Whether any path below it is meant too."""
        return self.text.endswith(".*")

    def captures(self, numbers: tuple[int, ...]) -> tuple[int, ...] | None:
        """The block numbers of a name with these numbers; None where the name is another one."""
        if len(numbers) != len(self.numbers):
            return None
        if any(own is not None and own != number for own, number in zip(self.numbers, numbers, strict=True)):
            return None
        return tuple(number for own, number in zip(self.numbers, numbers, strict=True) if own is None)

    def fill(self, captures: tuple[int, ...], rest: str) -> str:
        """The name with these block numbers."""
        return self.text.removesuffix(".*").format(*captures) + rest


def keyed(name: str) -> tuple[str, tuple[int, ...]]:
    """A name with ``#`` for every number, and the numbers."""
    return _NUMBER.sub("#", name), tuple(int(found) for found in _NUMBER.findall(name))


@dataclass(frozen=True)
class SharedRows:
    """A module of the original layout and the modules of diffusers that share its rows, in the order of the rows.

    Attributes:
        original: its name in the original layout.
        parts: the names in diffusers.
        share: how the rows are shared.
        swap: whether halves change places on the way.
        leaves: the endings of its parameters, original and diffusers.
        turned: the original is stored ``[in, out]`` and diffusers' ``[out, in]``.
        alias: another trainer's name for rows that a row above has: read, never written.
        wide: of ``width``: the module beside it whose rows tell how wide the model is, where the base has it.
        fold: the original is one vector of this many vectors, which diffusers stores as rows.
        when: of two originals for the same part: the start of names in diffusers that must be there, or behind a ``-``
            must not.
    """

    original: str
    parts: tuple[str, ...]
    share: Share = "equal"
    swap: Swap = ""
    leaves: Leaves = WEIGHTS
    turned: bool = False
    alias: bool = False
    wide: str = ""
    fold: int = 0
    when: str = ""


@dataclass(frozen=True)
class PipelineFamily:
    """Models of one architecture.

    Attributes:
        name: as it is called in reports.
        rows: of its table; names in none of them are the same in both layouts.
        original: names that only the original layout has.
        diffusers: names that only diffusers' layout has.
        classes: diffusers' classes.
        whole: the table has every parameter of the model, so that whole checkpoints go from one layout to the other. Set where
            diffusers' own conversion of what we make gives its model back, name by name.
        only_original: tensors that diffusers has not.
        said: how a trainer's file calls its models, as a pattern; asked where names alone do not tell.
    """

    name: str
    rows: tuple[SharedRows, ...]
    original: tuple[str, ...] = ()
    diffusers: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    whole: bool = False
    only_original: tuple[str, ...] = ()
    said: str = ""


def table(text: str, **shared: object) -> tuple[SharedRows, ...]:
    """Rows of plain renamings, one a line: ``original -> diffusers``."""
    rows = []
    for line in text.strip().splitlines():
        original, _, part = (word.strip() for word in line.partition("->"))
        if original:
            rows.append(SharedRows(original, (part,), **shared))  # type: ignore[arg-type]
    return tuple(rows)
